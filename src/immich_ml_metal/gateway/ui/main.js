// Starts the page: words, the two polls, and the parts.

import { byId } from "./dom.js";
import { startPlayground } from "./playground.js";
import { showState } from "./status.js";
import { text } from "./text.js";

const EVERY_MS = 2000;
const HIDDEN_MS = 15000;
const STALE_S = 8;

for (const element of document.querySelectorAll("[data-text]")) {
  element.textContent = text[element.dataset.text];
}

for (const element of document.querySelectorAll("[data-label]")) {
  element.setAttribute("aria-label", text[element.dataset.label]);
}

let health = null;
let page = null;
let answeredAt = performance.now();

async function ask(path) {
  const response = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(5000) });
  if (!response.ok) throw new Error(String(response.status));
  return response.json();
}

async function poll() {
  try {
    const [newHealth, newPage] = await Promise.all([ask("/health"), ask("/ui/state.json")]);
    showState(newHealth, newPage, false);
    [health, page, answeredAt] = [newHealth, newPage, performance.now()];
  } catch {
    // Told below, by age: one lost answer is no news, nor one that this page does not understand,
    // as in the middle of an upgrade.
  }
  const age = (performance.now() - answeredAt) / 1000;
  const isStale = age > STALE_S || health === null;
  byId("stale").hidden = !(isStale && health !== null);
  if (isStale) byId("stale").textContent = text.stale(age);
  if (isStale) showState(health, page, true);
  setTimeout(poll, document.hidden ? HIDDEN_MS : EVERY_MS);
}

poll();
startPlayground(() => page);
