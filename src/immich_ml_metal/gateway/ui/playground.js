// Drop a picture, type a text, see what each task answers. Nothing is stored anywhere.

import { byId, h, s, show } from "./dom.js";
import { predict } from "./predict.js";
import { count, score, similarity, text } from "./text.js";
import { upright } from "./upright.js";

const TYPES = new Set(["image/jpeg", "image/png", "image/webp", "image/gif"]);

const state = {
  pictures: [], // {name, blob, url, width, height}
  chosen: null,
  texts: [...text.examples],
  faces: { model: null, second: "", minScore: 0.7 },
  ocr: { model: null, second: "", box: 0.5, line: 0.8, resolution: 736 },
  clip: { model: null, second: "" },
};
let pageState = () => null;

export function startPlayground(getPage) {
  pageState = getPage;
  const drop = byId("drop");
  const files = byId("files");
  drop.addEventListener("click", () => files.click());
  files.addEventListener("change", () => { take(files.files); files.value = ""; });
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
      if (name === "drop") take(event.dataTransfer.files);
    });
  }
  document.addEventListener("paste", (event) => event.clipboardData.files.length && take(event.clipboardData.files));
}

async function take(files) {
  complain(null);
  for (const file of files) {
    const blob = TYPES.has(file.type) ? await upright(file).catch(() => file) : file;
    const url = URL.createObjectURL(blob);
    const size = TYPES.has(file.type) ? await measure(url) : null;
    if (size === null) {
      URL.revokeObjectURL(url);
      complain(text.notAPicture(file.name));
    } else {
      state.pictures.push({ name: file.name, blob, url, ...size });
      state.chosen = state.pictures.at(-1);
    }
  }
  if (state.chosen) redraw();
}

function measure(url) {
  return new Promise((resolve) => {
    const image = new Image();
    image.onload = () => resolve({ width: image.naturalWidth, height: image.naturalHeight });
    image.onerror = () => resolve(null);
    image.src = url;
  });
}

function complain(words) {
  byId("try-error").hidden = !words;
  byId("try-error").textContent = words ?? "";
}

function redraw() {
  show(byId("pictures"));
  byId("pictures").replaceChildren(...state.pictures.map((one) => h("button", {
    type: "button", role: "option", "aria-selected": one === state.chosen,
    onclick: () => { state.chosen = one; redraw(); },
  }, h("img", { src: one.url, alt: one.name }))));
  const parts = [facesPart(), textPart(), searchPart()];
  byId("playground").replaceChildren(...parts.map((part) => part.element));
  for (const part of parts) part.ask();
}

// -- choices ----------------------------------------------------------------------------------------

function models(task) {
  const page = pageState();
  const here = page?.models?.on_disk?.[task] ?? [];
  const usual = page?.models?.usual?.[task];
  return [...new Set([...(usual ? [usual] : []), ...here])];
}

function modelChoice(task, choice, again) {
  const names = models(task);
  if (!names.includes(choice.model)) choice.model = names[0] ?? null;
  const pick = (key, options, label) => h("label", {}, label, h("select", {
    "data-choice": `${task}-${key}`,
    onchange: (event) => { choice[key] = event.target.value; again(); },
  }, options.map(([value, shown]) => h("option", { value, selected: choice[key] === value }, shown))));
  const all = names.map((name) => [name, name]);
  const others = [["", text.noSecond], ...all.filter(([name]) => name !== choice.model)];
  return [pick("model", all, text.model), names.length > 1 ? pick("second", others, text.second) : null];
}

function slider(id, label, value, { min = 0, max = 1, step = 0.01, shown = score }, changed) {
  const output = h("output", { for: id }, shown(value));
  return h("label", {}, label, h("input", {
    id, type: "range", min, max, step, value,
    oninput: (event) => { output.textContent = shown(Number(event.target.value)); changed(Number(event.target.value)); },
  }), output);
}

function card(title, id, controls, result) {
  return h("div", { class: "card", id }, h("h3", {}, title), h("div", { class: "controls" }, controls), result);
}

const named = (choice) => [choice.model, choice.second].filter(Boolean);

// Asks for each chosen model and shows the answers side by side; a later question wins.
function sideBySide(result, choice, question, draw, compare) {
  let asked = 0;
  return async function ask() {
    const mine = (asked += 1);
    result.setAttribute("aria-busy", "true");
    show(result, h("p", { class: "quiet" }, text.working));
    const names = named(choice);
    const answers = await Promise.all(names.map((name) => question(name)));
    if (mine !== asked) return;
    const sides = answers.map((answer, at) => h("div", { "data-model": names[at] },
      names.length > 1 ? h("h4", {}, names[at]) : null, failure(answer) ?? draw(answer), timing(answer)));
    const both = answers.length === 2 && answers.every((one) => one.ok) ? h("p", {}, compare(answers, names)) : null;
    result.replaceChildren(h("div", { class: "sides" }, sides), ...(both ? [both] : []));
    result.removeAttribute("aria-busy");
  };
}

