"use strict";
const RUNNING = ["validating_files", "queued", "running"];
const CURVES = {  // of the figures that a run logs, those that say how it goes
  overall: "score", gap: "teacher to fake, squared", flow_matching: "error of the fake",
  "latent/diversity": "diversity of a batch", frechet: "Frechet distance",
};
const DRAWN = 500;  // points of a curve at most: there are fewer pixels
let chosen = null, shown = "", detail = "", drawn = "";
let told = { at: "", events: [] };  // what the chosen job has told, the newest first

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const typed = $("prompts").value.trim();
  const file = $("file").files[0] || (typed && new File([`${typed}\n`], "prompts.txt", { type: "text/plain" }));
  if (!file) return say("Choose a file of prompts, or type some.", true);
  const distillation = { preset: $("preset").value || undefined, method: $("method").value || undefined,
    networks: $("networks").value || undefined, images: Number($("budget").value) || undefined };
  try {
    say("Uploading …");
    const uploaded = await upload(file, "fine-tune");
    const job = await post("v1/fine_tuning/jobs", {
      model: $("model").value, training_file: uploaded.id, suffix: $("suffix").value || undefined,
      seed: $("seed").value === "" ? undefined : Number($("seed").value), distillation,
    });
    say(`Started ${job.id}.`);
    chosen = job.id;
    await look();
  } catch (error) {
    say(error.message, true);
  }
});

function seen(job) {
  const total = job.images_total ? ` of ${job.images_total.toLocaleString()}` : "";
  return job.images_seen ? `${job.images_seen.toLocaleString()}${total} images seen` : "";
}

function row(job) {
  const button = element("button", { type: "button", className: "head" },
    element("code", { textContent: job.fine_tuned_model || job.id }), pill(job.status));
  button.setAttribute("aria-pressed", String(job.id === chosen));
  button.onclick = () => { chosen = job.id; shown = detail = ""; look().catch((error) => say(error.message, true)); };
  return element("li", {}, button, element("p", { className: "quiet", textContent: [job.model, when(job.created_at), seen(job)].filter(Boolean).join(", ") }));
}

async function look() {
  const list = await get("v1/fine_tuning/jobs?limit=50");
  chosen ||= list.data[0]?.id;
  const state = JSON.stringify([list.data, chosen]);
  if (state !== shown) {
    shown = state;
    $("none").hidden = list.data.length > 0;
    $("jobs").replaceChildren(...list.data.map(row));
  }
  const job = list.data.find((each) => each.id === chosen);
  if (job) await show(job);
}

// All events of a job: those that are here already, and before them what has come since.
async function everything(at) {
  const known = told.at === at ? told.events : [], fresh = [];
  let page, met = -1;
  do {
    const after = fresh.length ? `&after=${fresh.at(-1).id}` : "";
    page = await get(`${at}/events?limit=100${after}`);
    met = page.data.findIndex((event) => event.id === known[0]?.id);
    fresh.push(...page.data.slice(0, met < 0 ? undefined : met));
  } while (page.has_more && met < 0);
  return fresh.concat(known);
}

async function show(job) {
  const at = `v1/fine_tuning/jobs/${job.id}`;
  const [events, checkpoints] = await Promise.all([everything(at), get(`${at}/checkpoints?limit=20`)]);
  if (job.id !== chosen) return;  // another one since
  told = { at, events };
  const state = JSON.stringify([job, events.length, checkpoints.data]);
  if (state === detail) return;
  $("one").hidden = false;
  $("name").replaceChildren(element("code", { textContent: job.id }), " ", pill(job.status));

  const metrics = events.filter((event) => event.type === "metrics").map((event) => event.data).reverse();
  const budget = job.images_total, images = job.images_seen;
  $("bar").hidden = job.status !== "running";
  if (budget) $("bar").value = images / budget;
  else $("bar").removeAttribute("value");
  $("state").textContent = [
    job.error?.message,
    seen(job),
    RUNNING.includes(job.status) && job.estimated_finish ? `done about ${when(job.estimated_finish)}` : "",
    job.finished_at ? `ended ${when(job.finished_at)}` : "",
  ].filter(Boolean).join(", ");

  actions(job, at);
  const curves = Object.entries(CURVES).map(([name, title]) => curve(title, points(metrics, name))).filter(Boolean);
  $("curves").replaceChildren(...curves);
  table(checkpoints.data);
  $("events").replaceChildren(...events.filter((event) => event.type !== "metrics").map((event) =>
    element("li", { className: event.level }, element("time", { textContent: when(event.created_at) }), ` ${event.message}`)));
  await draw(job, at);
  detail = state;  // all of it is there: what failed on the way is done again
}

