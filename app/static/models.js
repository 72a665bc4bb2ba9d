// The view Models: all versions, the card of one version, and two versions side by side.

import { call, sendJson } from "./api.js";
import { bars, bySuperclass, confusion, curves, LOSSES, reliability, SHARES } from "./charts.js";
import { add, h, notify, problem, table } from "./dom.js";
import { runPictures } from "./jobs.js";
import { noModel } from "./nomodel.js";
import { count, percent, sentence, superclassWords, when, words } from "./text.js";

/** Show all models, or the version of the path, beside the version of the parameter `with`. */
export async function show(place, [name, version], { with: other }) {
  const models = await Promise.all((await call("models")).map((each) => call(`models/${each.name}`)));
  if (!name) return models.length ? showAll(place, models) : showEmpty(place);
  const cards = models.flatMap(({ cards: all, live }) => all.map((card) => ({ ...card, live: live === card.version, id: `${card.name}/${card.version}` })));
  const card = cards.find(({ id }) => id === `${name}/${version}`);
  if (!card) throw new Error(`There is no version ${name}/${version}. The view Models lists all.`);
  return showCard(place, card, cards, cards.find(({ id }) => id === other));
}

function showAll(place, models) {
  place.append(h("h1", { tabindex: -1 }, "Models"),
    h("p", { class: "buttons" }, h("a", { class: "button", href: "#/evaluate" }, "Evaluate on your own photos"),
      h("span", { class: "quiet" }, "Promoting and evaluating need a key if the service has keys.")));
  const rows = models.flatMap(({ name, live, cards }) => [...cards].reverse().map((card) => [
    h("a", { href: `#/models/${name}/${card.version}` }, `${name}/${card.version}`),
    percent(card.test.top1),
    card.version === live ? h("strong", { class: "live" }, "Live") : promoteButton(name, card.version, live),
    percent(card.test.top5), percent(card.test.ece), card.parameters ? count(card.parameters) : "–",
    when(card.created), String(card.recipe.name ?? "–"),
  ]));
  add(place, models.filter(({ error }) => error).map(({ name, error }) => problem(new Error(`${name}: ${error}`))),
    rows.length > 0 && h("div", { class: "card" }, table("Versions of all models",
      ["Version", "Top-1", "Status", "Top-5", "Calibration error", "Parameters", "Published", "Recipe"], rows)));
}

async function showEmpty(place) {
  add(place, h("h1", { tabindex: -1 }, "Models"), noModel(await call("health"), () => dispatchEvent(new HashChangeEvent("hashchange"))));
}

function promoteButton(name, version, live) {
  return h("button", { type: "button", "aria-label": `Make ${name}/${version} live`, onclick: async ({ currentTarget }) => {
    currentTarget.disabled = true;
    try {
      await sendJson("PUT", `models/${name}/live`, { version });
      dispatchEvent(new HashChangeEvent("hashchange")); // show the view again
      setTimeout(() => notify(`${name}/${version} is live now${live ? `. Before it was ${name}/${live}` : ""}.`));
    } catch (error) {
      notify(error.message);
      currentTarget.disabled = false;
    }
  } }, live && version < live ? "Roll back" : "Make live");
}

async function showCard(place, card, cards, other) {
  const shown = other ? [card, other] : [card];
  add(place,
    h("p", {}, h("a", { href: "#/models" }, "All models")),
    h("h1", { tabindex: -1 }, shown.map(({ id }) => id).join(" and ")),
    h("p", { class: "field compare" }, h("label", { for: "other" }, "Compare with"),
      h("select", { id: "other", onchange: ({ target }) => {
        location.hash = `#/models/${card.id}${target.value ? `?with=${target.value}` : ""}`;
      } }, h("option", { value: "" }, "nothing"), cards.filter(({ id }) => id !== card.id).map(({ id }) =>
        h("option", { value: id, selected: id === other?.id }, id)))),
    other ? table("Figures", ["Figure", ...shown.map(({ id }) => id)], facts(shown))
      : h("dl", { class: "facts" }, facts(shown).map(([name, value]) => h("div", {}, h("dt", { class: "quiet" }, name), h("dd", {}, value)))),
    card.notes && !other && h("p", { class: "quiet" }, sentence(card.notes)),
    shown.some((each) => each.curve.length > 0) && [h("h2", {}, "Training"), h("div", { class: "charts" },
      curves("Accuracy", shown.flatMap((each) => curve(each, "top1", shown.length > 1)), SHARES),
      curves("Loss", shown.flatMap((each) => curve(each, "loss", shown.length > 1)), LOSSES))],
    h("details", {}, h("summary", {}, "The recipe"), recipeTable(shown)),
    h("h2", {}, "Accuracy by class"),
    other && h("p", { class: "key quiet" }, shown.map(({ id }, i) => [h("span", { class: `swatch s${i}` }), id])),
    h("div", { class: "groups" }, superclassesOf(shown)));
  if (!other) {
    const [evaluation, run] = [h("section", { class: "stack" }), h("section", { class: "stack" })];
    place.append(evaluation, run);
    await Promise.all([showEvaluation(evaluation, card), showRun(run, card)]);
  }
}

