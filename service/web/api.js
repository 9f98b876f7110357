// Calls of the server. The API key of the tab goes into headers, never into an address.
import { $, element } from "./element.js";

export class CallError extends Error {
  // `status` is 0 if the server did not answer; `retryAfter` is in seconds, if the server named it.
  constructor(message, status, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

export const key = () => $("key").value;

export function headers(more = {}) {
  return { ...more, ...(key() ? { authorization: `Bearer ${key()}` } : {}) };
}

export function refused(status, message, retryAfter = null) {
  if (status !== 401) return new CallError(sentence(message), status, retryAfter);
  $("access").open = true;
  const text = key() ? "This server does not know the API key; check it at the top of the page."
    : "This server asks for an API key; enter it at the top of the page.";
  return new CallError(text, status);
}

export function sentence(message) {
  const text = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?…]$/.test(text) ? text : `${text}.`;
}

// The server's answer, as fetch returns it. Raises CallError if there is none, or if it is an error.
export async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new CallError("The server does not answer.", 0);
  }
  if (answer.ok) return answer;
  const content = await answer.json().catch(() => null);  // a proxy answers with pages of its own
  const message = content?.error?.message ?? `The server answers with status ${answer.status}`;
  throw refused(answer.status, message, Number(answer.headers.get("retry-after")) || null);
}

export const get = async (path) => (await call(path)).json();
export const remove = async (path) => (await call(path, { method: "DELETE" })).json();

export function send(path, body, signal) {
  return call(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal });
}

export const post = async (path, body = {}) => (await send(path, body)).json();

export async function upload(file, purpose) {
  const form = new FormData();
  form.append("purpose", purpose);
  form.append("file", file);
  return (await call("v1/files", { method: "POST", body: form })).json();
}

export function save(blob, name) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

export async function download(path, name) {
  save(await (await call(path)).blob(), name);
}

// A link to something of the server. With a key, which addresses do not hold, it is fetched and saved instead.
export function link(text, path, name, onError) {
  const made = element("a", { className: "button", href: path, target: "_blank", rel: "noopener", textContent: text });
  made.addEventListener("click", (event) => {
    if (!key()) return;
    event.preventDefault();
    download(path, name).catch(onError);
  });
  return made;
}