function failure(answer) {
  if (answer.ok) return null;
  const words = answer.status ? text.refused(answer.status, answer.detail) : text.noAnswer;
  return h("p", { class: "error", role: "alert" }, words);
}

function timing(answer) {
  if (!answer.ok) return null;
  const stages = answer.stages.length ? ` (${text.stages(answer.stages)})` : "";
  return h("p", { class: "quiet", "data-timing": true }, text.took(answer.ms) + stages);
}

// -- pictures with marks ------------------------------------------------------------------------------

function marked(picture, marks) {
  const svg = s("svg", { viewBox: `0 0 ${picture.width} ${picture.height}`, "aria-hidden": "true" });
  svg.append(...marks);
  return h("div", { class: "canvas" }, h("img", { src: picture.url, alt: picture.name }), svg);
}

function label(x, y, words, picture) {
  const size = Math.max(12, picture.width / 45);
  const element = s("text", { x, y: Math.max(size, y) }, words);
  element.style.fontSize = `${size}px`;
  element.style.strokeWidth = `${size / 5}px`;
  return element;
}

// -- faces --------------------------------------------------------------------------------------------

function facesPart() {
  const choice = state.faces;
  const picture = state.chosen;
  const result = h("div", { "data-result": "faces" });
  const shown = () => redrawMarks();
  let redrawMarks = () => {};
  // Asked once for all above 0.3; the slider only hides, so that it answers at once.
  const question = (model) => predict(
    { "facial-recognition": { detection: { modelName: model, options: { minScore: 0.3 } }, recognition: { modelName: model } } },
    picture.blob);
  const draw = (answer) => {
    const holder = h("div");
    const previous = redrawMarks;
    const mine = () => {
      const faces = answer.body["facial-recognition"].filter((face) => face.score >= choice.minScore);
      holder.replaceChildren(
        marked(picture, faces.flatMap((face) => faceMarks(face, picture))),
        h("p", { "data-count": faces.length }, faces.length ? text.faces(faces.length) : text.noFaces));
    };
    redrawMarks = () => { previous(); mine(); };
    mine();
    return holder;
  };
  const ask = sideBySide(result, choice, question, draw, (answers, names) => {
    const numbers = answers.map((one) => one.body["facial-recognition"].filter((face) => face.score >= choice.minScore).length);
    return names.map((name, at) => `${name}: ${text.faces(numbers[at])}`).join(" · ");
  });
  const again = () => { redrawMarks = () => {}; return ask(); };
  const controls = [
    ...modelChoice("facial-recognition", choice, redraw),
    slider("face-score", text.minScore, choice.minScore, { min: 0.3 }, (value) => { choice.minScore = value; shown(); }),
  ];
  return { element: card(text.facesTitle, "faces", controls, result), ask: again };
}

function faceMarks(face, picture) {
  const { x1, y1, x2, y2 } = face.boundingBox;
  const box = { x: x1, y: y1, width: x2 - x1, height: y2 - y1 };
  return [
    s("rect", { class: "under", ...box }),
    s("rect", { class: "face", ...box }),
    label(x1, y1 - picture.width / 200, score(face.score), picture),
  ];
}

// -- text in pictures -----------------------------------------------------------------------------------

function textPart() {
  const choice = state.ocr;
  const picture = state.chosen;
  const result = h("div", { "data-result": "ocr" });
  const redraws = [];
  const question = (model) => predict({ ocr: {
    detection: { modelName: model, options: { minScore: 0.1, maxResolution: choice.resolution } },
    recognition: { modelName: model, options: { minScore: 0.1 } },
  } }, picture.blob);
  const draw = (answer) => {
    const holder = h("div");
    const mine = () => {
      const lines = linesOf(answer.body.ocr).filter((one) => one.box >= choice.box && one.score >= choice.line);
      holder.replaceChildren(
        marked(picture, lines.map((one) => s("polygon", { class: "line", points: pointsOf(one.quad, picture) },
          s("title", {}, `${one.words} (${score(one.score)})`)))),
        h("p", { "data-count": lines.length }, lines.length ? text.lines(lines.length) : text.noLines),
        h("ul", { class: "lines" }, lines.map((one) => h("li", {}, `${one.words} `,
          h("span", { class: "quiet" }, `${score(one.score)} · ${score(one.box)}`)))));
    };
    redraws.push(mine);
    mine();
    return holder;
  };
  const ask = sideBySide(result, choice, question, draw, (answers, names) => {
    const sets = answers.map((one) => new Set(one.body.ocr.text));
    return names.map((name, at) =>
      text.onlyIn([...sets[at]].filter((words) => !sets[1 - at].has(words)).length, name)).join(" · ");
  });
  const again = () => { redraws.length = 0; return ask(); };
  const hide = (key) => (value) => { choice[key] = value; redraws.forEach((one) => one()); };
  let later = 0;
  const controls = [
    ...modelChoice("ocr", choice, redraw),
    slider("box-score", text.boxScore, choice.box, { min: 0.1 }, hide("box")),
    slider("line-score", text.lineScore, choice.line, { min: 0.1 }, hide("line")),
    slider("resolution", text.resolution, choice.resolution, { min: 320, max: 2048, step: 32, shown: count }, (value) => {
      choice.resolution = value;
      clearTimeout(later);
      later = setTimeout(again, 400);
    }),
  ];
  return { element: card(text.textTitle, "text", controls, result), ask: again };
}

