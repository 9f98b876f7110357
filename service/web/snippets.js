// A request as code.
const url = (path) => new URL(path, document.baseURI).href;

export function curl(body) {
  const quoted = JSON.stringify(body).replaceAll("'", `'\\''`);
  return `curl ${url("v1/images/generations")} -H "Authorization: Bearer $API_KEY" --json '${quoted}'`;
}

export function python({ prompt, model, n, size, output_format, ...extra }) {
  return [
    "import base64, os, pathlib",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(url("v1"))}, api_key=os.environ.get("API_KEY", "none"))`,
    "answer = client.images.generate(",
    `    prompt=${JSON.stringify(prompt)}, model=${JSON.stringify(model)}, n=${n}, size=${JSON.stringify(size)},`,
    `    output_format=${JSON.stringify(output_format)}, extra_body=${JSON.stringify(extra)},`,
    ")",
    "for image in answer.data:",
    `    pathlib.Path(f"{image.seed}.${output_format}").write_bytes(base64.b64decode(image.b64_json))`,
  ].join("\n");
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // pages without https have no clipboard of their own
    const area = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}
