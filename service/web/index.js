"use strict";
const PAUSE = 120, KEPT = 24;
const fields = ["prompt", "model", "n", "size", "format", "adapter", "scale", "seed"];
let timer = 0, running = null, history = [], known = [];  // models of the server
let socket = null, opened = null, last = 0;
const asking = new Map();  // what the socket has not answered, by id

function body() {
  return {
    prompt: $("prompt").value, model: $("model").value, n: Number($("n").value), size: $("size").value,
    output_format: $("format").value, seed: Number($("seed").value),
    ...($("adapter").value ? { lora: { name: $("adapter").value, scale: Number($("scale").value) } } : {}),
  };
}

// Fill the fields in with what was asked once, as far as the server still has it.
function refill(asked) {
  $("model").value = asked.model;
  offer();
  const { lora, ...rest } = asked;
  for (const [name, value] of Object.entries(rest)) $(name === "output_format" ? "format" : name).value = value;
  $("adapter").value = lora?.name || "";
  $("scale").value = lora?.scale ?? 1;
}

function open() {  // the realtime session, opened anew where it is closed; rejects where there is none to be had
  if (socket && socket.readyState <= WebSocket.OPEN) return opened;
  const address = new URL("v1/realtime/images", location.href);
  address.protocol = address.protocol.replace("http", "ws");
  const mine = socket = new WebSocket(address);
  opened = new Promise((resolve, reject) => {
    mine.onopen = () => {
      const key = $("key").value;
      if (key) mine.send(JSON.stringify({ type: "session.start", api_key: key }));
      resolve(mine);
    };
    mine.onclose = () => {
      reject(new Error("There is no realtime session."));
      for (const each of asking.values()) if (each.socket === mine) each.reject(new Error("The session has ended."));
    };
  });
  mine.onmessage = (event) => {
    const message = JSON.parse(event.data);
    const errors = message.type === "error";
    if (errors && message.status === 401) $("access").open = true;
    if (errors && message.id === null) say(message.error.message, true);
    const each = asking.get(message.id);
    if (!each) return;
    if (errors) each.reject(new Error(message.error.message));
    else each.resolve(message.type === "images.completed" ? message : null);
  };
  return opened;
}

async function typed(asked) {  // null when a later prompt has taken its place
  const mine = await open(), id = String(++last);
  try {
    const answered = new Promise((resolve, reject) => asking.set(id, { resolve, reject, socket: mine }));
    mine.send(JSON.stringify({ type: "images.generate", id, ...asked }));
    const content = await answered;
    return content && { content, stages: Object.entries(content.seconds).map(([name, seconds]) => [name, 1000 * seconds]) };
  } finally {
    asking.delete(id);
  }
}

async function posted(asked, signal) {
  const answer = await fetch("v1/images/generations", { method: "POST", headers: headers({ "content-type": "application/json" }), body: JSON.stringify(asked), signal });
  const content = await read(answer);
  const stages = (answer.headers.get("server-timing") || "").split(", ").filter(Boolean).map((part) => {
    const [name, duration] = part.split(";dur=");
    return [name, Number(duration)];
  });
  return { content, stages };
}

async function draw() {
  clearTimeout(timer);
  if (!$("prompt").value.trim() || !$("form").checkValidity()) return;
  running?.abort();  // the server drops what nobody waits for: the latest prompt wins
  const mine = running = new AbortController();
  const asked = body(), began = performance.now();
  $("images").classList.add("waiting");
  try {
    const realtime = await open().then(() => true, () => false);  // proxies may know no sockets: then by POST
    if (running !== mine) return;
    const answer = await (realtime ? typed(asked) : posted(asked, mine.signal));
    if (!answer) return;
    const made = { asked, ...answer, total: performance.now() - began };
    if (!running) return;  // an older image is being looked at
    show(made);
    if (running === mine) remember(made);
  } catch (error) {
    if (error.name !== "AbortError" && running === mine) say(error.message, true);
  } finally {
    if (running === mine) $("images").classList.remove("waiting");
  }
}

function source(made, item) {
  return `data:image/${made.content.output_format};base64,${item.b64_json}`;
}

