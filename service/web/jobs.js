// The page of jobs: the list, and the chosen job.
import { call, download, get, link, post, remove } from "./api.js";
import { curve, figure } from "./curve.js";
import { $, button, count, element, pill, say, when } from "./element.js";
import { offer, started } from "./job_form.js";
import { watch } from "./watch.js";

const RUNNING = ["validating_files", "queued", "running"];
const PHASES = { validating_files: "Check prompts", queued: "Queue", starting: "Start", encoding: "Encode prompts",
  sampling: "Draw teacher's images", training: "Train", exporting: "Export", succeeded: "Serve" };
const SCORES = { overall: "Correct images", kernel: "Kernel distance", clip_score: "CLIP score", frechet: "Fréchet distance",
  diversity: "Diversity", recall: "Recall" };  // what evaluations measure, the most telling first
const LOWER = new Set(["kernel", "frechet"]);  // are better
const CURVES = { gap: "Gap of teacher and auxiliary network", flow_matching: "Loss of the auxiliary network" };
const HIDDEN = new Set(["step", "total_steps", "images"]);
let chosen = location.hash.slice(1) || null, shown = "", detail = "", drawn = "";
let told = { at: "", events: [] };  // the events of the chosen job, the newest first

// The one name of a job: the name that it was given, or its teacher and the end of its id.
function title(job) {
  const [, , suffix] = job.name.split(":");
  return suffix || `${job.model} ${job.id.slice(-6)}`;
}

function progress(job) {
  if (!job.images_seen) return "";
  return job.images_total ? `${job.images_seen.toLocaleString()} of ${count(job.images_total, "image")}` : count(job.images_seen, "image");
}

function row(job) {
  const made = element("button", { type: "button", className: "head" }, element("strong", { textContent: title(job) }), pill(job.status));
  made.setAttribute("aria-pressed", String(job.id === chosen));
  made.addEventListener("click", () => select(job.id));
  const facts = [`${job.model}, ${when(job.created_at)}`, progress(job)];
  return element("li", {}, made, element("p", { className: "quiet", textContent: facts.filter(Boolean).join(", ") }));
}

async function select(id) {
  chosen = id;
  shown = detail = "";
  history.replaceState(null, "", `${location.pathname}#${id}`);
  try { await look(); } catch (error) { say(error.message, true); }
}

async function look() {
  await offer();
  const { data } = await get("v1/fine_tuning/jobs?limit=50");
  if (!data.some(({ id }) => id === chosen)) chosen = data[0]?.id;
  const state = JSON.stringify([data, chosen]);
  if (state !== shown) {
    shown = state;
    $("none").hidden = data.length > 0;
    const focused = document.activeElement?.closest("#jobs li");
    const index = focused ? [...$("jobs").children].indexOf(focused) : -1;
    $("jobs").replaceChildren(...data.map(row));
    $("jobs").children[index]?.querySelector("button").focus();
  }
  const job = data.find((each) => each.id === chosen);
  $("one").hidden = !job;
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
  const events = await everything(at);
  if (job.id !== chosen) return;  // another one since
  told = { at, events };
  const state = JSON.stringify([job, events.length]);
  if (state === detail) return;
  $("name").textContent = title(job);
  $("name").title = job.id;
  $("pill").replaceChildren(pill(job.status));
  phases(job);
  $("bar").hidden = job.status !== "running" || job.phase !== "training";
  if (job.images_total) $("bar").value = job.images_seen / job.images_total;
  else $("bar").removeAttribute("value");
  const options = job.method.distillation;
  $("state").textContent = [
    job.error && `Failed: ${job.error.message}`, progress(job),
    RUNNING.includes(job.status) && job.estimated_finish ? `done about ${when(job.estimated_finish)}` : "",
    job.finished_at ? `ended ${when(job.finished_at)}` : "",
    `preset ${options.preset}${options.method ? `, method ${options.method}` : ""}, seed ${job.seed}`,
    job.fine_tuned_model ? `served as ${job.fine_tuned_model}` : "",
  ].filter(Boolean).join("; ");
  const warning = events.find(({ level }) => level === "warn");
  $("alarms").hidden = !warning;
  $("alarms").textContent = warning?.message ?? "";
  actions(job, at);
  measures(events);
  $("events").replaceChildren(...events.filter(({ type }) => type !== "metrics").map((event) =>
    element("li", { className: event.level }, element("time", { textContent: when(event.created_at) }), ` ${event.message}`)));
  await draw(job, at);
  detail = state;  // all of it is there: what failed on the way is done again
}

