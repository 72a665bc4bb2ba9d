// The view Train: a form made from the recipes, the jobs, and one job while it runs.
//
//   GET /train/recipes, openapi.json --> form --> POST /train --> job
//   GET /train/{id}/events --> curves, phase and time left until the event `end`

import { call, sendJson, text } from "./api.js";
import { curves, LOSSES, SHARES } from "./charts.js";
import { h, notify, problem, refresh } from "./dom.js";
import { isFinished, jobList, runPictures, stateOf } from "./jobs.js";
import { duration, percent, sentence, when, words } from "./text.js";

const MAIN_FIELDS = ["epochs", "learning_rate", "batch_size", "width", "image_size"];
const PHASES = ["loading", "features", "training", "exporting", "quantizing", "measuring", "publishing"];
const EVENTS = ["phase", "tick", "epoch"];
const NETWORKS = / \((shared-resnet|resnet|resnet18)(, [a-z0-9-]+)*\)\.$/; // in a description: the networks that have the field
const POLL_MS = 3000; // where the stream of events is refused
const PROMOTE = { "if-better": "If it is at least as accurate as the live version", always: "Always", never: "Never" };

/** Show the form and all jobs, or the job of the path. Returns a function that ends the updates. */
export async function show(place, [id]) {
  return id ? showJob(place, id) : showForm(place);
}

async function showForm(place) {
  const [{ components }, recipes, jobs] = await Promise.all([call("openapi.json"), call("train/recipes"), call("train?limit=20")]);
  const { overrides } = components.schemas.TrainingRequest.properties;
  const form = h("form", { class: "card", "aria-labelledby": "new", onsubmit: start });
  let recipe = recipes.find(({ name }) => name === "resnet") ?? recipes[0];
  let values = {};

  function draw() {
    const fields = Object.keys(recipe.fields).map((name) => field(name, overrides.properties[name], recipe.fields[name], values));
    const main = fields.filter(({ name }) => MAIN_FIELDS.includes(name));
    const others = fields.filter(({ name }) => !MAIN_FIELDS.includes(name));
    form.replaceChildren(
      h("h2", { id: "new" }, "New training"),
      h("p", { class: "field" }, h("label", { for: "recipe" }, "Recipe"),
        h("select", { id: "recipe", onchange: ({ target }) => {
          recipe = recipes.find(({ name }) => name === target.value);
          values = {};
          draw();
          form.querySelector("#recipe").focus();
        } }, recipes.map(({ name }) => h("option", { selected: name === recipe.name }, name))),
        h("span", { class: "quiet" }, `Publishes a version of the model ${recipe.model}.`)),
      h("div", { class: "pairs" }, main.map(({ element }) => element)),
      h("details", {}, h("summary", {}, `${others.length} more settings`), h("div", { class: "pairs" }, others.map(({ element }) => element))),
      h("p", { class: "field" }, h("label", { for: "promote" }, "Make it live"),
        h("select", { id: "promote", name: "promote" }, Object.entries(PROMOTE).map(([value, label]) => h("option", { value }, label)))),
      h("div", { id: "fault" }),
      h("p", { class: "buttons" }, h("button", { class: "primary" }, "Start training"),
        h("span", { class: "quiet" }, "Needs a key if the service has keys.")));
  }

  async function start(event) {
    event.preventDefault();
    const button = form.querySelector("button.primary");
    button.disabled = true;
    try {
      const promote = form.elements.promote.value;
      const job = await sendJson("POST", "train", { recipe: recipe.name, overrides: values, promote });
      location.hash = `#/train/${job.id}`;
    } catch (error) {
      showFault(error);
      button.disabled = false;
    }
  }

  /** Show why the service has refused the training, and mark the first field that the reason names. */
  function showFault(error) {
    form.querySelector("#fault").replaceChildren(problem(error));
    const name = error.message.toLowerCase().match(/\w+/g).find((word) => word in recipe.fields);
    const input = form.querySelector(`#field-${name}`);
    if (!input) return;
    input.closest("details")?.setAttribute("open", "");
    input.setAttribute("aria-invalid", true);
    input.setAttribute("aria-describedby", `fault field-${name}-help`);
  }

  draw();
  place.append(h("h1", { tabindex: -1 }, "Train a network"),
    h("div", { class: "columns" }, form, h("section", { "aria-labelledby": "jobs" },
      h("h2", { id: "jobs" }, "Trainings"),
      jobs.length ? jobList(jobs, describeJob)
        : h("p", {}, "None yet. The result of a training becomes the next version of a model, and the service shows its progress here."))));
}

