// The playground.
import { get } from "./api.js";
import { Artist } from "./artist.js";
import { $, allow, changed, count, element, say } from "./element.js";
import { posted } from "./generate.js";
import { forget, list, remember } from "./history.js";
import { saveAll, show, time } from "./images.js";
import { settings } from "./png.js";
import { close } from "./realtime.js";
import { FIELDS, address, addressed, body, known, learn, model, offer, refill } from "./request.js";
import { copy, curl, python } from "./snippets.js";

const SETTLED = 1000;  // milliseconds without a change after which images are kept in the history
const SLOW = 800;  // milliseconds without an answer after which the page says that it waits
let lacking = [];  // what a request of a link, the history or a file names, and the server lacks
let shown = null, settling = 0, slow = 0, retry = 0, missing = "The models of the server are not known yet.", comparing = null;

const artist = new Artist((made) => {
  arrived();
  present(made);
  clearTimeout(settling);
  settling = setTimeout(settle, SETTLED);
}, (error, seconds) => {
  arrived();
  if (error.status === 404) return replace(error);
  say(seconds === null ? error.message : `${error.message} Trying again in ${count(Math.ceil(seconds), "second")}.`, true);
});

// The model or adapter was unloaded meanwhile: go on with what the server has.
async function replace(error) {
  const before = $("model").value;
  say(error.message, true);
  await models();
  if (model(before)) return;
  lacking = [`model ${before}`];
  draw();
}

function arrived() {
  clearTimeout(slow);
  slow = 0;
  $("images").classList.remove("waiting");
}

// Why nothing can be drawn now; empty if something can.
function reason() {
  if (!known().length) return missing;
  if (!$("prompt").value.trim()) return "The prompt is empty: describe an image, or choose an example.";
  const wrong = [...$("form").elements].find((field) => !field.disabled && !field.validity.valid);
  return wrong ? `${wrong.labels[0].firstChild.textContent.trim()}: ${wrong.validationMessage}` : "";
}

function stop() {
  artist.stop();
  arrived();
}

function draw() {
  const why = reason();
  allow("draw", why);
  if (why) return stop();
  $("images").classList.add("waiting");
  slow ||= setTimeout(() => say("Drawing …"), SLOW);
  clearTimeout(settling);
  settling = 0;
  comparing?.abort();
  artist.want(body());
}

function present(made) {
  shown = made;
  show(made, $("images"));
  time(made);
  const images = made.content.data.length, { decoder, size, warnings = [] } = made.content;
  $("all").hidden = images < 2;
  const facts = `${count(images, "image")} of ${size} in ${Math.round(made.total)} ms${decoder === "small" ? ", by the small decoder" : ""}.`;
  const notes = lacking.length ? [`this server has no ${lacking.join(" and no ")}, so the image may differ`] : [];
  say([facts, ...[...notes, ...warnings].map((each) => `Note: ${each}.`)].join(" "));
}

// The prompt rests: keep it, put it into the address, and draw it beside.
async function settle() {
  settling = 0;
  if (artist.busy || !shown) return;
  const { asked } = shown;
  history.replaceState(null, "", address(asked));
  remember(shown, again);
  const other = $("beside").value;
  $("others").hidden = !other;
  if (!other) return;
  comparing = new AbortController();
  $("others").classList.add("waiting");
  try {
    const { prompt, seed, n, output_format } = asked;
    show(await posted({ prompt, seed, n, output_format, model: other }, comparing.signal), $("others"));
    $("others").prepend(element("h3", { textContent: other, title: other }));
    $("images").prepend(element("h3", { textContent: asked.model, title: asked.model }));
  } catch (error) {
    if (error.name !== "AbortError") say(`${other}: ${error.message}`, true);
  } finally {
    $("others").classList.remove("waiting");
  }
}

// Before something else is asked for: what is shown now was looked at.
function keep() {
  if (settling) remember(shown, again);
  clearTimeout(settling);
  settling = 0;
  lacking = [];
}

