// The view Evaluate: measures a version on a zip of labeled photos or on the data set, and shows the result.

import { call } from "./api.js";
import { bySuperclass, confusion, reliability } from "./charts.js";
import { add, h, notify, problem, refresh, table } from "./dom.js";
import { isFinished, jobList, stateOf } from "./jobs.js";
import { noModel } from "./nomodel.js";
import { count, percent, sentence, superclassWords, when, words } from "./text.js";

const MAX_CLASSES = 30; // a larger matrix is shown by superclass
const POLL_MS = 1000;
const SOURCES = { zip: "your photos", test: "test images", train: "training images" };

let offered = null; // a zip that was dropped on the page

/** Keep a zip for the next time that the view is shown. */
export function offerZip(file) {
  offered = file;
}

/** Show the form and the latest evaluations, or the evaluation of the path. */
export async function show(place, [id], parameters) {
  return id ? showEvaluation(place, id) : showForm(place, parameters);
}

async function showForm(place, { model, version }) {
  const [models, jobs] = await Promise.all([call("models"), call("evaluate/jobs?limit=20")]);
  const versions = models.flatMap(({ name, versions: all, live }) => all.map((each) => ({ name, version: each, isLive: each === live })));
  const wanted = model ? `${model}/${version}` : "";
  const select = h("select", { id: "version" }, versions.sort((a, b) => b.isLive - a.isLive).map(({ name, version: each, isLive }) =>
    h("option", { value: `${name}/${each}`, selected: `${name}/${each}` === wanted }, `${name}/${each}`, isLive && " (live)")));
  const input = h("input", { type: "file", id: "zip", required: true, accept: ".zip,application/zip" });
  const limit = h("input", { type: "number", id: "limit", required: true, min: 1, step: 1, value: 1000 });
  const fault = h("div", { id: "fault" });
  if (offered) input.files = fileList(offered);
  offered = null;

  if (versions.length === 0) {
    add(place, h("h1", { tabindex: -1 }, "Evaluate a model"), noModel(await call("health"), () => dispatchEvent(new HashChangeEvent("hashchange"))));
    return;
  }

  const measure = (query, body) => async (event) => {
    event.preventDefault();
    const button = event.submitter;
    button.disabled = true;
    fault.replaceChildren(h("p", { role: "status" }, "Sending and measuring …"));
    try {
      const [name, number] = select.value.split("/");
      const job = await call(`evaluate?${new URLSearchParams({ model: name, version: number, ...query() })}`, { method: "POST", body: body() });
      location.hash = `#/evaluate/${job.id}`;
    } catch (error) {
      fault.replaceChildren(problem(error));
      button.disabled = false;
    }
  };
  const formData = () => {
    const form = new FormData();
    form.append("file", input.files[0]);
    return form;
  };

  place.append(h("h1", { tabindex: -1 }, "Evaluate a model"),
    h("p", { class: "field compare" }, h("label", { for: "version" }, "Version"), select),
    fault,
    h("div", { class: "columns" },
      h("form", { class: "card", "aria-labelledby": "own", onsubmit: measure(() => ({}), formData) },
        h("h2", { id: "own" }, "On your own photos"),
        h("p", {}, "Choose a zip, or drop it anywhere. Its folders have the names of classes, such as ", h("code", {}, "apple/1.jpg"), "."),
        h("p", { class: "field" }, h("label", { for: "zip" }, "Zip with photos"), input),
        h("p", { class: "buttons" }, h("button", { class: "primary" }, "Evaluate the photos"))),
      h("form", { class: "card", "aria-labelledby": "set", onsubmit: measure(() => ({ split: "test", limit: limit.value }), () => undefined) },
        h("h2", { id: "set" }, "On the test images of CIFAR-100"),
        h("p", { class: "field" }, h("label", { for: "limit" }, "Number of images, chosen at random"), limit),
        h("p", { class: "buttons" }, h("button", {}, "Evaluate the test images")))),
    h("p", { class: "quiet" }, "Evaluating needs a key if the service has keys."),
    h("h2", {}, "Evaluations"),
    jobs.length ? jobList(jobs, describeJob) : h("p", {}, "None yet."));
}

