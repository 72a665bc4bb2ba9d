// Shows the answer of /predict for one picture: the most probable classes of one model, or of several side by side.

import { h, load, notify } from "./dom.js";
import { percent, sentence, superclassWords, words } from "./text.js";

const SHOWN = 5;

async function callFromProgram(model) {
  try {
    const [{ showProgram }] = await load(import("./program.js"));
    showProgram(model);
  } catch (error) {
    notify(error.message);
  }
}

/** Show the place of an answer that has been asked for. */
export function showWaiting(place, preview) {
  place.className = "answer waiting";
  place.replaceChildren(seen(preview), h("ol", { class: "bars", "aria-label": "The answer is on its way" },
    Array.from({ length: SHOWN }, () => h("li", {}, h("span", { class: "name" }, " "), h("span", { class: "bar" })))));
}

/**
 * Show answers, each with model, version, milliseconds, classes, familiar and warnings. `explain` is called with an
 * answer, a class and the button, and `correct` with an answer; it is null if the service takes no corrections.
 */
export function showAnswers(place, preview, answers, explain, correct) {
  const isOne = answers.length === 1;
  place.className = `answer${isOne ? "" : " several"}`;
  place.replaceChildren(seen(preview), ...answers.map((answer) => showAnswer(answer, isOne, explain, correct)));
}

function seen(preview) {
  return h("figure", { class: "seen" }, preview, h("figcaption", { class: "quiet" }, "What the network sees"));
}

function showAnswer(answer, isOne, explain, correct) {
  const { model, version, milliseconds, classes, warnings, familiar } = answer;
  const list = h("ol", { class: "bars" }, classes.slice(0, SHOWN).map((each) => row(answer, each, explain)));
  return h("div", { class: "one" },
    !isOne && h("h2", {}, model),
    familiar === false && h("p", { class: "strange" },
      h("strong", {}, "Probably none of the 100 classes."), " These are the nearest:"),
    list,
    h("p", { class: "quiet" }, `${model}, version ${version}. ${milliseconds.toFixed(1)} ms on the server. `,
      isOne && h("button", { type: "button", class: "link", onclick: () => callFromProgram(model) }, "From a program")),
    isOne && correct && h("p", { class: "quiet" }, "Is the answer wrong? ",
      h("button", { type: "button", class: "link", onclick: () => correct(answer) }, "Send the right class")),
    warnings.map((warning) => h("p", { class: "quiet" }, sentence(warning))));
}

function row(answer, predicted, explain) {
  const { label, superclass, probability } = predicted;
  return h("li", {},
    h("span", { class: "name" }, words(label), " ", h("small", {}, superclassWords(superclass))),
    h("span", { class: "share" }, percent(probability)),
    h("span", { class: "bar" }, h("span", { style: { width: `${100 * probability}%` } })),
    h("button", { type: "button", class: "why", "aria-pressed": "false", "aria-label": `Why ${words(label)}?`,
      onclick: (event) => explain(answer, predicted, event.currentTarget) }, "Why?"));
}
