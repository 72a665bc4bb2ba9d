// What trainings and evaluations have in common: their states in words, and the pictures of a run.

import { h } from "./dom.js";

const STATES = { queued: "Waiting", running: "Running", interrupted: "Interrupted, to be resumed", succeeded: "Finished",
  failed: "Failed", cancelled: "Canceled" };
const FINISHED = ["succeeded", "failed", "cancelled"];
// The pictures of a run without its curves, which the page draws itself.
const PICTURES = { "superclasses.png": "Confusions between superclasses", "reliability.png": "Reliability",
  "classes.png": "Accuracy by class", "mistakes.png": "The most confident mistakes" };

export const isFinished = ({ state }) => FINISHED.includes(state);

/** Return the state of a job in words, such as "Finished". */
export const stateOf = ({ state }) => STATES[state] ?? state;

/** Return a list of jobs. `describe` returns the link, the state and the details of one as { href, name, state, details }. */
export function jobList(jobs, describe) {
  return h("ul", { class: "jobs" }, jobs.map((job) => {
    const { href, name, state = stateOf(job), details } = describe(job);
    return h("li", {}, h("a", { href }, name), h("span", { class: `state ${job.state}` }, state), h("span", { class: "quiet" }, details));
  }));
}

/** Return the pictures of a finished training, where the service has them. */
export function runPictures({ id, files = [] }) {
  const names = files.filter((name) => name in PICTURES);
  return names.length === 0 ? [] : [h("h2", {}, "Pictures of the run"), h("div", { class: "pictures" }, names.map((name) => {
    const address = `./train/${id}/files/${name}`;
    return h("figure", {}, h("figcaption", {}, PICTURES[name]),
      h("a", { href: address }, h("img", { src: address, alt: `Diagram of the run: ${PICTURES[name]}`, loading: "lazy" })));
  }))];
}
