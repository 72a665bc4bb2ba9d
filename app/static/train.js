// The view Train: a form made from the recipes, the jobs, and one job while it runs.
//
//   GET /train/recipes, openapi.json --> form --> POST /train --> job
//   GET /train/{id}/events --> curves, phase and time left until the event `end`

import { call, describeService, sendJson, text } from "./api.js";
import { curves, LOSSES, SHARES } from "./charts.js";
import { duration, h, notify, percent, problem, sentence, when, words } from "./dom.js";

const MAIN_FIELDS = ["epochs", "learning_rate", "batch_size", "width", "image_size"];
const PHASES = ["loading", "features", "training", "exporting", "quantizing", "measuring", "publishing"];
const EVENTS = ["phase", "preparation", "tick", "epoch"];
const NETWORKS = / \((shared-resnet|resnet|resnet18)(, [a-z0-9-]+)*\)\.$/; // in a description: the networks that have the field
const POLL_MS = 3000; // where the stream of events is refused
const PROMOTE = { "if-better": "If it is at least as accurate as the live version", always: "Always", never: "Never" };
const STATES = { queued: "Waiting", running: "Running", interrupted: "Interrupted, to be resumed", succeeded: "Finished",
  failed: "Failed", cancelled: "Canceled" };
const FINISHED = ["succeeded", "failed", "cancelled"];

/** Show the form and all jobs, or the job of the path. Returns a function that ends the updates. */
export async function show(place, [id]) {
  return id ? showJob(place, id) : showForm(place);
}

