// Images of a request, over the realtime session if there is one, else by POST.
import { send } from "./api.js";
import * as realtime from "./realtime.js";

// The answer with its stages and milliseconds; null if a later request has replaced this one.
export async function generate(body) {
  const began = performance.now();
  const live = await realtime.open().then(() => true, () => false);
  const answer = await (live ? realtime.draw(body) : posted(body));
  return answer && { ...answer, asked: body, total: performance.now() - began };
}

export async function posted(body, signal) {
  const began = performance.now();
  const answer = await send("v1/images/generations", body, signal);
  const content = await answer.json();
  const stages = (answer.headers.get("server-timing") || "").split(", ").filter(Boolean).map((part) => {
    const [name, duration] = part.split(";dur=");
    return [name, Number(duration)];
  });
  return { content, stages, asked: body, total: performance.now() - began };
}
