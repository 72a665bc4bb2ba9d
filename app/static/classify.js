// The view Classify: photos in, the most probable classes out.
//
//   files, paste, samples --openPicture--> items --classify--> POST /predict --> answer of each item
//
// The address keeps the sample, the model and the square, so that a link shows the same again.

import { call } from "./api.js";
import { drawBackdrop } from "./backdrop.js";
import { byId, h, load, notify, problem } from "./dom.js";
import { centerCrop, drawPreview, encodeCrop, limitCrop, NETWORK_SIDE, openPicture } from "./pictures.js";
import { SAMPLES } from "./samples.js";
import { percent, sentence, words } from "./text.js";

const PAUSE_MS = 150; // after the last key that moves the square
const ALL = "all";
const COPY = "Copy link";

const view = byId("classify");
const items = [];
let selected = null;
let live = {}; // the live models by name, the most accurate first
let maxPictures = 32; // in a request, as the service says
let takesCorrections = false;
let model = ""; // "" for the service's default, or ALL
let wanted = {}; // what the address asks for
let running = new AbortController();
let timer = 0;
let parts = null; // what only a picture needs: { box, showAnswers, showWaiting }
let drawSeen = () => {}; // copies the pixels of the selected item into the answer

/** Show the view with the parameters of the address: sample, model and crop. */
export async function show(parameters) {
  view.hidden = false;
  wanted = parameters;
  model = parameters.model ?? model;
  await listModels();
  if (parameters.sample && selected?.sample !== parameters.sample) await chooseSample(parameters.sample);
  else if (parameters.crop && !selected) byId("hint").textContent = "This link keeps a model and a square. Choose the photo.";
}

async function loadParts() {
  const [{ CropBox }, answer] = await load(import("./crop.js"), import("./answer.js"));
  parts ??= { ...answer, box: new CropBox(byId("stage"), moved, () => {
    clearTimeout(timer);
    timer = setTimeout(() => classify([selected]), PAUSE_MS);
  }) };
}

async function listModels() {
  try {
    const health = await call("health");
    live = Object.fromEntries(Object.entries(health.models).sort(([, a], [, b]) => b.test_top1 - a.test_top1));
    maxPictures = health.max_images;
    takesCorrections = health.feedback;
    showControls();
    byId("problem").replaceChildren();
    if (!hasModel()) {
      const [{ noModel }] = await load(import("./nomodel.js"));
      byId("problem").replaceChildren(noModel(health, lookAgain));
    }
  } catch (error) {
    showProblem(error, listModels);
  }
}

const hasModel = () => Object.keys(live).length > 0;

const lookAgain = () => (selected ? classify(items) : listModels());

function showControls() {
  const names = Object.keys(live);
  if (!(model === ALL && names.length > 1) && !names.includes(model)) model = names[0] ?? "";
  const select = h("select", { id: "model", onchange: () => {
    model = select.value;
    keepInAddress();
    classify(items);
  } },
  names.map((name) => h("option", { value: name, selected: name === model },
    `${name} (${percent(live[name].test_top1)} right)`)),
  names.length > 1 && h("option", { value: ALL, selected: model === ALL }, "All models side by side"));
  byId("controls").hidden = !hasModel();
  byId("controls").replaceChildren(h("label", { for: "model" }, "Model"), select,
    h("button", { type: "button", id: "copy", onclick: copyLink }, COPY));
}

/** Open files as pictures and classify them. What the browser cannot show is refused with a sentence. */
export async function chooseFiles(files, sample = "") {
  notify("");
  byId("problem").replaceChildren();
  view.dataset.busy = "";
  const loading = loadParts().catch((error) => error);
  const opened = await Promise.allSettled([...files].slice(0, maxPictures).map(openPicture));
  const failure = await loading;
  delete view.dataset.busy;
  if (failure) {
    showProblem(failure, () => chooseFiles(files, sample));
    return;
  }
  const refusals = opened.filter(({ reason }) => reason).map(({ reason }) => sentence(reason.message));
  if (files.length > maxPictures) {
    refusals.push(`${maxPictures} photos at a time are the limit. The other ${files.length - maxPictures} are left out.`);
  }
  byId("refused").replaceChildren(...(refusals.length ? [h("div", { class: "problem" }, refusals.map((each) => h("p", {}, each)))] : []));
  const pictures = opened.filter(({ value }) => value).map(({ value }) => value);
  if (pictures.length === 0) return;
  items.splice(0, items.length, ...pictures.map((picture) => newItem(picture, sample)));
  wanted = {};
  select(items[0]);
  classify(items);
}