async function showForm(place) {
  const [{ components }, recipes, jobs] = await Promise.all([describeService(), call("train/recipes"), call("train?limit=20")]);
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
      h("div", { class: "fault" }),
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
      form.querySelector(".fault").replaceChildren(problem(error));
      button.disabled = false;
    }
  }

  draw();
  place.append(h("h1", { tabindex: -1 }, "Train a network"),
    h("div", { class: "columns" }, form, h("section", { "aria-labelledby": "jobs" },
      h("h2", { id: "jobs" }, "Trainings"),
      jobs.length ? h("ul", { class: "jobs" }, jobs.map(jobLine))
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

function jobLine({ id, state, phase, request, created, published, error }) {
  return h("li", {}, h("a", { href: `#/train/${id}` }, request.recipe),
    h("span", { class: `state ${state}` }, state === "running" && phase ? words(phase) : STATES[state] ?? state),
    h("span", { class: "quiet" }, when(created), published && `. ${published.model}/${published.version}, ${percent(published.test.top1)} right`,
      error && `. ${sentence(error)}`));
}

async function showJob(place, id) {
  let job = await call(`train/${encodeURIComponent(id)}`);
  let timer = 0;
  const ticks = [];
  const epochs = new Map(job.history.map((each) => [each.epoch, each]));
  const body = h("div", { class: "job" });
  const said = h("p", { class: "hidden", role: "status" });
  place.append(h("p", {}, h("a", { href: "#/train" }, "All trainings")), h("h1", { tabindex: -1 }, `Training of ${job.request.recipe}`), body, said);

  const draw = () => {
    const state = STATES[job.state] ?? job.state;
    if (!said.textContent.startsWith(state)) said.textContent = `${state}.`;
    drawJob(body, job, [...epochs.values()], ticks, cancel);
  };

  async function cancel() {
    try {
      job = await call(`train/${id}`, { method: "DELETE" });
    } catch (error) {
      notify(error.message);
    }
    draw();
  }

  async function poll() {
    job = await call(`train/${id}`).catch(() => job);
    for (const each of job.history) epochs.set(each.epoch, each);
    draw();
    if (!FINISHED.includes(job.state)) timer = setTimeout(poll, POLL_MS);
  }

  draw();
  if (FINISHED.includes(job.state)) return null;
  const source = new EventSource(`./train/${encodeURIComponent(id)}/events`);
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

function drawJob(body, job, epochs, ticks, cancel) {
  const { state, progress, published, error } = job;
  const isFinished = FINISHED.includes(state);
  const changes = Object.entries(job.request.overrides).map(([name, value]) => `${words(name)} ${value}`);
  const live = ticks.map(({ epoch, step, steps, loss, accuracy }) => ({ epoch: epoch - 1 + step / steps, loss, accuracy }));
  const extent = isFinished ? [] : [0, job.epochs];
  const training = live.length ? live : epochs.map(({ epoch, train_loss, train_accuracy }) => ({ epoch, loss: train_loss, accuracy: train_accuracy }));
  body.replaceChildren(
    h("div", { class: "card" },
      h("p", {}, h("strong", { class: `state ${state}` }, STATES[state] ?? state), ` ${timesOf(job)}`),
      changes.length > 0 && h("p", { class: "quiet" }, `Changed: ${changes.join(", ")}.`),
      !isFinished && progressOf(job, progress, epochs.length),
      error && h("div", { class: "problem" }, h("p", {}, sentence(error))),
      published && h("p", {}, h("a", { href: `#/models/${published.model}/${published.version}` }, `${published.model}/${published.version}`),
        ` is published${published.live ? " and live" : ", but not live"}. ${percent(published.test.top1)} of the test images are right.`),
      h("p", { class: "buttons" },
        !isFinished && h("button", { type: "button", onclick: cancel }, "Cancel the training"),
        job.files?.includes("output.log") && h("button", { type: "button", onclick: (event) => showLog(event.currentTarget, job.id) }, "Show the log"))),
    (epochs.length > 0 || live.length > 0) && h("div", { class: "charts" },
      curves("Accuracy", [
        { name: "training", points: training.map(({ epoch, accuracy }) => [epoch, accuracy]) },
        { name: "evaluation", points: epochs.map(({ epoch, top1 }) => [epoch, top1]) },
      ], SHARES, extent),
      curves("Loss", [
        { name: "training", points: training.map(({ epoch, loss }) => [epoch, loss]) },
        { name: "evaluation", points: epochs.map(({ epoch, loss }) => [epoch, loss]) },
      ], LOSSES, extent)),
    ...pictures(job));
}

function timesOf({ created, started, finished }) {
  if (!finished) return `since ${when(started ?? created)}`;
  return when(finished) + (started ? `, after ${duration((new Date(finished) - new Date(started)) / 1000)}` : "");
}

function progressOf({ state, phase, epochs }, progress, done) {
  if (state !== "running") return h("p", {}, "It starts when the trainings before it have ended.");
  const now = phase ?? (progress?.epoch ? "training" : "loading");
  const step = progress?.steps ? progress.epoch - 1 + progress.step / progress.steps : progress?.images ? progress.done / progress.images : done;
  const all = progress?.images && !progress.steps && progress.done != null ? 1 : epochs;
  return [
    h("ol", { class: "phases", "aria-label": "Phases" }, (phase ? PHASES : [now]).map((each) =>
      h("li", each === now ? { "aria-current": "step" } : {}, each))),
    h("progress", { max: all, value: Math.min(step, all), "aria-label": "Progress" }),
    h("p", { class: "quiet" }, progress?.message && `${sentence(progress.message)} `,
      progress?.epoch && `Epoch ${progress.epoch} of ${epochs}. `,
      progress?.remaining_s != null && now === "training" && `${duration(progress.remaining_s)} left.`),
  ];
}

/** Return the pictures of a finished run, where the service has them. */
export function pictures({ id, files = [] }) {
  const names = files.filter((name) => name.endsWith(".png") && name !== "curves.png"); // the page draws the curves itself
  return names.length === 0 ? [] : [h("h2", {}, "Pictures of the run"), h("div", { class: "pictures" }, names.map((name) => {
    const title = words(name.replace(".png", ""));
    const address = `./train/${id}/files/${name}`;
    return h("figure", {}, h("a", { href: address }, h("img", { src: address, alt: `Diagram of the run: ${title}`, loading: "lazy" })),
      h("figcaption", {}, title));
  }))];
}

async function showLog(button, id) {
  try {
    button.replaceWith(h("pre", { tabindex: 0, "aria-label": "Log" }, await text(`train/${id}/files/output.log`)));
  } catch (error) {
    notify(error.message);
  }
}