function again(asked, made) {  // a request of the history, the address or a file
  stop();
  lacking = refill(asked);
  if (!made) return draw();
  allow("draw", reason());
  present(made);
}

function introduce() {
  const { id, description = "", owned_by, max_steps = 1 } = model() ?? {};
  $("name").textContent = id ?? "This server";
  const steps = max_steps > 1 ? `1 to ${max_steps} network evaluations` : "one network evaluation";
  $("facts").textContent = id ? `turns text into images, with ${steps} for each, where its teacher needs many.` : "turns text into images.";
  $("about").textContent = description;
  const examples = (model()?.examples?.length ? model() : known().find((each) => each.owned_by === owned_by && each.examples?.length))?.examples ?? [];
  $("chips").hidden = !examples.length;
  $("chips").replaceChildren(...examples.map((text) => {
    const chip = element("button", { type: "button", textContent: text });
    chip.addEventListener("click", () => { keep(); $("prompt").value = text; draw(); });
    return chip;
  }));
  return examples;
}

async function models() {  // jobs and administrators load and unload them meanwhile
  clearTimeout(retry);
  const first = !known().length;
  try {
    const listed = (await get("v1/models")).data;
    missing = "The server has no model yet.";
    if (!learn(listed)) return;
  } catch (error) {
    missing = error.message;
    allow("draw", reason());
    if (error.status !== 401) {
      say(error.status ? error.message : `${error.message} Trying again.`, true);
      retry = setTimeout(models, 2000);
    } else say(error.message, true);
    return;
  }
  const examples = introduce();
  if (!first) return;
  say("");
  const given = addressed();
  lacking = refill({ prompt: $("prompt").value || examples[0] || "", ...given });
  introduce();
  allow("draw", reason());
  if ($("prompt").value) draw();
}

function soon() {
  lacking = [];
  const why = reason();
  allow("draw", why);
  if (why) stop();
  else if ($("live").checked) draw();
}

function restore(file) {
  if (!file) return;
  file.arrayBuffer().then((content) => {
    const found = settings(new Uint8Array(content));
    again({ ...found, n: 1 });
    if (!found.prompt) say("The file holds the seed and the model, but no prompt.", true);
  }).catch((error) => say(error.message, true)).finally(() => { $("saved").value = ""; });  // it may be chosen again
}

changed("model", () => { offer(); introduce(); });
for (const event of ["focus", "pointerdown"]) $("model").addEventListener(event, models);
document.addEventListener("visibilitychange", () => { if (!document.hidden) models(); });
for (const field of ["prompt", ...FIELDS]) changed(field, soon);
changed("beside", () => {
  $("images").querySelector("h3")?.remove();
  settle();
});
$("form").addEventListener("submit", (event) => { event.preventDefault(); draw(); });
$("form").noValidate = true;  // the reason is written below the button
$("dice").addEventListener("click", () => { keep(); $("seed").value = Math.floor(Math.random() * 1e6); draw(); });
$("all").addEventListener("click", () => saveAll(shown));
for (const [id, text] of [["curl", () => curl(body())], ["python", () => python(body())], ["share", () => address(body())]]) {
  $(id).addEventListener("click", async () => { await copy(text()); say("Copied."); });
}
changed("saved", () => restore($("saved").files[0]));
for (const type of ["dragover", "dragleave", "drop"]) {  // anywhere, because the browser would leave the page for the file
  document.addEventListener(type, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    $("drop").classList.toggle("over", type === "dragover");
    if (type === "drop") restore(event.dataTransfer.files[0]);
  });
}
$("forget").addEventListener("click", () => { forget(again); $("prompt").focus(); });
$("key").addEventListener("change", () => { close(); models(); });
window.addEventListener("storage", ({ key }) => { if (key === "history") list(again); });
window.addEventListener("hashchange", () => again(addressed()));
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); draw(); }
  if (event.altKey && event.code === "KeyS") { event.preventDefault(); $("dice").click(); }
});
$("options").open = !matchMedia("(max-width: 46rem)").matches;  // on a phone the images come right below the prompt
allow("draw", reason());
list(again);
models();
