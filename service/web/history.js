// Prompts that were settled, in this browser: their requests and small pictures. They survive a reload.
import { $, element } from "./element.js";
import { source } from "./images.js";
import { ofBrowser } from "./storage.js";

const KEPT = 24, SIDE = 96, PLACE = "history";
const answers = new Map();  // of this page, by request: they need not be drawn again

function read() {
  try {
    const kept = JSON.parse(ofBrowser.get(PLACE) ?? "[]");
    return Array.isArray(kept) ? kept.filter((each) => typeof each?.asked?.prompt === "string" && typeof each.picture === "string") : [];
  } catch {
    return [];
  }
}

function write(entries) {
  const kept = entries.slice(0, KEPT), names = new Set(kept.map(({ asked }) => JSON.stringify(asked)));
  ofBrowser.set(PLACE, JSON.stringify(kept));
  for (const name of answers.keys()) if (!names.has(name)) answers.delete(name);
}

async function picture(made) {
  const image = element("img", { src: source(made, made.content.data[0]) });
  await image.decode();
  const scale = Math.min(1, SIDE / Math.max(image.naturalWidth, image.naturalHeight));
  const canvas = element("canvas", { width: Math.round(image.naturalWidth * scale), height: Math.round(image.naturalHeight * scale) });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/webp", 0.9);
}

// Put an answer first. Its request stands in the list once; another tab may have added to the list meanwhile.
export async function remember(made, choose) {
  const name = JSON.stringify(made.asked);
  answers.set(name, made);
  const small = await picture(made);
  write([{ asked: made.asked, picture: small }, ...read().filter((each) => JSON.stringify(each.asked) !== name)]);
  list(choose);
}

export function list(choose) {
  const entries = read();
  $("past").hidden = !entries.length;
  $("history").replaceChildren(...entries.map(({ asked, picture: small }) => {
    const text = `${asked.prompt}, seed ${asked.seed}`;
    const button = element("button", { type: "button", title: text }, element("img", { src: /^data:image\//.test(small) ? small : "", alt: "" }));
    button.setAttribute("aria-label", `Show again: ${text}`);
    button.addEventListener("click", () => choose(asked, answers.get(JSON.stringify(asked))));
    return element("li", {}, button);
  }));
}

export function forget(choose) {
  write([]);
  list(choose);
}