// The newest grid of the student's images; asked for again when more images have been seen, and at the end.
async function draw(job, at) {
  const wanted = `${at} ${job.images_seen} ${job.status}`;
  if (drawn === wanted) return;
  const answer = job.images_seen ? await fetch(`${at}/sample`, { headers: headers() }) : null;
  if (answer && !answer.ok && answer.status !== 404) await read(answer);  // raises what went wrong; 404 is none yet
  const image = answer?.ok ? await answer.blob() : null;
  if (job.id !== chosen) return;
  const old = $("grid").firstChild?.src;
  if (!image) $("grid").replaceChildren();
  else $("grid").replaceChildren(element("img", { src: URL.createObjectURL(image), alt: "The student's images on some prompts" }));
  if (old) URL.revokeObjectURL(old);
  drawn = wanted;
}

function actions(job, at) {
  const named = { pause: "Pause", resume: "Resume", cancel: "Cancel" };
  const paused = job.status === "paused";
  const possible = RUNNING.includes(job.status) || paused ? [paused ? "resume" : "pause", "cancel"] : [];
  const buttons = possible.map((action) => {
    const button = element("button", { type: "button", textContent: named[action] });
    button.onclick = async () => {
      try { await post(`${at}/${action}`); await look(); } catch (error) { say(error.message, true); }
    };
    return button;
  });
  if (job.fine_tuned_model) {
    const link = `./?model=${encodeURIComponent(job.fine_tuned_model)}`;
    buttons.push(element("a", { className: "button", href: link, textContent: "Try the student" }));
  }
  $("actions").replaceChildren(...buttons);
}

function points(metrics, name) {
  return metrics.filter((each) => Number.isFinite(each[name])).map((each) => [each.images, each[name]]);
}

// A small line chart; its extremes are written beside it, and a reader of screens hears the last value.
function curve(title, points) {
  if (points.length < 2) return null;
  const [width, height, edge] = [260, 90, 4];
  const [xs, ys] = [points.map((point) => point[0]), points.map((point) => point[1])];
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const stride = Math.ceil(points.length / DRAWN);
  const thinned = points.filter((_, i) => i % stride === 0 || i === points.length - 1);
  const place = ([x, y]) => [
    edge + (width - 2 * edge) * (x - left) / (right - left || 1),
    height - edge - (height - 2 * edge) * (y - low) / (high - low || 1),
  ].map((each) => each.toFixed(1)).join(",");
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg"), line = document.createElementNS(space, "polyline");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${title}, now ${ys.at(-1).toPrecision(3)}`);
  line.setAttribute("points", thinned.map(place).join(" "));
  svg.append(line);
  const range = `${low.toPrecision(3)} to ${high.toPrecision(3)}, now ${ys.at(-1).toPrecision(3)}`;
  return element("figure", {}, element("figcaption", {}, element("span", { textContent: title })), svg,
    element("figcaption", {}, element("span", { textContent: range })));
}

function table(checkpoints) {
  const names = [...new Set(checkpoints.flatMap((each) => Object.keys(each.metrics)))].filter((name) => name !== "step");
  const cells = (tag, texts) => element("tr", {}, ...texts.map((text) => element(tag, { textContent: text })));
  const rows = checkpoints.map((each) =>
    cells("td", [each.step_number.toLocaleString(), ...names.map((name) => each.metrics[name]?.toPrecision?.(3) ?? "")]));
  $("saved").hidden = !rows.length;
  $("checkpoints").replaceChildren(...(rows.length ? [cells("th", ["images", ...names]), ...rows] : []));
}

watch(look);