/** Return rows of a name and the value of each card. A row that no card has is left out. */
function facts(cards) {
  const rows = [
    ["Test images right", ({ test }) => percent(test.top1)],
    ["Right among the first five", ({ test }) => percent(test.top5)],
    ["Calibration error", (card) => `${percent(card.test.ece)}, ${percent(card.test_ece_uncalibrated)} before calibration`],
    ["Cost of int8", ({ int8 }) => int8 && (int8.accepted
      ? `${(100 * int8.lost_top1).toFixed(2)} points on ${count(int8.images)} images` : "too high, so there is no int8 form")],
    ["Members", ({ cascade }) => cascade && `${cascade.members.join(" and ")}; ${percent(cascade.test_sent_on)} of the images need both`],
    ["Called none of the classes", ({ familiarity }) => familiarity && `${percent(1 - familiarity.kept)} of ${count(familiarity.images)} held-out images`],
    ["Parameters", ({ parameters }) => parameters && count(parameters)],
    ["Published", ({ created }) => when(created)],
    ["Trained on", ({ device }) => device],
    ["Temperature", ({ temperature }) => temperature?.toFixed(2)],
    ["Status", ({ live }) => (live ? "live" : "not live")],
  ];
  return rows.map(([name, read]) => [name, ...cards.map((card) => read(card) || null)])
    .filter(([, ...values]) => values.some(Boolean))
    .map((row) => row.map((value) => value ?? "–"));
}

function curve({ curve: epochs, id }, measure, isOneOfTwo) {
  const training = { top1: "train_accuracy", loss: "train_loss" }[measure];
  const evaluation = { name: isOneOfTwo ? id : "evaluation", points: epochs.map((each) => [each.epoch, each[measure]]) };
  return isOneOfTwo ? [evaluation] : [{ name: "training", points: epochs.map((each) => [each.epoch, each[training]]) }, evaluation];
}

function recipeTable(shown) {
  const names = [...new Set(shown.flatMap(({ recipe }) => Object.keys(recipe)))];
  const value = ({ recipe }, name) => String(recipe[name] ?? "–");
  return table("Recipe", ["Setting", ...shown.map(({ id }) => id)], names.map((name) => [words(name), ...shown.map((card) => value(card, name))]));
}

function superclassesOf(shown) {
  const [{ classes, superclasses }] = shown;
  const groups = Map.groupBy(classes.keys(), (id) => superclasses[id]);
  return [...groups].sort().map(([superclass, ids]) => h("section", {}, h("h3", {}, superclassWords(superclass)),
    bars(ids.map((id) => ({ name: classes[id], shares: shown.map(({ test }) => test.per_class[id]) })))));
}

/** Show what the latest evaluation of a version on this service has that its card lacks. */
async function showEvaluation(place, { name, version, superclasses }) {
  try {
    const jobs = await call("evaluate/jobs");
    const latest = jobs.find((job) => job.model === name && job.version === version && job.state === "succeeded");
    const { result } = latest ? await call(`evaluate/${latest.id}`) : {};
    if (!result?.confusion) {
      place.append(h("h2", {}, "Reliability and confusions"), h("p", {}, "An evaluation shows how far the probabilities can be trusted, and which "
        + "classes are confused. ", h("a", { href: `#/evaluate?model=${name}&version=${version}` }, `Evaluate ${name}/${version}`), "."));
      return;
    }
    const { labels, counts } = bySuperclass(result.confusion, superclasses);
    add(place, h("h2", {}, "The latest evaluation"),
      h("p", {}, h("a", { href: `#/evaluate/${latest.id}` }, `${count(result.images)} images (${latest.split})`), `, ${when(latest.created)}.`),
      result.reliability && h("div", { class: "charts" }, reliability(result.reliability)),
      h("h3", {}, "Confusions between superclasses"), confusion(labels.map(superclassWords), counts));
  } catch (error) {
    place.append(problem(error));
  }
}

/** Show the pictures of the training that published a version, where the service still has it. */
async function showRun(place, { name, version }) {
  const jobs = await call("train").catch(() => []);
  const job = jobs.find(({ published }) => published?.model === name && published.version === version);
  if (!job) return;
  place.append(h("p", {}, h("a", { href: `#/train/${job.id}` }, "The training of this version")));
  add(place, runPictures(await call(`train/${job.id}`).catch(() => ({}))));
}
