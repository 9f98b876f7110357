// The realtime session: a later request replaces one that waits. It is opened again when it was closed.
import { CallError, key, refused } from "./api.js";

let socket = null, opened = null, last = 0;
const asked = new Map();  // what the session has not answered, by id

// Rejects where there is no session to be had, as behind a proxy that knows no sockets.
export function open() {
  if (socket && socket.readyState <= WebSocket.OPEN) return opened;
  const address = new URL("v1/realtime/images", document.baseURI);
  address.protocol = address.protocol.replace("http", "ws");
  const mine = socket = new WebSocket(address);
  opened = new Promise((resolve, reject) => {
    mine.onopen = () => {
      if (key()) mine.send(JSON.stringify({ type: "session.start", api_key: key() }));
      resolve();
    };
    mine.onclose = ({ code }) => {
      const error = code === 1008 ? refused(401, "") : new CallError("The server does not answer.", 0);
      reject(error);
      for (const each of asked.values()) if (each.socket === mine) each.reject(error);
    };
  });
  mine.onmessage = ({ data }) => {
    const message = JSON.parse(data), each = asked.get(message.id);
    if (message.type !== "error") each?.resolve(message.type === "images.completed" ? message : null);
    else each?.reject(refused(message.status, message.error.message, message.retry_after));
  };
  return opened;
}

export const isOpen = () => socket?.readyState === WebSocket.OPEN;
export const close = () => socket?.close();

// The answer and its stages; null if a later request has replaced this one.
export async function draw(body) {
  await open();
  const id = String(++last), mine = socket;
  try {
    const answered = new Promise((resolve, reject) => asked.set(id, { resolve, reject, socket: mine }));
    mine.send(JSON.stringify({ type: "images.generate", id, ...body }));
    const content = await answered;
    return content && { content, stages: Object.entries(content.seconds).map(([name, seconds]) => [name, 1000 * seconds]) };
  } finally {
    asked.delete(id);
  }
}
