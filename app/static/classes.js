// Lists the classes of a model by superclass, and shows them in a dialog.

import { call } from "./api.js";
import { h, problem, showDialog } from "./dom.js";
import { superclassWords, words } from "./text.js";

/** Return pairs of a superclass and its labels, in the order of the superclasses. */
export async function groupClasses(model, version) {
  const { classes, superclasses } = await call(`models/${model}/${version}`);
  return [...Map.groupBy(classes, (_, id) => superclasses[id])].sort();
}

/** Show the classes of the first live model. */
export async function showClasses(live) {
  const body = h("div", { class: "groups" });
  showDialog("The classes", body);
  const [name] = Object.keys(live);
  if (!name) return body.append(h("p", {}, "No model is live, so there are no classes to list."));
  try {
    for (const [superclass, labels] of await groupClasses(name, live[name].version)) {
      body.append(h("section", {}, h("h3", {}, superclassWords(superclass)), h("p", {}, labels.map(words).join(", "))));
    }
  } catch (error) {
    body.append(problem(error));
  }
}
