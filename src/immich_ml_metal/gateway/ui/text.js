// Every word of the page, in one place. Numbers and times are written in the browser's own locale.

const locale = navigator.language;
const number = new Intl.NumberFormat(locale);
const short = new Intl.NumberFormat(locale, { maximumFractionDigits: 1 });
const three = new Intl.NumberFormat(locale, { minimumFractionDigits: 3, maximumFractionDigits: 3 });
const two = new Intl.NumberFormat(locale, { minimumFractionDigits: 2, maximumFractionDigits: 2 });
const clock = new Intl.DateTimeFormat(locale, { dateStyle: "short", timeStyle: "medium" });

export const count = (n) => number.format(Math.round(n));
export const rate = (n) => (n < 10 ? short.format(n) : count(n));
export const score = (n) => two.format(n);
export const similarity = (n) => three.format(n);
export const when = (iso) => clock.format(new Date(iso));

export function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  while (n >= 1000 && at < units.length - 1) { n /= 1000; at += 1; }
  return `${short.format(n)} ${units[at]}`;
}

export function duration(seconds) {
  if (seconds < 1) return `${count(seconds * 1000)} ms`;
  if (seconds < 90) return `${short.format(seconds)} s`;
  if (seconds < 5400) return `${count(seconds / 60)} min`;
  if (seconds < 172800) return `${short.format(seconds / 3600)} h`;
  return `${count(seconds / 86400)} days`;
}

export const text = {
  skip: "Skip to the state",
  navStatus: "State",
  navTry: "Try it",
  connecting: "Asking the service …",

  stale: (seconds) => `The service has not answered for ${duration(seconds)}. What you see is that old.`,
  states: {
    ok: ["good", "Working", "Photos and searches are answered."],
    idle: ["good", "Ready, resting", "Nothing to do for a while, so memory was given back. The next photo wakes it."],
    trouble: ["warn", "Working, with trouble", "Something is not answered: see below what it is and what to do."],
    waiting: ["good", "Ready", "Nothing has arrived from Immich yet."],
    starting: ["busy", "Starting", "Requests wait and are not lost."],
    stopping: ["busy", "Restarting", "Requests wait and are not lost."],
    pause: ["warn", "Trying again after a crash", "Requests wait and are not lost."],
    draining: ["warn", "Stopping", "What was accepted is answered, then the service ends."],
    "crash-loop": ["bad", "The worker does not start", "It ended several times in a row. The last reasons are below."],
    gone: ["bad", "No connection", "The service does not answer at this address."],
  },
  download: (name, share) => `Fetching ${name} (${share})`,

  tiles: {
    now: "being answered now",
    perSecond: "answers per second, last half minute",
    waiting: "waiting",
    photos: "answers per minute, last hour",
    search: "search, last answers",
  },
  none: "–",
  tasksTitle: "What runs where",
  taskColumns: ["", "engine", "check", "done", "failed", "waiting in Immich", "time left"],
  kinds: { search: "Searches", clip: "Pictures for search", faces: "Faces", ocr: "Text in pictures" },
  unknownQueue: "?",
  leftAtRate: (seconds) => `about ${duration(seconds)}`,
  nothingLeft: "none",
  pausedWith: (n) => `${count(n)}, paused`,
  trouble: (task, model, why, held) =>
    `${task} with ${model}: ${why}${held ? ` (${count(held)} requests wait for it)` : ""}`,
  queueHint: "Waiting jobs and the time left need Immich's address and a key: ML_IMMICH_URL and ML_IMMICH_API_KEY.",

  modelsTitle: "Models in memory",
  noModels: "None: they are loaded when they are asked for.",
  downloadsTitle: "Downloads",
  left: (seconds) => `${duration(seconds)} left`,
  perSecond: (n) => `${bytes(n)}/s`,

  workerTitle: "This service",
  rows: {
    version: "version", up: "running for", memory: "memory", starts: "worker started", ends: "worker ended",
    held: "uploads held", addresses: "address for Immich", verdict: "index",
  },
  ends: (reasons) => Object.entries(reasons).map(([why, n]) => `${why} ${count(n)}`).join(", ") || "never",
  times: (n) => (n === 1 ? "once" : `${count(n)} times`),
  twoProcesses: (gateway, worker) => `${bytes(gateway)} gateway, ${worker ? bytes(worker) : "no"} worker`,

  failuresTitle: "What went wrong",
  noFailures: "Nothing since the start.",
  problemsTitle: "Needs you",

  guardTitle: "Immich's queues",
  paused: (queue, why, since) => `${queue} is paused by this service since ${when(since)}: ${why}`,
  notPaused: "Nothing is paused by this service.",

  firstTitle: "First steps",
  firstLead: "In Immich open Administration → Settings → Machine Learning Settings and put this address at the top of the list:",
  firstThen: "The first photo makes the service fetch the model that Immich asks for (some hundred megabytes, once), and then check which engine answers right and fast here. Meanwhile requests wait; nothing is lost.",
  steps: {
    running: "The service runs and this page is answered",
    asked: "Immich (or you, below) has sent a first request",
    model: "A model is here and loaded",
    answered: "A request was answered",
  },

  picturesLabel: "Your pictures",
  tryTitle: "Try it",
  tryLead: "Nothing is stored. What you drop here goes to this service only, and is forgotten.",
  dropTitle: "Drop or paste pictures here, or choose files",
  dropNote: "JPEG, PNG, WebP or GIF",
  notAPicture: (name) => `${name} is not a picture that a browser can show (JPEG, PNG, WebP, GIF).`,
  refused: (status, detail) => `The service answered ${status}: ${detail}`,
  noAnswer: "The service did not answer. It may be restarting; try again.",
  working: "working …",
  took: (ms) => `answered in ${duration(ms / 1000)}`,
  stages: (list) => list.map(([name, ms]) => `${name} ${count(ms)} ms`).join(" · "),

  facesTitle: "Faces",
  faces: (n) => (n === 1 ? "1 face" : `${count(n)} faces`),
  noFaces: "Looked, and found no face.",
  textTitle: "Text",
  lines: (n) => (n === 1 ? "1 line" : `${count(n)} lines`),
  noLines: "Looked, and found no text.",
  minScore: "least score",
  boxScore: "least box score",
  lineScore: "least text score",
  resolution: "resolution",
  model: "model",
  second: "beside it",
  noSecond: "no second model",
  searchTitle: "Search",
  searchLead: "Each number is how alike picture and text are to the model; the highest of each picture is bold.",
  addText: "add a text",
  textLabel: "what to look for",
  examples: ["a person", "a page of text", "a bird", "food and drink"],
  difference: (n) => `largest difference between the two: ${similarity(n)}`,
  onlyIn: (n, name) => `${count(n)} only with ${name}`,
};
