// Elements of the page.
export const $ = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// A button that calls `act`; an error becomes the page's status.
export function button(text, act, properties = {}) {
  const made = element("button", { type: "button", textContent: text, ...properties });
  made.addEventListener("click", async () => {
    try { await act(); } catch (error) { say(error.message, true); }
  });
  return made;
}

export function say(text, bad = false) {
  $("status").textContent = text;
  $("status").className = bad ? "bad" : "";
}

// A button that cannot be used stays reachable by keyboard, and its reason is read with it.
export function allow(id, reason) {
  $(id).setAttribute("aria-disabled", String(Boolean(reason)));
  $("why").textContent = reason || "";
  $("why").hidden = !reason;
}

// Call `act` whenever the field is changed, character by character where it is typed.
export function changed(id, act) {
  $(id).addEventListener($(id).tagName === "SELECT" || $(id).type === "file" ? "change" : "input", act);
}

export function choose(id, choices) {  // keeps what is chosen, if it is still among them
  const before = $(id).value;
  $(id).replaceChildren(...choices.map(([value, text]) => element("option", { value, textContent: text })));
  $(id).value = choices.some(([value]) => String(value) === before) ? before : choices[0]?.[0] ?? "";
}

export function when(seconds) {
  return new Date(1000 * seconds).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

export function count(number, noun) {
  return `${number.toLocaleString()} ${noun}${number === 1 ? "" : "s"}`;
}

export function pill(status) {
  return element("span", { className: `pill ${status}`, textContent: status.replaceAll("_", " ") });
}
