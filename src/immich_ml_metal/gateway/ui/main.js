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
    [health, page] = await Promise.all([ask("/health"), ask("/ui/state.json")]);
    answeredAt = performance.now();
  } catch {
    // told below, by age: one lost answer is no news
  }
  const age = (performance.now() - answeredAt) / 1000;
  const isStale = age > STALE_S || health === null;
  byId("stale").hidden = !(isStale && health !== null);
  if (isStale) byId("stale").textContent = text.stale(age);
  showState(health, page, isStale);
  setTimeout(poll, document.hidden ? HIDDEN_MS : EVERY_MS);
}

poll();
startPlayground(() => page);
