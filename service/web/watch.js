// Looks again and again while the page is visible: one look at a time, less often while the server does not answer.
// The element `trouble` says what is wrong.
import { $ } from "./element.js";

const PAUSE = 1500, LONGEST = 15_000;

export function watch(look) {
  let failures = 0;
  async function turn() {
    if (!document.hidden) {
      try {
        await look();
        failures = 0;
        $("trouble").hidden = true;
      } catch (error) {
        failures += 1;
        $("trouble").textContent = error.status === 0 ? `${error.message} Trying again.` : error.message;
        $("trouble").hidden = false;
      }
    }
    setTimeout(turn, Math.min(LONGEST, PAUSE * 2 ** Math.min(failures, 8)));
  }
  turn();
}
