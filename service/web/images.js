// Images on the page: their scale, the enlarged one, and their files.
import { save } from "./api.js";
import { $, button, element } from "./element.js";
import { label } from "./png.js";
import { ofBrowser } from "./storage.js";
import { zip } from "./zip.js";

const WIDTH = 448, CROWDED = 208;  // CSS pixels of one image, and of each of several

export const source = (made, item) => `data:image/${made.content.output_format};base64,${item.b64_json}`;

function bytes(made, item) {
  const plain = Uint8Array.from(atob(item.b64_json), (character) => character.charCodeAt(0));
  if (made.content.output_format !== "png") return plain;
  const { n, ...asked } = made.asked;
  return label(plain, { ...asked, seed: item.seed });
}

function filename(made, item) {
  const words = made.asked.prompt.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60);
  return `${words || "image"}-${item.seed}.${made.content.output_format}`;
}

export function saveAll(made) {
  save(zip(made.content.data.map((item) => [filename(made, item), bytes(made, item)])), "images.zip");
}

// The CSS width of an image: whole screen pixels for each of its own if it is small, else what fits.
export function scaled(natural, available, whole = true) {
  const ratio = window.devicePixelRatio || 1, times = (available * ratio) / natural;
  return whole && times >= 1 ? (natural * Math.floor(times)) / ratio : Math.min(available, Math.max(natural, available));
}

export function show(made, into) {
  const items = made.content.data, several = items.length > 1;
  const [width, height] = made.content.size.split("x").map(Number);
  into.className = several ? "images" : "images one";
  into.replaceChildren(...items.map((item) => {
    const image = element("img", { src: source(made, item), alt: `${made.asked.prompt} (seed ${item.seed})`, width, height });
    image.dataset.limit = several ? CROWDED : WIDTH;
    const enlarge = element("button", { type: "button", className: "frame", title: "Enlarge" }, image);
    enlarge.addEventListener("click", () => zoom(image, made.asked.prompt));
    const file = () => save(new Blob([bytes(made, item)], { type: `image/${made.content.output_format}` }), filename(made, item));
    const keep = button("Save", file, { className: "plain", title: "The file keeps its settings, also the prompt" });
    keep.setAttribute("aria-label", `Save the image of seed ${item.seed}`);
    return element("figure", {}, enlarge, element("figcaption", {}, element("span", { textContent: `seed ${item.seed}` }), keep));
  }));
  fit();
}

// Give every image its width; called again when the window or the choice changes.
export function fit() {
  const smooth = $("smooth").checked;
  for (const image of document.querySelectorAll(".images img")) {
    const available = Math.min(Number(image.dataset.limit), image.closest(".images").clientWidth - 2);
    const width = scaled(Number(image.getAttribute("width")), available, !smooth);
    image.style.width = `${width}px`;
    image.classList.toggle("sharp", !smooth);
  }
}

function zoom(image, prompt) {
  const natural = Number(image.getAttribute("width")), tall = Number(image.getAttribute("height")) / natural;
  const copy = element("img", { src: image.src, alt: image.alt, className: image.className });
  const room = Math.min(innerWidth - 64, (innerHeight - 160) / tall);
  let width = scaled(natural, room, !$("smooth").checked);
  const step = natural >= room ? width / 2 : natural;
  const set = (wanted) => {
    width = Math.max(Math.min(natural, step), wanted);
    copy.style.width = `${width}px`;
  };
  $("smaller").onclick = () => set(width - step);
  $("larger").onclick = () => set(width + step);
  $("zoomed").textContent = prompt;
  $("lens").replaceChildren(copy);
  set(width);
  $("zoom").showModal();
}

$("close").addEventListener("click", () => $("zoom").close());
$("smooth").checked = ofBrowser.get("smooth") === "true";
$("smooth").addEventListener("change", () => {
  ofBrowser.set("smooth", String($("smooth").checked));
  fit();
});
window.addEventListener("resize", fit);

const NAMED = new Set(["queue", "text", "model", "vae", "safety", "encode"]);

// The stages of an answer, as a bar and as text.
export function time(made) {
  const named = made.stages.reduce((sum, stage) => sum + stage[1], 0);
  const stages = [...made.stages, ["elsewhere", Math.max(0, made.total - named)]];
  const kind = (name) => (NAMED.has(name) ? name : "elsewhere");
  $("stages").replaceChildren(...stages.map(([name, milliseconds]) => {
    const part = element("div", { className: kind(name) });
    part.style.flexGrow = milliseconds;
    return part;
  }));
  $("legend").replaceChildren(...stages.map(([name, milliseconds]) =>
    element("li", { className: kind(name), textContent: `${name} ${milliseconds.toFixed(1)} ms` })));
}
