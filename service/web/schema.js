// JSON schemas of the OpenAPI description as short text.
export function resolve(api, schema) {
  if (!schema?.$ref) return schema ?? {};
  return schema.$ref.slice(2).split("/").reduce((found, name) => found?.[name.replaceAll("~1", "/").replaceAll("~0", "~")], api) ?? {};
}

// `nullable` is false for a field that may be left out instead, which says the same.
export function kind(api, schema = {}, nullable = true) {
  if (schema.$ref) {
    const found = resolve(api, schema);
    return found.enum || !found.properties ? kind(api, found) : (found.title ?? "object");
  }
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(" or ");
  const several = schema.anyOf ?? schema.oneOf;
  if (several) {
    const kinds = [...new Set(several.map((each) => kind(api, each)))];
    return (nullable || kinds.length === 1 ? kinds : kinds.filter((each) => each !== "null")).join(" or ");
  }
  if (schema.type === "array") return `list of ${kind(api, schema.items)}`;
  const low = schema.minimum ?? schema.minLength, high = schema.maximum ?? schema.maxLength;
  const range = low !== undefined && high !== undefined ? ` ${low} to ${high}` : low !== undefined ? ` from ${low}` : high !== undefined ? ` up to ${high}` : "";
  const characters = range && schema.type === "string" ? " characters" : "";
  return `${schema.type ?? "any"}${range}${characters}${schema.default === undefined || schema.default === null ? "" : `, default ${JSON.stringify(schema.default)}`}`;
}

// What a field means: its own description, else that of a kind of value that it takes.
export function meaning(api, schema = {}) {
  if (schema.description) return schema.description;
  const parts = schema.anyOf ?? schema.oneOf ?? [];
  return parts.find((each) => each.description)?.description ?? (schema.$ref ? resolve(api, schema).description ?? "" : "");
}

// The fields of an object, or of the items of a list.
export function properties(api, schema) {
  const found = resolve(api, schema);
  if (found.type === "array") return properties(api, found.items);
  const required = new Set(found.required ?? []);
  return Object.entries(found.properties ?? {}).map(([name, field]) => ({ name, required: required.has(name), schema: field }));
}

// The objects inside a schema that have fields, by title, outer ones first.
export function objects(api, schema, found = new Map()) {
  for (const { schema: field } of properties(api, schema)) {
    for (const each of [field, ...(field.anyOf ?? []), ...(field.oneOf ?? [])].map((part) => part.items ?? part)) {
      const within = resolve(api, each);
      if (!each.$ref || !within.properties || found.has(within.title)) continue;
      found.set(within.title, each);
      objects(api, each, found);
    }
  }
  return found;
}

// A smallest value of a schema: the required fields, with the examples of the description where it has some.
export function sample(api, schema) {
  const found = resolve(api, schema);
  if (found.properties) {
    return Object.fromEntries(properties(api, found).filter(({ required }) => required).map((each) => [each.name, sample(api, each.schema)]));
  }
  return found.examples?.[0] ?? found.default ?? found.const ?? found.enum?.[0] ?? (found.type === "string" ? "…" : found.minimum ?? 1);
}
