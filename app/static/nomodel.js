// Greets who opens a service that has no model to answer with.

import { h } from "./dom.js";
import { sentence } from "./text.js";

/** Return a text that says where the service looked for models, and what to do, given the answer of GET /health. */
export function noModel({ store, errors }, lookAgain) {
  return h("div", { class: "problem", role: "alert" },
    h("h2", {}, "No model is live yet"),
    h("p", {}, "The service looked for models in the folder ", h("code", {}, store ?? "that CIFAR100_MODELS names"), " and found none that it can serve."),
    Object.values(errors).map((error) => h("p", {}, sentence(error))),
    h("p", {}, "Train one: ", h("a", { href: "#/train" }, "start a training"),
      ", or run ", h("code", {}, "python -m training train resnet"),
      ". To use models that you have, set ", h("code", {}, "CIFAR100_MODELS"), " to their folder and start the service again."),
    h("p", {}, h("button", { type: "button", onclick: lookAgain }, "Look again")));
}