function newItem(picture, sample) {
  const canvas = h("canvas", { width: NETWORK_SIDE, height: NETWORK_SIDE, "aria-hidden": "true" });
  const item = { picture, sample, canvas, crop: readCrop(picture) ?? centerCrop(picture), answers: null };
  item.label = h("span", {}, "…");
  item.button = h("button", { type: "button", onclick: () => select(item) }, canvas, item.label);
  drawPreview(canvas, picture, item.crop);
  return item;
}

/** Return the square of the address, which has it as shares of the picture's shorter side. */
function readCrop(picture) {
  const shares = wanted.crop?.split(",").map(Number);
  if (!(shares?.length === 3 && shares.every(Number.isFinite))) return null;
  const side = Math.min(picture.width, picture.height);
  return limitCrop({ x: shares[0] * side, y: shares[1] * side, size: shares[2] * side }, picture);
}

function keepInAddress() {
  if (!selected || view.hidden) return;
  const { picture, crop, sample } = selected;
  const side = Math.min(picture.width, picture.height);
  const shares = [crop.x, crop.y, crop.size].map((each) => Number((each / side).toFixed(4)));
  const parameters = new URLSearchParams({ ...(sample && { sample }), ...(model && { model }), crop: shares.join(",") });
  history.replaceState(null, "", `#/?${parameters.toString().replaceAll("%2C", ",")}`);
  byId("copy")?.replaceChildren(COPY);
}

async function chooseSample(name) {
  const sample = SAMPLES.find((each) => each.name === name);
  if (!sample) return;
  try {
    const [response] = await load(fetch(`./static/samples/${name}.jpg`));
    const file = new File([await response.blob()], `${name}.jpg`, { type: "image/jpeg" });
    await chooseFiles([file], name);
  } catch (error) {
    showProblem(error, () => chooseSample(name));
  }
}

function select(item) {
  selected = item;
  view.dataset.state = "picture";
  for (const each of items) each.button.setAttribute("aria-pressed", each === item);
  byId("gallery").replaceChildren(...(items.length > 1 ? items.map(({ button }) => button) : []));
  parts.box.show(item.picture, item.crop);
  hideExplanation();
  for (const button of byId("samples").children) {
    button.setAttribute("aria-pressed", button.dataset.name === item.sample);
  }
  keepInAddress();
  render();
}

function moved(crop) {
  selected.crop = crop;
  drawPreview(selected.canvas, selected.picture, crop);
  hideExplanation();
  drawSeen();
}

/** Send the squares of these items to /predict, once per model, and show the answer of the selected one. */
async function classify(changed) {
  if (!hasModel()) await listModels();
  if (!hasModel()) return;
  const batch = changed.filter((item) => items.includes(item));
  if (batch.length === 0) return;
  hideExplanation();
  running.abort(); // an answer about another square or of another model
  running = new AbortController();
  const { signal } = running;
  batch.push(...items.filter((item) => !item.answers && !batch.includes(item)));
  keepInAddress();
  render(true);
  try {
    const form = new FormData();
    for (const item of batch) form.append("file", await encodeCrop(item.picture, item.crop));
    const names = model === ALL ? Object.keys(live) : [model];
    const answers = [];
    for (const name of names) {
      const query = new URLSearchParams(name ? { model: name } : {});
      answers.push(await call(`predict?${query}`, { method: "POST", body: form, signal }));
    }
    for (const [i, item] of batch.entries()) {
      item.answers = answers.map(({ predictions, ...rest }) => ({ ...rest, ...predictions[i] }));
      const [{ classes: [{ label }], familiar }] = item.answers;
      item.label.textContent = familiar === false ? `${words(label)}?` : words(label);
    }
    byId("problem").replaceChildren();
    render();
  } catch (error) {
    if (signal.aborted) return;
    render();
    showProblem(error, () => classify(batch));
  }
}

function showProblem(error, retry) {
  byId("problem").replaceChildren(problem(error, retry));
}

