// The API reference, from the server's OpenAPI description.
import { get } from "./api.js";
import { $, element, say } from "./element.js";
import { kind, meaning, objects, properties, sample } from "./schema.js";

const VERBS = ["get", "post", "delete"];
const FIRST = ["images", "models", "files", "batches", "fine-tuning"];  // groups that most readers look for

// Names with their types and meanings, in the order of the list.
function list(rows) {
  return element("dl", { className: "fields" }, ...rows.map(({ name, note, type, meaning }) => element("div", {},
    element("dt", {}, element("code", { textContent: name }), note ? ` ${note}` : "", element("span", { className: "quiet", textContent: type })),
    ...(meaning ? [element("dd", {}, ...prose(meaning))] : []))));
}

// The fields of a request or an answer, then those of the objects in them, each object once.
function fields(api, title, schema) {
  const found = [];
  for (const [name, each] of [[title, schema], ...objects(api, schema)]) {
    const rows = properties(api, each).map(({ name: field, required, schema: its }) =>
      ({ name: field, note: required ? "required" : "", type: kind(api, its, required), meaning: meaning(api, its) }));
    if (rows.length) found.push(element("h3", { textContent: name }), list(rows));
  }
  return found;
}

function example(api, verb, path, operation) {
  const url = new URL(path.slice(1), document.baseURI).href;
  const method = { get: "", post: " -X POST", delete: " -X DELETE" }[verb];
  const sends = operation.requestBody?.content ?? {}, json = sends["application/json"];
  const body = json ? ` --json '${JSON.stringify(sample(api, json.schema))}'`
    : "multipart/form-data" in sends ? " -F purpose=batch -F file=@lines.jsonl" : method;
  return `curl '${url}' -H "Authorization: Bearer $API_KEY"${body}`;
}

// Text with code between backticks.
function prose(text) {
  return text.split("`").map((part, i) => (i % 2 ? element("code", { textContent: part }) : part));
}

function paragraphs(text) {
  return text.trim().split(/\n\s*\n/).filter(Boolean).map((each) => element("p", {}, ...prose(each)));
}

const brief = ({ description = "", summary = "" }) => (description || summary).split(/(?<=\.)\s/)[0];

function operation(api, verb, path, described) {
  const inside = element("div");
  const made = element("details", { id: described.operationId }, element("summary", {},
    element("span", { className: "verb", textContent: verb.toUpperCase() }), `${path} `, element("span", { className: "summary" }, ...prose(brief(described)))), inside);
  made.addEventListener("toggle", () => {
    if (!made.open || inside.children.length) return;
    inside.append(...paragraphs(described.description ?? described.summary ?? ""));
    const parameters = (described.parameters ?? []).filter((each) => !/key$/i.test(each.name) || each.in !== "header");
    if (parameters.length) {
      const rows = parameters.map((each) => ({ name: each.name, note: `${each.required ? "required, " : ""}in the ${each.in}`,
        type: kind(api, each.schema, each.required), meaning: each.description ?? meaning(api, each.schema) }));
      inside.append(element("h3", { textContent: "Parameters" }), list(rows));
    }
    for (const [type, { schema }] of Object.entries(described.requestBody?.content ?? {})) inside.append(...fields(api, `Request, ${type}`, schema));
    for (const [status, answer] of Object.entries(described.responses ?? {})) {
      for (const [type, { schema }] of Object.entries(answer.content ?? {})) {
        const title = `Response ${status}, ${type}`, found = schema ? fields(api, title, schema) : [];
        if (/^2/.test(status)) inside.append(...(found.length ? found : [element("h3", { textContent: title })]));
      }
    }
    inside.append(element("h3", { textContent: "Example" }), element("pre", { textContent: example(api, verb, path, described) }));
  });
  return made;
}

async function show() {
  const [api, version] = await Promise.all([get("openapi.json"), get("version")]);
  $("version").textContent = version.version;
  $("base").textContent = new URL("v1", document.baseURI).href;
  const groups = new Map();
  for (const [path, verbs] of Object.entries(api.paths)) {
    for (const verb of VERBS.filter((each) => each in verbs)) {
      const group = verbs[verb].tags?.[0] ?? "other";
      groups.set(group, [...(groups.get(group) ?? []), operation(api, verb, path, verbs[verb])]);
    }
  }
  const place = (name) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length);
  const sorted = [...groups].sort(([a], [b]) => place(a) - place(b));
  $("reference").replaceChildren(...sorted.flatMap(([name, operations]) =>
    [element("h2", { textContent: name }), element("div", { className: "operations" }, ...operations)]));
  const wanted = document.getElementById(location.hash.slice(1));
  if (wanted?.tagName === "DETAILS") wanted.open = true;
}

show().catch((error) => say(error.message, true));
