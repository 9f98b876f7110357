// Small pictures of a batch's images. The output file is read piece by piece, because it may have 50 000 lines.
import { call } from "./api.js";
import { $, element, say } from "./element.js";

const PIECE = 1 << 16;  // bytes of the output file, about a hundred images
let reading = null;

export async function open(title, file) {
  reading = { path: `v1/files/${file}/content`, at: 0, rest: "", decoder: new TextDecoder() };
  $("gallery").replaceChildren();
  $("whose").textContent = title;
  $("pictures").hidden = false;
  await more();
  $("whose").focus();
}

async function more() {
  const mine = reading;
  const answer = await call(mine.path, { headers: { range: `bytes=${mine.at}-${mine.at + PIECE - 1}` } });
  const total = Number(answer.headers.get("content-range")?.split("/")[1] ?? answer.headers.get("content-length"));
  const bytes = await answer.arrayBuffer();
  if (mine !== reading) return;  // another batch since
  mine.at += bytes.byteLength;
  const lines = (mine.rest + mine.decoder.decode(bytes, { stream: true })).split("\n");
  mine.rest = lines.pop();
  $("gallery").append(...lines.filter(Boolean).map((line) => JSON.parse(line)).flatMap(items));
  $("more").hidden = mine.at >= total;
}

function items({ custom_id: id, response }) {
  return response.body.data.map(({ url, seed }) => {
    const path = url.slice(url.lastIndexOf("/v1/artifacts/") + 1);  // of this server, by whatever name it is reached
    const image = element("img", { src: path, alt: `${id}, seed ${seed}`, loading: "lazy" });
    image.addEventListener("error", () => image.replaceWith("This image has expired."));
    return element("li", {}, element("a", { href: path, target: "_blank", rel: "noopener" }, image), element("span", { textContent: id, dir: "auto" }));
  });
}

$("more").addEventListener("click", () => more().catch((error) => say(error.message, true)));
