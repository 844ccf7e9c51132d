// The state of the service, from `/health` and `/ui/state.json`.

import { byId, h, row, s, show } from "./dom.js";
import { bytes, count, duration, rate, text, when } from "./text.js";

const KINDS = ["search", "clip", "faces", "ocr"];
const SLOTS = {
  search: ["clip/textual"],
  clip: ["clip/visual"],
  faces: ["facial-recognition/detection", "facial-recognition/recognition"],
  ocr: ["ocr/detection", "ocr/recognition"],
};
const QUEUES = { clip: "smartSearch", faces: "faceDetection", ocr: "ocr" };

export function showState(health, page, isStale) {
  showWord(health, page, isStale);
  if (health === null) return;
  showProblems(health);
  showFirst(health, page);
  showTiles(health, page);
  showTasks(health, page);
  showModels(health);
  showService(health, page);
  showGuard(health);
  showFailures(health);
}

function stateName(health, page) {
  if (health.status !== "ok") return health.status;
  if (health.troubles.length || isFailing(page.history.kinds.search)) return "trouble";
  if (!page.steps.asked) return "waiting";
  return health.worker.state === "idle" ? "idle" : "ok";
}

// Searches are never a trouble of a queue: they are failing while none of the last five minutes succeeded.
function isFailing(kind) {
  const sum = (steps) => steps.slice(-30).reduce((a, b) => a + b, 0);
  return sum(kind.failed) > 0 && sum(kind.answered) === 0;
}

function showWord(health, page, isStale) {
  const name = health === null || isStale ? "gone" : stateName(health, page);
  const [level, word, detail] = text.states[name] ?? ["warn", name, ""];
  const downloads = isStale ? [] : (health?.worker.health?.downloads ?? []);
  byId("state").dataset.level = level;
  set(byId("state-word"), word);
  set(byId("state-detail"), [detail, ...downloads.map(describeDownload)].join(" "));
  document.title = `${word} – Immich ML`;
}

// A live region speaks whenever it is written to: write only what is new.
function set(element, words) {
  if (element.textContent !== words) element.textContent = words;
}

function describeDownload(download) {
  const share = download.total_bytes ? download.done_bytes / download.total_bytes : 0;
  return text.download(download.model, `${count(share * 100)} %`);
}

function showProblems(health) {
  const worker = health.worker.health ?? {};
  const notices = [
    ...health.troubles.map((one) => [text.trouble(one.task, one.model, one.reason, one.held), one.advice]),
    ...(worker.index ?? []).filter((one) => one.state === "changed").map((one) => [one.text]),
    ...(worker.engine_plan?.warnings ?? []).map((one) => [one]),
  ];
  byId("problems").hidden = notices.length === 0;
  show(byId("problems"), h("h3", {}, text.problemsTitle), h("ul", {}, notices.map(withAdvice)));
}

function withAdvice([words, advice]) {
  return h("li", {}, words, advice ? h("div", { class: "quiet" }, advice) : null);
}

function showFirst(health, page) {
  const steps = page.steps;
  byId("first").hidden = steps.answered;
  const addresses = page.addresses.map((one) => h("li", {}, h("code", {}, one)));
  const done = { running: true, ...steps };
  show(
    byId("first"),
    h("h3", {}, text.firstTitle),
    h("p", {}, text.firstLead),
    h("ul", { id: "addresses" }, addresses),
    h("p", {}, text.firstThen),
    h("ul", { class: "steps" }, Object.entries(text.steps).map(([name, words]) =>
      h("li", { class: done[name] ? "done" : null, "data-step": name }, words))),
  );
}

function showTiles(health, page) {
  const history = page.history;
  const perStep = sumOf(KINDS.map((kind) => history.kinds[kind].answered));
  const failed = sumOf(KINDS.map((kind) => history.kinds[kind].failed));
  const perSecond = perStep.slice(-4, -1).reduce((a, b) => a + b, 0) / (3 * history.step_s);
  const waiting = health.queue.waiting + health.queue.uploads_not_read_yet;
  const lastMinute = perStep.slice(-6).reduce((a, b) => a + b, 0);
  show(
    byId("tiles"),
    tile("now", count(health.queue.running)),
    tile("perSecond", rate(perSecond)),
    tile("waiting", count(waiting), ownTimeLeft(waiting, perSecond)),
    tile("photos", rate(lastMinute), chart(perStep, failed, text.tiles.photos)),
    tile("search", page.search_ms == null ? text.none : duration(page.search_ms / 1000)),
  );
}

// What waits here, at our own rate; what waits in Immich is in the table.
function ownTimeLeft(waiting, perSecond) {
  return waiting && perSecond ? h("div", { class: "quiet" }, text.leftAtRate(waiting / perSecond)) : null;
}

const sumOf = (lists) => lists[0].map((_, at) => lists.reduce((sum, list) => sum + list[at], 0));

function tile(name, value, ...more) {
  return h("div", { class: "tile", "data-tile": name }, h("b", {}, value), text.tiles[name], ...more.filter(Boolean));
}

// Bars of a minute each, oldest left; failures are drawn at the foot.
function chart(values, failures, label) {
  const bars = perMinute(values);
  const bad = perMinute(failures);
  const top = Math.max(1, ...bars);
  const svg = s("svg", { viewBox: "0 0 60 20", preserveAspectRatio: "none", role: "img", "aria-label": label });
  bars.forEach((value, at) => {
    const height = (value / top) * 19;
    if (value) svg.append(s("rect", { class: "bar", x: at, y: 20 - height, width: 0.8, height }));
    if (bad[at]) svg.append(s("rect", { class: "fail", x: at, y: 18, width: 0.8, height: 2 }));
  });
  svg.append(s("line", { class: "base", x1: 0, y1: 20, x2: 60, y2: 20 }));
  return svg;
}

