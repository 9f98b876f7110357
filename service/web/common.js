"use strict";
// What the pages share: elements, calls with the tab's API key, the status line, light and dark.
const $ = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function headers(more = {}) {
  const key = $("key").value;
  return { ...more, ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").className = bad ? "bad" : "";
}

async function read(answer) {
  const content = await answer.json();
  if (answer.ok) return content;
  if (answer.status === 401) $("access").open = true;
  throw new Error(content.error.message);
}

async function get(path) {
  return read(await fetch(path, { headers: headers() }));
}

async function post(path, body = {}) {
  const options = { method: "POST", headers: headers({ "content-type": "application/json" }), body: JSON.stringify(body) };
  return read(await fetch(path, options));
}

async function upload(file, purpose) {
  const form = new FormData();
  form.append("purpose", purpose);
  form.append("file", file);
  return read(await fetch("v1/files", { method: "POST", headers: headers(), body: form }));
}

async function download(id, name) {
  const answer = await fetch(`v1/files/${id}/content`, { headers: headers() });
  if (!answer.ok) await read(answer);
  const link = element("a", { href: URL.createObjectURL(await answer.blob()), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function when(seconds) {
  return new Date(1000 * seconds).toLocaleString([], { dateStyle: "short", timeStyle: "medium" });
}

function pill(status) {
  return element("span", { className: `pill ${status}`, textContent: status.replaceAll("_", " ") });
}

// Calls `look` now and again, while the page is seen; one look at a time.
function watch(look, pause = 1500) {
  async function turn() {
    if (!document.hidden) {
      try { await look(); } catch (error) { say(error.message, true); }
    }
    setTimeout(turn, pause);
  }
  turn();
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = name === "dark" ? "Light" : "Dark";
  localStorage.setItem("theme", name);
}

const page = ({ pathname }) => pathname.replace(/\/$/, "");  // served with and without a slash at its end
for (const link of document.querySelectorAll("nav a")) {
  if (page(link) === page(location)) link.setAttribute("aria-current", "page");
}
$("theme").onclick = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
theme(localStorage.getItem("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
$("key").value = sessionStorage.getItem("key") || "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  $("access").open = false;
});