// Immich's answer holds flat lists: eight numbers a line, corners clockwise from the top left, 0..1.
function linesOf(answer) {
  return answer.text.map((words, at) => ({
    words, quad: answer.box.slice(8 * at, 8 * at + 8), box: answer.boxScore[at], score: answer.textScore[at],
  }));
}

function pointsOf(quad, picture) {
  const points = [];
  for (let at = 0; at < 8; at += 2) points.push(`${quad[at] * picture.width},${quad[at + 1] * picture.height}`);
  return points.join(" ");
}

// -- search ---------------------------------------------------------------------------------------------

function searchPart() {
  const choice = state.clip;
  const result = h("div", { class: "scroll", "data-result": "search" });
  const texts = h("div", { class: "controls" });
  const question = async (model) => {
    const pictures = await Promise.all(state.pictures.map((one) => vectorOf(model, "visual", one.blob)));
    const words = await Promise.all(state.texts.map((one) => vectorOf(model, "textual", one)));
    const bad = [...pictures, ...words].find((one) => !one.ok);
    if (bad) return bad;
    const stages = [pictures.at(-1), words.at(-1)].filter(Boolean).flatMap((one) => one.stages);
    const body = pictures.map((picture) => words.map((one) => dot(picture.vector, one.vector)));
    return { ok: true, ms: Math.max(...[...pictures, ...words].map((one) => one.ms)), stages, body };
  };
  const ask = sideBySide(result, choice, question, (answer) => table(answer.body), (answers) =>
    text.difference(Math.max(...answers[0].body.flatMap((row, i) =>
      row.map((value, j) => Math.abs(value - answers[1].body[i][j]))))));
  const drawTexts = () => texts.replaceChildren(
    ...state.texts.map((words, at) => h("input", {
      type: "text", value: words, "aria-label": text.textLabel,
      onchange: (event) => {
        if (event.target.value.trim()) state.texts[at] = event.target.value.trim();
        else { state.texts.splice(at, 1); drawTexts(); }
        ask();
      },
    })),
    h("button", { type: "button", class: "plain", onclick: () => { state.texts.push(text.examples[0]); drawTexts(); texts.querySelectorAll("input").item(state.texts.length - 1).select(); } }, text.addText));
  drawTexts();
  const controls = modelChoice("clip", choice, redraw);
  const element = card(text.searchTitle, "search", controls, result);
  element.insertBefore(h("p", { class: "quiet" }, text.searchLead), result);
  element.insertBefore(texts, result);
  return { element, ask };
}

// A vector is kept with its picture or text for as long as the page is open.
const vectors = new Map();

async function vectorOf(model, part, value) {
  const at = `${model}/${part}`;
  if (!vectors.has(at)) vectors.set(at, new Map());
  const known = vectors.get(at);
  if (!known.has(value)) {
    const answer = await predict({ clip: { [part]: { modelName: model, options: part === "textual" ? { language: navigator.language } : {} } } }, value);
    if (answer.ok) answer.vector = JSON.parse(answer.body.clip);
    if (!answer.ok) return answer;
    known.set(value, answer);
  }
  return known.get(value);
}

// Both are of unit length, so that this is the cosine.
const dot = (a, b) => a.reduce((sum, value, at) => sum + value * b[at], 0);

function table(rows) {
  const best = rows.map((row) => Math.max(...row));
  return h("table", {},
    h("thead", {}, h("tr", {}, h("th"), state.texts.map((words) => h("th", { scope: "col" }, words)))),
    h("tbody", {}, rows.map((row, at) => h("tr", {},
      h("th", { scope: "row" }, state.pictures[at].name),
      row.map((value) => h("td", { class: value === best[at] ? "best" : null }, similarity(value)))))));
}