function perMinute(values) {
  const minutes = [];
  for (let at = 0; at < values.length; at += 6) {
    minutes.push(values.slice(at, at + 6).reduce((a, b) => a + b, 0));
  }
  return minutes;
}

function showTasks(health, page) {
  const table = byId("tasks");
  show(table.tHead, h("tr", {}, text.taskColumns.map((name, at) =>
    h("th", { scope: "col", class: at > 2 ? "number" : null }, name))));
  show(table.tBodies[0], KINDS.map((kind) => taskRow(kind, health, page)));
}

function taskRow(kind, health, page) {
  const engines = page.engines ?? {};
  const names = [...new Set(SLOTS[kind].map((slot) => engines[slot]?.engine).filter(Boolean))];
  const verdicts = [...new Set(SLOTS[kind].map((slot) => engines[slot]?.verdict).filter(Boolean))];
  const totals = page.totals[kind];
  const queue = health.guard?.queues?.[QUEUES[kind]];
  const waiting = queue && queue.waiting + queue.active;
  return h("tr", { "data-kind": kind },
    h("th", { scope: "row" }, text.kinds[kind]),
    h("td", {}, names.join(", ") || text.none),
    h("td", {}, verdicts.join("; ") || text.none),
    h("td", { class: "number", "data-cell": "done" }, count(totals.answered)),
    h("td", { class: "number", "data-cell": "failed" }, count(totals.failed)),
    h("td", { class: "number", "data-cell": "waiting" }, inImmich(kind, queue, waiting)),
    h("td", { class: "number" }, timeLeft(waiting, page.history.kinds[kind].answered, page.history.step_s)),
  );
}

function inImmich(kind, queue, waiting) {
  if (waiting == null) return kind in QUEUES ? text.unknownQueue : text.none;
  return queue.is_paused ? text.pausedWith(waiting) : count(waiting);
}

// From our own rate of the last five minutes.
function timeLeft(waiting, answered, step) {
  if (waiting == null) return text.none;
  if (waiting === 0) return text.nothingLeft;
  const recent = answered.slice(-30);
  const perSecond = recent.reduce((a, b) => a + b, 0) / (recent.length * step);
  return perSecond ? text.leftAtRate(waiting / perSecond) : text.unknownQueue;
}

function showModels(health) {
  const worker = health.worker.health ?? {};
  const models = worker.models ?? [];
  const downloads = worker.downloads ?? [];
  const list = models.length
    ? h("ul", {}, models.map((one) => h("li", {}, `${one.model} ${one.part} · ${one.engine} · ${bytes(one.size_bytes ?? 0)}`)))
    : h("p", { class: "quiet" }, text.noModels);
  show(byId("models"), h("h3", {}, text.modelsTitle), list, downloads.length ? downloadList(downloads) : null);
}

function downloadList(downloads) {
  return h("div", {}, h("h3", {}, text.downloadsTitle), downloads.map((one) => {
    const facts = [one.phase, text.perSecond(one.rate_bytes_s)];
    if (one.remaining_s != null) facts.push(text.left(one.remaining_s));
    if (one.note) facts.push(one.note);
    return h("div", {},
      h("label", {}, `${one.model}: ${facts.join(", ")}`,
        h("progress", { max: one.total_bytes || null, value: one.total_bytes ? one.done_bytes : null })));
  }));
}

function showService(health, page) {
  const queue = health.queue;
  const rows = [
    ...row(text.rows.addresses, page.addresses.join(" ")),
    ...row(text.rows.version, health.versions.service),
    ...row(text.rows.up, duration(health.gateway.age_s)),
    ...row(text.rows.memory, text.twoProcesses(health.gateway.memory_bytes ?? 0, health.worker.memory_bytes)),
    ...row(text.rows.starts, text.times(health.worker_starts)),
    ...row(text.rows.ends, text.ends(health.worker_ends)),
    ...row(text.rows.held, bytes(queue.held_memory_bytes + queue.held_spool_bytes)),
  ];
  show(byId("worker"), h("h3", {}, text.workerTitle), h("dl", {}, rows));
  const hint = health.guard?.queues == null ? `${text.queueHint} ` : "";
  set(byId("foot"), `${hint}immich-ml-metal ${health.versions.service}`);
}

function showGuard(health) {
  const guard = health.guard;
  byId("guard").hidden = guard == null;
  if (guard == null) return;
  const paused = Object.entries(guard.paused ?? {});
  const lines = paused.length
    ? h("ul", {}, paused.map(([queue, one]) => h("li", {}, text.paused(queue, one.reason, one.since))))
    : h("p", { class: "quiet" }, guard.why_off ?? text.notPaused);
  show(byId("guard"), h("h3", {}, text.guardTitle), lines);
}

function showFailures(health) {
  const causes = new Map();
  for (const { when: at, cause, advice } of health.failures.recent) {
    const known = causes.get(cause) ?? { times: 0 };
    causes.set(cause, { times: known.times + 1, last: at, advice });
  }
  const list = causes.size
    ? h("ul", {}, [...causes].map(([cause, one]) =>
        withAdvice([`${cause} (${text.times(one.times)}, ${when(one.last)})`, one.advice])))
    : h("p", { class: "quiet" }, text.noFailures);
  show(byId("failures"), h("h3", {}, text.failuresTitle), list);
}
