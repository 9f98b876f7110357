// The API reference, from the server's OpenAPI description.
import { get } from "./api.js";
import { $, element, say } from "./element.js";
import { kind, properties, resolve } from "./schema.js";

const VERBS = ["get", "post", "delete"];
const FIRST = ["images", "models", "files", "batches", "fine-tuning"];  // groups that most readers look for

// `title` is that of the table for screen readers: unique on the page.
function table(title, names, rows) {
  const cells = (tag, texts) => element("tr", {}, ...texts.map((text) => element(tag, tag === "th" ? { scope: "col" } : {}, ...prose(text))));
  const made = element("table", {}, element("thead", {}, cells("th", names)), element("tbody", {}, ...rows.map((row) => cells("td", row))));
  const scroll = element("div", { className: "scroll", tabIndex: 0, role: "region" }, made);
  scroll.setAttribute("aria-label", title);
  return scroll;
}

function fields(api, place, title, schema) {
  const rows = properties(api, schema).map(({ name, required, schema: field }) =>
    [required ? `${name} (required)` : name, kind(api, field), field.description ?? resolve(api, field).description ?? ""]);
  return rows.length ? [element("h3", { textContent: title }), table(`${place}: ${title}`, ["field", "type", "meaning"], rows)] : [];
}

function example(verb, path, operation) {
  const url = new URL(path.slice(1), document.baseURI).href;
  const method = { get: "", post: " -X POST", delete: " -X DELETE" }[verb];
  const sends = operation.requestBody?.content ?? {};
  const body = "application/json" in sends ? " --json '{…}'" : "multipart/form-data" in sends ? " -F purpose=batch -F file=@lines.jsonl" : method;
  return `curl '${url}' -H "Authorization: Bearer $API_KEY"${body}`;
}

// Text with code between backticks.
function prose(text) {
  return text.split("`").map((part, i) => (i % 2 ? element("code", { textContent: part }) : part));
}

function paragraphs(text) {
  return text.trim().split(/\n\s*\n/).filter(Boolean).map((each) => element("p", {}, ...prose(each)));
}

const brief = ({ description = "", summary = "" }) => (description || summary).split(/(?<=[.:])\s/)[0];

function operation(api, verb, path, described) {
  const inside = element("div"), place = `${verb.toUpperCase()} ${path}`;
  const made = element("details", { id: described.operationId }, element("summary", {},
    element("span", { className: "verb", textContent: verb.toUpperCase() }), `${path} `, element("span", { className: "summary" }, ...prose(brief(described)))), inside);
  made.addEventListener("toggle", () => {
    if (!made.open || inside.children.length) return;
    inside.append(...paragraphs(described.description ?? described.summary ?? ""));
    const parameters = (described.parameters ?? []).filter((each) => !/key$/i.test(each.name) || each.in !== "header");
    if (parameters.length) {
      const rows = parameters.map((each) => [each.required ? `${each.name} (required)` : each.name, each.in, kind(api, each.schema), each.description ?? ""]);
      inside.append(element("h3", { textContent: "Parameters" }), table(`${place}: parameters`, ["name", "in", "type", "meaning"], rows));
    }
    for (const [type, { schema }] of Object.entries(described.requestBody?.content ?? {})) inside.append(...fields(api, place, `Request, ${type}`, schema));
    for (const [status, answer] of Object.entries(described.responses ?? {})) {
      for (const [type, { schema }] of Object.entries(answer.content ?? {})) {
        if (schema && /^2/.test(status)) inside.append(...fields(api, place, `Response ${status}, ${type}`, schema));
      }
    }
    inside.append(element("h3", { textContent: "Example" }), element("pre", { textContent: example(verb, path, described) }));
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
