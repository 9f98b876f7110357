"use strict";
const RUNNING = ["validating", "in_progress", "finalizing", "cancelling"];

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    say("Uploading …");
    const file = await upload($("file").files[0], "batch");
    const batch = await post("v1/batches",
      { input_file_id: file.id, endpoint: "/v1/images/generations", completion_window: "24h" });
    say(`Started ${batch.id}.`);
    $("form").reset();
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
  });
}

function card(batch) {
  const counts = batch.request_counts, done = counts.completed + counts.failed;
  const lines = counts.total ? `${done.toLocaleString()} of ${counts.total.toLocaleString()} lines` : "";
  const said = [lines, counts.failed ? `${counts.failed} failed` : "", when(batch.created_at)];
  const buttons = element("div", { className: "buttons" });
  function button(text, act) {
    const made = element("button", { type: "button", textContent: text });
    made.onclick = async () => { try { await act(); await look(); } catch (error) { say(error.message, true); } };
    buttons.append(made);
  }
  if (batch.output_file_id) button("Download answers", () => download(batch.output_file_id, `${batch.id}.jsonl`));
  if (batch.error_file_id) button("Download errors", () => download(batch.error_file_id, `${batch.id}-errors.jsonl`));
  if (["validating", "in_progress"].includes(batch.status)) button("Cancel", () => post(`v1/batches/${batch.id}/cancel`));
  const errors = (batch.errors?.data || []).slice(0, 20).map((error) =>
    element("li", { textContent: `${error.line ? `line ${error.line}: ` : ""}${error.message}` }));
  const bar = element("progress", { max: Math.max(1, counts.total), value: done });
  bar.setAttribute("aria-label", `Progress of ${batch.id}`);
  bar.hidden = !RUNNING.includes(batch.status);
  return element("li", {},
    element("div", { className: "head" }, element("code", { textContent: batch.id }), pill(batch.status)),
    bar,
    element("p", { className: "quiet", textContent: said.filter(Boolean).join(", ") }),
    ...(errors.length ? [element("ul", { className: "events" }, ...errors)] : []),
    ...(buttons.children.length ? [buttons] : []));
}

let shown = "";
async function look() {
  const list = await get("v1/batches?limit=50");
  const state = JSON.stringify(list.data);
  if (state === shown) return;  // what has not changed keeps its focus
  shown = state;
  $("none").hidden = list.data.length > 0;
  $("batches").replaceChildren(...list.data.map(card));
}

watch(look);