function describeJob({ id, model, version, split, created, result, error }) {
  return {
    href: `#/evaluate/${id}`,
    name: `${model}/${version} on ${SOURCES[split] ?? "images"}`,
    details: [when(created), result && `. ${percent(result.top1)} of ${count(result.images)} right`, error && `. ${sentence(error)}`],
  };
}

function fileList(file) {
  const transfer = new DataTransfer();
  transfer.items.add(file);
  return transfer.files;
}

async function showEvaluation(place, id) {
  const path = `evaluate/${encodeURIComponent(id)}`;
  const body = h("div", { class: "stack" });
  const progress = h("progress", { "aria-label": "Progress" });
  const done = h("p", {});
  const said = h("p", { class: "hidden", role: "status" });
  let timer = 0;
  let job = await call(path);
  place.append(h("p", {}, h("a", { href: "#/evaluate" }, "All evaluations")),
    h("h1", { tabindex: -1 }, describeJob(job).name), body, said);

  const cancel = async () => {
    try {
      job = await call(path, { method: "DELETE" });
    } catch (error) {
      notify(error.message);
    }
  };
  const update = async () => {
    const state = sentence(job.phase ?? stateOf(job));
    if (said.textContent !== state) said.textContent = state; // a screen reader reads every change
    if (!isFinished(job)) {
      refresh(body, "unfinished", () => h("div", { class: "card" }, progress, done,
        h("p", { class: "buttons" }, h("button", { type: "button", onclick: cancel }, "Cancel the evaluation"))));
      if (job.images) Object.assign(progress, { max: job.images, value: job.done });
      done.textContent = `${state} ${count(job.done)} images so far.`;
      timer = setTimeout(async () => {
        job = await call(path).catch(() => job);
        update();
      }, POLL_MS);
      return;
    }
    refresh(body, "finished", () => job.error ? problem(new Error(job.error)) : !job.result && h("p", {}, "The evaluation was canceled."));
    if (job.result) await showResult(body, job).catch((error) => body.append(problem(error)));
  };
  await update();
  return () => clearTimeout(timer);
}

async function showResult(body, { model, version, engine, result }) {
  const { images, top1, top5, ece, classes, images_per_class: numbers, per_class: rates, confusion: counts, mistakes, reliability: bins } = result;
  const missed = (id) => {
    const [worst] = counts[id].map((number, answer) => ({ number, answer })).filter(({ answer }) => answer !== id).sort((a, b) => b.number - a.number);
    return worst.number ? `${words(classes[worst.answer])} (${worst.number})` : "–";
  };
  body.append(
    h("dl", { class: "facts" }, [
      ["Right", percent(top1)],
      ["Images", `${count(Math.round(top1 * images))} of ${count(images)} right`],
      ["Right among the first five", percent(top5)],
      ["Calibration error", percent(ece)],
      ["Computed by", engine],
    ].map(([name, value]) => h("div", {}, h("dt", { class: "quiet" }, name), h("dd", {}, value)))));
  if (mistakes?.length) {
    body.append(h("h2", {}, "The most confident mistakes"), table("The most confident mistakes", ["Image", "Class", "Answer", "Probability"],
      mistakes.map(({ file, label, predicted, probability }) => [file, words(label), words(predicted), percent(probability)])));
  }
  if (!counts) return; // an evaluation of an early release
  const present = classes.map((_, id) => id).filter((id) => numbers[id] > 0);
  if (bins) body.append(h("div", { class: "charts" }, reliability(bins)));
  body.append(h("h2", {}, "Confusions"));
  if (present.length <= MAX_CLASSES) {
    const answers = counts[0].map((_, id) => id).filter((id) => numbers[id] > 0 || present.some((truth) => counts[truth][id] > 0));
    body.append(confusion(answers.map((id) => classes[id]), answers.map((truth) => answers.map((answer) => counts[truth][answer]))));
  } else {
    const { superclasses } = await call(`models/${model}/${version}`);
    const { labels, counts: sums } = bySuperclass(counts, superclasses);
    body.append(confusion(labels.map(superclassWords), sums));
  }
  body.append(h("h2", {}, "By class"), table("Accuracy by class", ["Class", "Images", "Right", "Most often answered as"],
    [...present].sort((a, b) => rates[a] - rates[b]).map((id) => [words(classes[id]), count(numbers[id]), percent(rates[id]), missed(id)])));
}
