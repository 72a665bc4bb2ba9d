// Lists the classes of a model by superclass, in a dialog.

import { call } from "./api.js";
import { h, problem, showDialog } from "./dom.js";
import { superclassWords, words } from "./text.js";

/** Show the classes of the first live model. */
export async function showClasses(live) {
  const body = h("div", { class: "groups" });
  showDialog("The classes", body);
  const [name] = Object.keys(live);
  if (!name) return body.append(h("p", {}, "No model is live, so there are no classes to list."));
  try {
    const { classes, superclasses } = await call(`models/${name}/${live[name].version}`);
    const groups = Map.groupBy(classes.keys(), (id) => superclasses[id]);
    for (const [superclass, ids] of [...groups].sort()) {
      body.append(h("section", {}, h("h3", {}, superclassWords(superclass)), h("p", {}, ids.map((id) => words(classes[id])).join(", "))));
    }
  } catch (error) {
    body.append(problem(error));
  }
}
