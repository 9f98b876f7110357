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

// Fill the fields in with a request, as far as the server still has what it names. Missing fields stay as they are.
export function refill({ lora, steps, ...rest }) {
  if (rest.model && model(rest.model)) $("model").value = rest.model;
  offer();
  for (const [name, value] of Object.entries(rest)) {
    const field = $(name);
    if (name === "model" || !field) continue;
    if (field.options && ![...field.options].some((option) => option.value === value)) continue;
    field.value = value;
  }
  $("adapter").value = model()?.adapters.includes(lora?.name) ? lora.name : "";
  $("scale").value = lora?.scale ?? 1;
  $("steps").value = Math.min(steps ?? 1, model()?.max_steps ?? 1);
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
export function address({ prompt, seed, model }) {
  const parts = new URLSearchParams({ prompt, seed, model });
  return new URL(`#${parts}`, location.href).href;
}

export function addressed() {
  const given = new URLSearchParams(location.hash.slice(1));
  const seed = Number(given.get("seed"));
  return {
    ...(given.has("prompt") ? { prompt: given.get("prompt") } : {}), ...(given.has("model") ? { model: given.get("model") } : {}),
    ...(given.has("seed") && Number.isSafeInteger(seed) && seed >= 0 ? { seed } : {}),
  };
}
