// The form of a new job: its choices are those of the server.
import { get, post, upload } from "./api.js";
import { $, allow, changed, choose, count, say } from "./element.js";

let choices = null;

const preset = () => choices?.presets.find(({ name }) => name === $("preset").value);

// Ask for the choices until they are there, for example after the key was entered.
export async function offer() {
  if (choices) return;
  choices = await get("v1/fine_tuning/choices");
  $("form").classList.toggle("closed", !choices.teachers.length);  // nothing but the reason
  choose("model", choices.teachers.map(({ name, available }) => [name, available ? name : `${name} (not on this server)`]));
  suggest();
}

function suggest() {  // the presets of the teacher first
  const teacher = $("model").value, fits = ({ teachers }) => teachers.includes(teacher);
  const sorted = [...choices.presets].sort((a, b) => fits(b) - fits(a));
  $("preset").value = "";
  choose("preset", sorted.map((each) => [each.name, fits(each) ? `${each.name} (for ${teacher})` : each.name]));
  const standard = sorted.find(({ name }) => name === teacher);  // the preset of the same name
  if (standard) $("preset").value = standard.name;
  describe();
}

function describe() {
  const recipe = preset(), limit = choices.max_images;
  $("recipe").textContent = recipe ? `${recipe.description.replaceAll("`", "")}.` : "";
  $("budget").placeholder = recipe ? `${recipe.images.toLocaleString()}, as the preset` : "";
  $("batch").placeholder = recipe ? `${recipe.batch}, as the preset` : "";
  if (limit) $("budget").max = limit;
  choose("method", [["", `${recipe?.method ?? "fgm"}, as the preset`], ...choices.methods.map(({ name }) => [name, name])]);
  const method = $("method").value || recipe?.method;
  $("objective").textContent = `${choices.methods.find(({ name }) => name === method)?.description ?? ""}.`;
  warn();
}

function warn() {
  const recipe = preset(), images = Number($("budget").value) || recipe?.images, batch = Number($("batch").value) || recipe?.batch;
  const noise = recipe && images < choices.min_steps * batch;
  $("noise").hidden = !noise;
  if (noise) {
    $("noise").textContent = `A budget of ${count(images, "image")} is ${count(Math.max(1, Math.floor(images / batch)), "step")} of ${batch}. `
      + `A student of fewer than ${choices.min_steps} steps usually draws blur or noise: train on `
      + `${count(choices.min_steps * batch, "image")} or more, or lower the batch under More.`;
  }
  allow("start", reason());
}

function reason() {
  if (!choices) return "The choices of the server are not known yet.";
  const teacher = choices.teachers.find(({ name }) => name === $("model").value);
  if (!teacher) return "This server offers no teacher, so no job can start; its operator names teachers in the setting jobs.teachers.";
  if (!teacher.available) return `The teacher ${teacher.name} is not on this server; its operator fetches it.`;
  if (!$("file").files.length && !$("prompts").value.trim()) return "Type some prompts, or choose a file of prompts.";
  const wrong = [...$("form").elements].find((field) => !field.disabled && !field.validity.valid);
  return wrong ? `${wrong.labels[0].firstChild.textContent.trim()}: ${wrong.title || wrong.validationMessage}.` : "";
}

// Call `select` with the id of each job that is started.
export function started(select) {
  $("form").noValidate = true;  // the reason is written below the button
  $("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    allow("start", reason());
    if (reason()) return;
    const file = $("file").files[0] ?? new File([`${$("prompts").value.trim()}\n`], "prompts.txt", { type: "text/plain" });
    const given = (id) => $(id).value || undefined, number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
    try {
      say("Uploading the prompts …");
      const uploaded = await upload(file, "fine-tune");
      const job = await post("v1/fine_tuning/jobs", {
        model: $("model").value, training_file: uploaded.id, suffix: given("suffix"), seed: number("seed"),
        distillation: { preset: given("preset"), method: given("method"), networks: given("networks"),
          images: number("budget"), batch: number("batch") },
      });
      say("Started.");
      await select(job.id);
    } catch (error) {
      say(error.message, true);
    }
  });
  changed("model", suggest);
  for (const id of ["preset", "method"]) changed(id, describe);
  for (const id of ["budget", "batch"]) changed(id, warn);
  for (const id of ["prompts", "file", "suffix", "seed"]) changed(id, () => allow("start", reason()));
  allow("start", reason());
}