function phases(job) {
  const now = job.status === "running" ? job.phase : job.status;
  const names = Object.keys(PHASES), reached = names.indexOf(now);
  $("phases").hidden = reached < 0;
  $("phases").replaceChildren(...names.map((name, i) => {
    const made = element("li", { textContent: PHASES[name], className: i < reached || now === "succeeded" ? "done" : "" });
    if (name === now && now !== "succeeded") made.setAttribute("aria-current", "step");
    return made;
  }));
}

function points(lines, name) {
  return lines.filter((each) => Number.isFinite(each[name])).map((each) => [each.step ?? each.images, each[name]]);
}

// Scores of the evaluations first, then curves of what a run measures.
function measures(events) {
  const measured = events.filter(({ type }) => type === "metrics").reverse();
  const [evaluations, metrics] = [true, false].map((wanted) =>
    measured.filter(({ id }) => id.includes("-evaluation-") === wanted).map(({ data }) => data));
  const scores = Object.keys(SCORES).map((name) => [name, points(evaluations, name)]).filter(([, each]) => each.length);
  $("scores").hidden = !scores.length;
  $("scores").replaceChildren(...scores.map(([name, each]) => {
    const values = each.map(([, value]) => value), best = LOWER.has(name) ? Math.min(...values) : Math.max(...values);
    const note = `best ${figure(best)}, ${LOWER.has(name) ? "lower" : "higher"} is better`;
    return element("div", {}, element("dt", { textContent: SCORES[name] }), element("dd", { textContent: figure(values.at(-1)) }),
      element("dd", { textContent: note }));
  }));
  const curves = [...Object.entries(SCORES).map(([name, text]) => curve(text, points(evaluations, name))),
    ...Object.entries(CURVES).map(([name, text]) => curve(text, points(metrics, name)))].filter(Boolean);
  $("curves").replaceChildren(...curves);
  const named = (lines, known) => [...new Set(lines.flatMap(Object.keys))].filter((name) => !(name in known) && !HIDDEN.has(name)).sort();
  const rest = [...named(evaluations, SCORES).map((name) => curve(readable(name), points(evaluations, name))),
    ...named(metrics, CURVES).map((name) => curve(readable(name), points(metrics, name)))].filter(Boolean);
  $("rest").hidden = !rest.length;
  $("others").replaceChildren(...rest);
}

const readable = (name) => name.replaceAll("_", " ");

// The newest grid of the student's images; asked for again when more images have been seen, and at the end.
async function draw(job, at) {
  const wanted = `${at} ${job.images_seen} ${job.status}`;
  if (drawn === wanted) return;
  const found = job.images_seen ? await call(`${at}/sample`).catch((error) => {
    if (error.status === 404) return null;  // none yet
    throw error;
  }) : null;
  const image = await found?.blob();
  if (job.id !== chosen) return;
  const old = $("grid").firstChild?.src;
  $("grid").replaceChildren(...(image ? [element("img", { src: URL.createObjectURL(image), alt: "The student's images of some prompts" })] : []));
  $("grid").hidden = !image;
  if (old) URL.revokeObjectURL(old);
  drawn = wanted;
}

function actions(job, at) {
  const paused = job.status === "paused", running = RUNNING.includes(job.status) || paused;
  const failed = (error) => say(error.message, true);
  const order = (text, name) => button(text, async () => { await post(`${at}/${name}`); await look(); });
  const made = [];
  if (job.fine_tuned_model) {
    const tried = `./#model=${encodeURIComponent(job.fine_tuned_model)}`;
    made.push(element("a", { className: "button main", href: tried, textContent: "Try the student" }));
  }
  if (running) made.push(order(paused ? "Resume" : "Pause", paused ? "resume" : "pause"), order("Cancel", "cancel"));
  if (job.status !== "cancelled" && !["validating_files", "queued"].includes(job.status)) {
    made.push(link("Report", `${at}/report`, `${title(job)}.html`, failed));
  }
  if (job.status !== "cancelled") made.push(link("Log", `${at}/log`, `${title(job)}.log`, failed));
  for (const file of job.result_files) made.push(button("Metrics as CSV", () => download(`v1/files/${file}/content`, `${title(job)}.csv`)));
  if (!running) made.push(button("Delete", () => discard(job, at)));
  $("actions").replaceChildren(...made);
}

async function discard(job, at) {
  const lost = job.fine_tuned_model ? "Its student, log and samples are deleted, too." : "Its log and samples are deleted, too.";
  if (!confirm(`Delete the job ${title(job)}? ${lost}`)) return;
  await remove(at);
  say(`Deleted ${title(job)}.`);
  await look();
}

started(select);
watch(look);