/** Return { name, element } of a form field that writes changed values into `values`. */
function field(name, schema, value, values) {
  const id = `field-${name}`;
  const kind = Array.isArray(value) ? "list" : typeof value;
  const options = schema.enum;
  const shown = kind === "list" ? value.join(",") : value;
  const read = (input) => {
    if (kind === "boolean") return input.checked;
    return kind === "number" ? input.valueAsNumber : input.value;
  };
  const update = ({ target }) => {
    const given = read(target);
    if (given === shown || Number.isNaN(given)) delete values[name];
    else values[name] = given;
    target.removeAttribute("aria-invalid");
    target.setAttribute("aria-describedby", `${id}-help`);
  };
  const attributes = { id, oninput: update, "aria-describedby": `${id}-help` };
  const input = options ? h("select", attributes, options.map((option) => h("option", { selected: option === value }, option)))
    : kind === "boolean" ? h("input", { ...attributes, type: "checkbox", checked: value })
      : kind === "number" ? h("input", { ...attributes, type: "number", required: true, value, ...limits(schema) })
        : h("input", { ...attributes, value: shown, maxlength: schema.maxLength });
  const help = h("span", { class: "quiet", id: `${id}-help` }, schema.description?.replace(NETWORKS, "."));
  const label = h("label", { for: id }, sentence(words(name)).replace(".", ""));
  return { name, element: h("p", { class: kind === "boolean" ? "field check" : "field" }, label, input, help) };
}

/** Return the attributes of a number field. A bound that is itself excluded is left to the service. */
function limits({ type, minimum, maximum, multipleOf }) {
  return { min: minimum, max: maximum, step: type === "integer" ? multipleOf ?? 1 : "any" };
}

function describeJob({ id, state, phase, request, created, published, error }) {
  return {
    href: `#/train/${id}`,
    name: request.recipe,
    ...(state === "running" && phase && { state: sentence(phase).replace(".", "") }),
    details: [when(created), published && `. ${published.model}/${published.version}, ${percent(published.test.top1)} right`,
      error && `. ${sentence(error)}`],
  };
}

async function showJob(place, id) {
  const path = `train/${encodeURIComponent(id)}`;
  let job = await call(path);
  let timer = 0;
  const ticks = [];
  const epochs = new Map();
  const inCard = { state: h("p"), changes: h("p", { class: "quiet" }), progress: h("div"), outcome: h("div"),
    buttons: h("p", { class: "buttons" }), log: h("div") };
  const below = { charts: h("div", { class: "charts" }), pictures: h("div", { class: "stack" }),
    said: h("p", { class: "hidden", role: "status" }) };
  const parts = { ...inCard, ...below };
  place.append(h("p", {}, h("a", { href: "#/train" }, "All trainings")), h("h1", { tabindex: -1 }, `Training of ${job.request.recipe}`),
    h("div", { class: "job stack" }, h("div", { class: "card" }, Object.values(inCard)), Object.values(below)));

  const draw = () => {
    for (const each of job.history) epochs.set(each.epoch, each);
    drawJob(parts, job, [...epochs.values()], ticks, cancel);
  };

  async function cancel() {
    try {
      job = await call(path, { method: "DELETE" });
    } catch (error) {
      notify(error.message);
    }
    draw();
  }

  async function poll() {
    job = await call(path).catch(() => job);
    draw();
    if (!isFinished(job)) timer = setTimeout(poll, POLL_MS);
  }

  draw();
  if (isFinished(job)) return null;
  const source = new EventSource(`./${path}/events`);
  for (const kind of EVENTS) {
    source.addEventListener(kind, ({ data }) => {
      const progress = JSON.parse(data);
      if (kind === "epoch") epochs.set(progress.epoch, progress);
      else if (kind === "tick") ticks.push(progress);
      job = { ...job, state: "running", progress, phase: progress.phase ?? job.phase };
      draw();
    });
  }
  source.addEventListener("end", ({ data }) => {
    source.close();
    job = JSON.parse(data);
    draw();
  });
  source.addEventListener("error", () => {
    if (source.readyState === EventSource.CLOSED) poll(); // too many clients follow jobs
  });
  return () => {
    source.close();
    clearTimeout(timer);
  };
}

