// Draws while something changes: requests are sent at most every THROTTLE milliseconds, and the latest one wins.
import { generate } from "./generate.js";
import { isOpen } from "./realtime.js";

const THROTTLE = 150, LONGEST = 8;  // milliseconds; seconds between two attempts

export class Artist {
  // `onImages(made, order)` and `onError(error, seconds until the next attempt or null)` are called for each answer.
  constructor(onImages, onError) {
    Object.assign(this, { onImages, onError, wanted: null, timer: 0, sent: 0, shown: 0, waiting: 0, failures: 0, last: -THROTTLE });
  }

  get busy() { return this.waiting > 0 || this.wanted !== null; }

  // Draw a request soon, in place of those that were not sent yet.
  want(body) {
    this.wanted = body;
    this._later(Math.max(0, this.last + THROTTLE - performance.now()));
  }

  // Forget what was not sent, and show no answer to what was.
  stop() {
    clearTimeout(this.timer);
    this.wanted = null;
    this.shown = this.sent;
  }

  _later(milliseconds) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this._send(), milliseconds);
  }

  async _send() {
    if (this.wanted === null) return;
    if (this.waiting && !isOpen()) return;  // without a session one request at a time; its end sends the latest
    const body = this.wanted, order = ++this.sent;
    this.wanted = null;
    this.last = performance.now();
    this.waiting += 1;
    try {
      const made = await generate(body);
      this.failures = 0;
      if (made && order > this.shown) {
        this.shown = order;
        this.onImages(made);
      }
    } catch (error) {
      if (order > this.shown) this._failed(error, body);
    } finally {
      this.waiting -= 1;
    }
    if (this.wanted !== null && !this.failures) this._later(0);
  }

  _failed(error, body) {
    const unreachable = error.status === 0 || error.status === 503 || error.status === 429;
    if (!unreachable) return this.onError(error, null);
    const seconds = error.retryAfter ?? Math.min(LONGEST, 2 ** this.failures);
    this.failures += 1;
    this.wanted ??= body;  // a later one is tried in its place
    this._later(1000 * seconds);
    this.onError(error, seconds);
  }
}
