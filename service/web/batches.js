// The page of batches.
import { download, get, key, post, upload } from "./api.js";
import { $, allow, button, changed, choose, count, element, pill, say, when } from "./element.js";
import { open } from "./gallery.js";
import { watch } from "./watch.js";

const RUNNING = ["validating", "in_progress", "finalizing", "cancelling"];
const MOST = 50_000;  // prompts of a batch, as on the server
const TITLE = 60, ID = 400;  // characters of a prompt in a batch's name, and in the id of its line
let models = [], shown = "";

const prompts = () => $("prompts").value.split("\n").map((line) => line.trim()).filter(Boolean);

function reason() {
  const lines = $("file").files.length ? null : prompts().length;
  if (lines === 0) return "Type some prompts, or choose a file of requests.";
  if (lines > MOST) return `A batch has ${MOST.toLocaleString()} prompts at most, these are ${lines.toLocaleString()}. Start several batches.`;
  const wrong = [...$("form").elements].find((field) => !field.disabled && !field.validity.valid);
  return wrong ? `${wrong.labels[0].firstChild.textContent.trim()}: ${wrong.validationMessage}` : "";
}

function requests(texts) {
  const n = Number($("n").value), first = $("seed").value;
  return texts.map((prompt, i) => JSON.stringify({
    custom_id: `${i + 1} ${[...prompt].slice(0, ID).join("")}`, method: "POST", url: "/v1/images/generations",
    body: { prompt, model: $("model").value, size: $("size").value, n, ...(first === "" ? {} : { seed: Number(first) + i * n }) },
  }));
}

$("form").noValidate = true;  // the reason is written below the button
$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  allow("start", reason());
  if (reason()) return;
  const texts = prompts(), chosen = $("file").files[0];
  const file = chosen ?? new File([`${requests(texts).join("\n")}\n`], "prompts.jsonl");
  const first = [...(texts[0] ?? "")].slice(0, TITLE).join("");
  const name = chosen ? chosen.name.slice(0, 200) : texts.length > 1 ? `${first} and ${texts.length - 1} more` : first;
  try {
    say("Uploading …");
    const uploaded = await upload(file, "batch");
    await post("v1/batches", { input_file_id: uploaded.id, endpoint: "/v1/images/generations", completion_window: "24h", metadata: { name } });
    say("Started.");
    $("prompts").value = $("file").value = "";
    allow("start", "");
    await look();
  } catch (error) {
    say(error.message, true);
  }
});

for (const type of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(type, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", type === "dragover");
    if (type === "drop") $("file").files = event.dataTransfer.files;
    allow("start", reason());
  });
}
for (const id of ["prompts", "file", "n", "seed"]) changed(id, () => allow("start", reason()));
changed("model", sizes);

function sizes() {
  const { sizes: known = [] } = models.find(({ id }) => id === $("model").value) ?? {};
  choose("size", ["auto", ...known].map((size) => [size, size]));
}

const title = (batch) => batch.metadata?.name || batch.id;

function card(batch) {
  const counts = batch.request_counts, done = counts.completed + counts.failed;
  const lines = counts.total ? `${done.toLocaleString()} of ${count(counts.total, "prompt")}` : "";
  const undone = ["cancelled", "cancelling", "expired"].includes(batch.status) ? "not drawn" : "failed";
  const facts = [lines, counts.failed ? `${counts.failed.toLocaleString()} ${undone}` : "", when(batch.created_at)];
  const file = title(batch).replace(/[^\p{L}\p{N}.]+/gu, "-").slice(0, 60);
  const buttons = [];
  if (batch.output_file_id) {
    buttons.push(button("Show images", () => open(title(batch), batch.output_file_id)));
    buttons.push(button("Images as ZIP", () => save(`v1/batches/${batch.id}/images`, `${file}.zip`)));
    buttons.push(button("Answers", () => save(`v1/files/${batch.output_file_id}/content`, `${batch.id}.jsonl`)));
  }
  if (batch.error_file_id) buttons.push(button("Errors", () => save(`v1/files/${batch.error_file_id}/content`, `${batch.id}-errors.jsonl`)));
  if (["validating", "in_progress"].includes(batch.status)) {
    buttons.push(button("Cancel", async () => { await post(`v1/batches/${batch.id}/cancel`); await look(); }));
  }
  for (const each of buttons) each.setAttribute("aria-label", `${each.textContent} of ${title(batch)}`);
  const errors = (batch.errors?.data ?? []).slice(0, 20).map((error) =>
    element("li", { textContent: `${error.line ? `Line ${error.line}: ` : ""}${error.message}` }));
  const bar = element("progress", { max: Math.max(1, counts.total), value: done });
  bar.setAttribute("aria-label", `Progress of ${title(batch)}`);
  bar.hidden = !RUNNING.includes(batch.status);
  const name = element("strong", { textContent: title(batch), title: batch.id, dir: "auto" });
  return element("li", {}, element("div", { className: "head" }, name, pill(batch.status)), bar,
    element("p", { className: "quiet", textContent: facts.filter(Boolean).join(", ") }),
    ...(errors.length ? [element("ul", { className: "events" }, ...errors)] : []),
    ...(buttons.length ? [element("div", { className: "buttons" }, ...buttons)] : []));
}

// Large files go from the server to the disk; with a key, which addresses do not hold, through this page.
async function save(path, name) {
  if (key()) return download(path, name);
  element("a", { href: path, download: name }).click();
}

async function look() {
  if (!models.length) {
    models = (await get("v1/models")).data;
    choose("model", models.map(({ id }) => [id, id]));
    sizes();
  }
  const { data } = await get("v1/batches?limit=50");
  const state = JSON.stringify(data);
  if (state === shown) return;  // what has not changed keeps its focus
  shown = state;
  $("none").hidden = data.length > 0;
  $("batches").replaceChildren(...data.map(card));
}

allow("start", reason());
watch(look);