function show(made) {
  const [width, height] = made.content.size.split("x").map(Number);
  const figures = made.content.data.map((item) => {
    const image = element("img", { src: source(made, item), alt: `${made.asked.prompt} (seed ${item.seed})`, width, height });
    if (width < 256) image.className = "small";
    image.style.height = "auto";
    const save = element("a", { href: image.src, download: `${item.seed}.${made.content.output_format}`, textContent: "Save" });
    return element("figure", {}, image, element("figcaption", {}, element("span", { textContent: `seed ${item.seed}` }), save));
  });
  $("images").className = figures.length === 1 ? "one" : "";
  $("images").replaceChildren(...figures);
  const known = made.stages.reduce((sum, stage) => sum + stage[1], 0);
  const stages = [...made.stages, ["network and page", Math.max(0, made.total - known)]];
  $("stages").hidden = false;
  $("stages").replaceChildren(...stages.map(([name, ms]) => {
    const bar = element("div", { className: name });
    bar.style.flexGrow = ms;
    return bar;
  }));
  $("legend").replaceChildren(...stages.map(([name, ms]) =>
    element("li", { className: name, textContent: `${name} ${ms.toFixed(1)} ms` })));
  const count = figures.length === 1 ? "1 image" : `${figures.length} images`;
  say([`${count} of ${made.content.size} in ${Math.round(made.total)} ms.`, ...(made.content.warnings || [])].join(" "));
}

function remember(made) {
  history = [made, ...history].slice(0, KEPT);
  $("past").hidden = false;
  $("history").replaceChildren(...history.map((each) => {
    const image = element("img", { src: source(each, each.content.data[0]), alt: "" });
    const label = `${each.asked.prompt}, seed ${each.asked.seed}`;
    const button = element("button", { type: "button", title: label }, image);
    button.setAttribute("aria-label", `Show again: ${label}`);
    button.onclick = () => {
      running?.abort();
      running = null;
      refill(each.asked);
      show(each);
    };
    return element("li", {}, button);
  }));
}

function curl() {
  const quoted = JSON.stringify(body()).replaceAll("'", `'\\''`);
  return `curl ${new URL("v1/images/generations", location.href)} -H "Authorization: Bearer $API_KEY" --json '${quoted}'`;
}

function python() {
  const { prompt, model, n, size, output_format, seed, lora } = body();
  const extra = lora ? `{"seed": ${seed}, "lora": ${JSON.stringify(lora)}}` : `{"seed": ${seed}}`;
  return [
    "import base64, os, pathlib",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(new URL("v1", location.href).href)}, api_key=os.environ.get("API_KEY", "none"))`,
    "answer = client.images.generate(",
    `    prompt=${JSON.stringify(prompt)}, model=${JSON.stringify(model)}, n=${n}, size=${JSON.stringify(size)},`,
    `    output_format=${JSON.stringify(output_format)}, extra_body=${extra},`,
    ")",
    "for image in answer.data:",
    `    pathlib.Path(f"{image.seed}.${output_format}").write_bytes(base64.b64decode(image.b64_json))`,
  ].join("\n");
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // pages without https have no clipboard of their own
    const area = element("textarea", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  say("Copied.");
}

function choose(id, choices) {  // keeps what is chosen, where it is still among them
  const before = $(id).value;
  $(id).replaceChildren(...choices.map(([value, text]) => element("option", { value, textContent: text })));
  $(id).value = choices.some(([value]) => value === before) ? before : choices[0][0];
}

function offer() {  // sizes and adapters of the model
  const model = known.find((each) => each.id === $("model").value) ?? { sizes: [], adapters: [] };
  choose("size", ["auto", ...model.sizes].map((size) => [size, size]));
  choose("adapter", [["", "none"], ...model.adapters.map((name) => [name, name])]);
  $("adapters").hidden = $("scale").disabled = !model.adapters.length;
}

async function models() {  // jobs and administrators load and unload them meanwhile
  try {
    const listed = (await get("v1/models")).data;
    if (JSON.stringify(listed) === JSON.stringify(known)) return;  // a list that is open stays as it is
    const wanted = known.length ? null : new URLSearchParams(location.search).get("model");  // as the Jobs page links
    known = listed;
    choose("model", known.map((model) => [model.id, model.id]));
    if (known.some((model) => model.id === wanted)) $("model").value = wanted;
    offer();
  } catch (error) {
    say(error.message, true);
  }
}

function soon() {
  clearTimeout(timer);
  if ($("live").checked) timer = setTimeout(draw, PAUSE);
}

$("model").addEventListener("input", offer);
for (const event of ["focus", "pointerdown"]) $("model").addEventListener(event, models);
document.addEventListener("visibilitychange", () => { if (!document.hidden) models(); });
for (const field of fields) $(field).addEventListener("input", soon);
$("form").addEventListener("submit", (event) => { event.preventDefault(); draw(); });
$("dice").onclick = () => { $("seed").value = Math.floor(Math.random() * 1e9); draw(); };
$("curl").onclick = () => copy(curl());
$("python").onclick = () => copy(python());
$("key").addEventListener("change", () => { socket?.close(); models(); });
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); draw(); }
  if (event.altKey && event.code === "KeyS") { event.preventDefault(); $("dice").click(); }
});
$("options").open = !matchMedia("(max-width: 46rem)").matches;  // on a phone the images come right below the prompt
models();
