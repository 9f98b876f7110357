// The fields of the form as a request, and a request in the fields and in the address.
import { $, choose } from "./element.js";

export const FIELDS = ["model", "n", "size", "output_format", "adapter", "scale", "steps", "seed"];
let models = [];  // of the server

export const model = (id = $("model").value) => models.find((each) => each.id === id);
export const known = () => models;

export function body() {
  const number = (id) => Number($(id).value);
  return {
    prompt: $("prompt").value, model: $("model").value, n: number("n"), size: $("size").value,
    output_format: $("output_format").value, seed: number("seed"),
    ...($("adapter").value ? { lora: { name: $("adapter").value, scale: number("scale") } } : {}),
    ...(number("steps") > 1 ? { steps: number("steps") } : {}),
  };
}

// Fill the fields in with a request. Missing fields stay as they are; returns what the request names and the server lacks.
export function refill({ lora, steps, ...rest }) {
  const lacking = [];
  if (rest.model && model(rest.model)) $("model").value = rest.model;
  else if (rest.model) lacking.push(`model ${rest.model}`);
  offer();
  for (const [name, value] of Object.entries(rest)) {
    const field = $(name);
    if (name === "model" || !field) continue;
    if (field.options && ![...field.options].some((option) => option.value === value)) lacking.push(`${name} ${value}`);
    else field.value = value;
  }
  $("adapter").value = model()?.adapters.includes(lora?.name) ? lora.name : "";
  $("scale").value = lora?.scale ?? 1;
  if (lora && !$("adapter").value) lacking.push(`adapter ${lora.name}`);
  $("steps").value = Math.min(steps ?? 1, model()?.max_steps ?? 1);
  return lacking;
}

// Offer what the server has now; returns whether that has changed.
export function learn(listed) {
  if (JSON.stringify(listed) === JSON.stringify(models)) return false;  // a list that is open stays as it is
  models = listed;
  choose("model", models.map(({ id }) => [id, id]));
  offer();
  return true;
}

// Sizes, adapters and steps of the chosen model, and the models to compare it with, its teacher first.
export function offer() {
  const { id, sizes = [], adapters = [], max_steps = 1, owned_by } = model() ?? {};
  choose("size", ["auto", ...sizes].map((size) => [size, size]));
  choose("adapter", [["", "none"], ...adapters.map((name) => [name, name])]);
  $("adapters").hidden = $("scale").disabled = !adapters.length;
  $("steps").max = max_steps;
  $("several").hidden = $("steps").disabled = max_steps === 1;
  if (Number($("steps").value) > max_steps) $("steps").value = max_steps;
  const others = models.filter((each) => each.id !== id).sort((a, b) => (b.id === owned_by) - (a.id === owned_by));
  $("compared").hidden = !others.length;
  choose("beside", [["", "nothing"], ...others.map((each) => [each.id, each.id === owned_by ? `${each.id} (teacher)` : each.id])]);
}

// Only what follows the # of an address: no server and no proxy sees it.
export function address({ prompt, seed, model, n, size, steps, lora }) {
  const more = {  // what is not as in a new form
    ...(n > 1 ? { n } : {}), ...(size === "auto" ? {} : { size }), ...(steps ? { steps } : {}),
    ...(lora ? { adapter: lora.name, scale: lora.scale } : {}),
  };
  return new URL(`#${new URLSearchParams({ prompt, seed, model, ...more })}`, location.href).href;
}

export function addressed() {
  const given = new URLSearchParams(location.hash.slice(1));
  const texts = ["prompt", "model", "size"].filter((name) => given.has(name)).map((name) => [name, given.get(name)]);
  const whole = ["seed", "n", "steps"].map((name) => [name, Number(given.get(name))])
    .filter(([name, number]) => given.has(name) && Number.isSafeInteger(number) && number >= 0);
  const lora = given.has("adapter") ? { lora: { name: given.get("adapter"), scale: Number(given.get("scale")) || 0 } } : {};
  return { ...Object.fromEntries([...texts, ...whole]), ...lora };
}