/** Bring the parts of the view of a job up to date. Buttons and pictures stay as they are while they need no change. */
function drawJob(parts, job, epochs, ticks, cancel) {
  const { id, state, phase, request, files, published, error } = job;
  const changes = Object.entries(request.overrides).map(([name, value]) => `${words(name)} ${value}`);
  const said = `${stateOf(job)}${phase ? `: ${phase}` : ""}.`;
  if (parts.said.textContent !== said) parts.said.textContent = said; // a screen reader reads every change
  parts.state.replaceChildren(h("strong", { class: `state ${state}` }, stateOf(job)), ` ${timesOf(job)}`);
  parts.changes.textContent = changes.length ? `Changed: ${changes.join(", ")}.` : "";
  parts.progress.replaceChildren(...(isFinished(job) ? [] : progressOf(job)));
  refresh(parts.outcome, state, () => [
    error && h("div", { class: "problem" }, h("p", {}, sentence(error))),
    published && h("p", {}, h("a", { href: `#/models/${published.model}/${published.version}` }, `${published.model}/${published.version}`),
      ` is published${published.live ? " and live" : ", but not live"}. ${percent(published.test.top1)} of the test images are right.`),
  ]);
  const hasLog = files.includes("output.log");
  refresh(parts.buttons, `${isFinished(job)} ${hasLog}`, () => [
    !isFinished(job) && h("button", { type: "button", onclick: cancel }, "Cancel the training"),
    hasLog && h("button", { type: "button", onclick: () => showLog(parts.log, id) }, "Show the log"),
  ]);
  parts.charts.replaceChildren(...chartsOf(job, epochs, ticks));
  refresh(parts.pictures, files.join(), () => runPictures(job));
}

function timesOf({ created, started, finished }) {
  if (!finished) return `since ${when(started ?? created)}`;
  return when(finished) + (started ? `, after ${duration((new Date(finished) - new Date(started)) / 1000)}` : "");
}

function progressOf({ state, phase, epochs, progress }) {
  if (state !== "running") return [h("p", {}, "It starts when the trainings before it have ended.")];
  const { epoch, step, steps, done, images, message, remaining_s: left } = progress ?? {};
  const part = phase === "training" && epoch ? (epoch - 1 + (steps ? step / steps : 1)) / epochs : images ? done / images : null;
  return [
    h("ol", { class: "phases", "aria-label": "Phases" }, PHASES.map((each) =>
      h("li", each === phase ? { "aria-current": "step" } : {}, each))),
    h("progress", { value: part, "aria-label": "Progress" }),
    h("p", { class: "quiet" }, message && `${sentence(message)} `, epoch > 0 && `Epoch ${epoch} of ${epochs}. `,
      left > 0 && `${duration(left)} left${phase === "training" ? "" : " for this step"}.`),
  ];
}

function chartsOf(job, epochs, ticks) {
  if (epochs.length + ticks.length === 0) return [];
  const training = ticks.length ? ticks.map(({ epoch, step, steps, loss, accuracy }) => ({ epoch: epoch - 1 + step / steps, loss, accuracy }))
    : epochs.map(({ epoch, train_loss, train_accuracy }) => ({ epoch, loss: train_loss, accuracy: train_accuracy }));
  const extent = isFinished(job) && ticks.length === 0 ? [] : [0, job.epochs];
  return [["Accuracy", "accuracy", "top1", SHARES], ["Loss", "loss", "loss", LOSSES]].map(([title, trained, evaluated, format]) =>
    curves(title, [
      { name: "training", points: training.map((each) => [each.epoch, each[trained]]) },
      { name: "evaluation", points: epochs.map((each) => [each.epoch, each[evaluated]]) },
    ], format, extent));
}

async function showLog(place, id) {
  try {
    place.replaceChildren(h("pre", { tabindex: 0, role: "region", "aria-label": "Log" }, await text(`train/${id}/files/output.log`)));
  } catch (error) {
    notify(error.message);
  }
}
