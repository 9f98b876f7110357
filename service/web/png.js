// The settings of an image in its PNG file: written when it is saved here, and read again.
import { crc32 } from "./crc.js";

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const KEYWORD = "fgm-settings", XMP = "XML:com.adobe.xmp";
const IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/", OURS = "urn:flow-generator-matching";

function* chunks(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  for (let at = SIGNATURE.length; at + 12 <= bytes.length;) {
    const length = view.getUint32(at), end = at + 12 + length;
    if (end > bytes.length) return;
    yield { at, type: String.fromCharCode(...bytes.subarray(at + 4, at + 8)), data: bytes.subarray(at + 8, at + 8 + length) };
    at = end;
  }
}

function texts(bytes) {  // the uncompressed international texts, by keyword
  const found = new Map();
  for (const { type, data } of chunks(bytes)) {
    if (type !== "iTXt") continue;
    const keyword = data.indexOf(0), language = data.indexOf(0, keyword + 3), translated = data.indexOf(0, language + 1);
    if (keyword < 0 || language < 0 || translated < 0 || data[keyword + 1]) continue;
    found.set(new TextDecoder().decode(data.subarray(0, keyword)), new TextDecoder().decode(data.subarray(translated + 1)));
  }
  return found;
}

// The file with its settings. A signed file, and one that the server left without labels, stays as it is.
export function label(bytes, settings) {
  const types = [...chunks(bytes)].map((chunk) => chunk.type);
  if (types.includes("caBX") || !texts(bytes).has(XMP)) return bytes;
  const body = new TextEncoder().encode(`iTXt${KEYWORD}\0\0\0\0\0${JSON.stringify(settings)}`);
  const chunk = new Uint8Array(body.length + 8), view = new DataView(chunk.buffer);
  view.setUint32(0, body.length - 4);
  chunk.set(body, 4);
  view.setUint32(body.length + 4, crc32(body));
  const [, second] = chunks(bytes);
  const made = new Uint8Array(bytes.length + chunk.length);
  made.set(bytes.subarray(0, second.at));
  made.set(chunk, second.at);
  made.set(bytes.subarray(second.at), second.at + chunk.length);
  return made;
}

// The settings of a saved image, as far as the file has them. Raises an error for other files.
export function settings(bytes) {
  if (SIGNATURE.some((byte, i) => bytes[i] !== byte)) throw new Error("This is not a PNG file; choose an image that was saved here.");
  const found = texts(bytes);
  if (found.has(KEYWORD)) {
    try { return plain(JSON.parse(found.get(KEYWORD))); } catch { throw new Error("The settings in this image are damaged; choose another one."); }
  }
  const marked = new DOMParser().parseFromString(found.get(XMP) ?? "<none/>", "application/xml").querySelector("*|Description");
  const seed = marked?.getAttributeNS(OURS, "seed");
  if (!seed) throw new Error("This image has no settings in it; choose one that was saved here.");
  const prompt = marked.getAttributeNS(IPTC, "AIPromptInformation");
  const used = /^(\S+)(?: with (\S+) at (\S+))?(?: in (\d+) steps)?$/.exec(marked.getAttributeNS(IPTC, "AISystemUsed"));
  return plain({
    seed: Number(seed), ...(prompt ? { prompt } : {}), ...(used ? { model: used[1] } : {}),
    ...(used?.[2] ? { lora: { name: used[2], scale: Number(used[3]) } } : {}), ...(used?.[4] ? { steps: Number(used[4]) } : {}),
  });
}

function plain(given) {  // only what the form has, in its types
  const kinds = { prompt: "string", model: "string", size: "string", output_format: "string", seed: "number", steps: "number" };
  const kept = Object.entries(kinds).filter(([name, kind]) => typeof given?.[name] === kind).map(([name]) => [name, given[name]]);
  const lora = typeof given?.lora?.name === "string" ? { lora: { name: given.lora.name, scale: Number(given.lora.scale) || 0 } } : {};
  return { ...Object.fromEntries(kept), ...lora };
}
