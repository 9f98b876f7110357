// JSON schemas of the OpenAPI description as short text.
export function resolve(api, schema) {
  if (!schema?.$ref) return schema ?? {};
  return schema.$ref.slice(2).split("/").reduce((found, name) => found?.[name.replaceAll("~1", "/").replaceAll("~0", "~")], api) ?? {};
}

export function kind(api, schema = {}) {
  if (schema.$ref) {
    const found = resolve(api, schema);
    return found.enum || !found.properties ? kind(api, found) : (found.title ?? "object");
  }
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(" or ");
  const several = schema.anyOf ?? schema.oneOf;
  if (several) return [...new Set(several.map((each) => kind(api, each)))].join(" or ");
  if (schema.type === "array") return `list of ${kind(api, schema.items)}`;
  const low = schema.minimum ?? schema.minLength, high = schema.maximum ?? schema.maxLength;
  const range = low !== undefined && high !== undefined ? ` ${low} to ${high}` : low !== undefined ? ` from ${low}` : high !== undefined ? ` up to ${high}` : "";
  const characters = range && schema.type === "string" ? " characters" : "";
  return `${schema.type ?? "any"}${range}${characters}${schema.default === undefined || schema.default === null ? "" : `, default ${JSON.stringify(schema.default)}`}`;
}

// The fields of an object, or of the items of a list.
export function properties(api, schema) {
  const found = resolve(api, schema);
  if (found.type === "array") return properties(api, found.items);
  const required = new Set(found.required ?? []);
  return Object.entries(found.properties ?? {}).map(([name, field]) => ({ name, required: required.has(name), schema: field }));
}