function render(isWaiting = false) {
  const { answers, canvas, picture } = selected;
  const preview = h("canvas", { width: NETWORK_SIDE, height: NETWORK_SIDE, role: "img",
    "aria-label": "The 32×32 pixels that the network sees" });
  drawSeen = () => preview.getContext("2d").drawImage(canvas, 0, 0);
  drawSeen();
  if (isWaiting && !answers) parts.showWaiting(byId("answer"), preview);
  else if (answers) parts.showAnswers(byId("answer"), preview, answers, explain, takesCorrections ? correct : null);
  else byId("answer").replaceChildren();
  byId("answer").setAttribute("aria-busy", isWaiting);
  if (answers && !isWaiting) {
    const { label, probability } = answers[0].classes[0];
    byId("said").textContent = `${picture.name}: ${words(label)}, ${percent(probability)}`;
  }
}

/** Ask for the right class of the selected picture, and send it to the service. */
async function correct(answer) {
  const { picture, crop } = selected;
  try {
    const [{ askForClass }] = await load(import("./feedback.js"));
    askForClass(answer, () => encodeCrop(picture, crop));
  } catch (error) {
    notify(error.message);
  }
}

/** Show over the square how much each region of it speaks for a class. */
async function explain({ model: name, version }, { label }, button) {
  if (button.getAttribute("aria-pressed") === "true") return hideExplanation();
  hideExplanation();
  button.setAttribute("aria-busy", true);
  const item = selected;
  const { crop } = item;
  try {
    const [{ drawMap, findStrongest }] = await load(import("./explanation.js"));
    const form = new FormData();
    form.append("file", await encodeCrop(item.picture, crop));
    const query = new URLSearchParams({ model: name, version, class: label });
    const { map } = await call(`explain?${query}`, { method: "POST", body: form });
    if (item !== selected || crop !== item.crop) return;
    parts.box.cover(drawMap(map));
    button.setAttribute("aria-pressed", true);
    const legend = byId("legend");
    legend.hidden = false;
    legend.replaceChildren(h("span", { class: "for" }), `speaks for ${words(label)}`, h("span", { class: "against" }), "speaks against it");
    byId("said").textContent = `The photo shows which regions speak for ${words(label)}, most of all the ${findStrongest(map)}.`;
  } catch (error) {
    showProblem(error);
  } finally {
    button.removeAttribute("aria-busy");
  }
}

function hideExplanation() {
  parts.box.cover(null);
  byId("legend").hidden = true;
  for (const pressed of byId("answer").querySelectorAll('[aria-pressed="true"]')) pressed.setAttribute("aria-pressed", false);
}

async function copyLink(event) {
  const button = event.currentTarget;
  try {
    await navigator.clipboard.writeText(location.href);
    button.textContent = "Link copied";
    byId("said").textContent = "The link is copied.";
  } catch {
    notify(`The link is ${location.href}`); // the browser forbids copying outside HTTPS
  }
}

function setUp() {
  drawBackdrop(byId("backdrop"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawBackdrop(byId("backdrop")));
  byId("tools").append(
    h("button", { type: "button", "aria-label": "Smaller square", onclick: () => parts.box.scale(1 / 1.25) }, "−"),
    h("button", { type: "button", "aria-label": "Larger square", onclick: () => parts.box.scale(1.25) }, "+"),
    h("button", { type: "button", onclick: () => parts.box.reset() }, "Center"),
    h("button", { type: "button", class: "primary", onclick: () => byId("file").click() }, "Other photos"),
    h("p", { class: "quiet", id: "crop-keys" }, "The network sees the square. Drag it or its corners. Keys: arrows, + and −."));
  byId("samples").append(...SAMPLES.map(({ name, title }, i) => h("button", { type: "button", class: "tile", "data-name": name,
    title, "aria-label": title, style: { "--tile": i }, onclick: () => { wanted = {}; chooseSample(name); } })));
  for (const id of ["file", "camera"]) {
    byId(id).addEventListener("change", ({ target }) => {
      if (target.files.length) chooseFiles([...target.files]);
      target.value = ""; // so that the same file can be chosen again
    });
  }
  byId("classes").addEventListener("click", async () => {
    try {
      const [{ showClasses }] = await load(import("./classes.js"));
      showClasses(live);
    } catch (error) {
      notify(error.message);
    }
  });
}

setUp();
