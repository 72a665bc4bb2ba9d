// Builds elements. The page's policy forbids style attributes, so styles are set as properties.

import { sentence } from "./text.js";

const SVG = "http://www.w3.org/2000/svg";

function fill(element, { style = {}, ...properties }, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  for (const [name, value] of Object.entries(style)) element.style.setProperty(name, value);
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
}

/** Return an HTML element. A property whose value is a function is an event handler, such as `onclick`. */
export const h = (tag, properties = {}, ...children) => fill(document.createElement(tag), properties, children);

/** Return an SVG element. */
export const svg = (tag, properties = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), properties, children);

/** Append children to an element. Those that are false or missing are left out. */
export const add = (element, ...children) => fill(element, {}, children);

export const byId = (id) => document.getElementById(id);

/** Show a message above the view. An empty text hides it. */
export function notify(text) {
  byId("notice").textContent = text;
}

/** Return an alert with an error in words and, if given, a button that tries again. */
export function problem(error, retry) {
  return h("div", { class: "problem", role: "alert" },
    h("p", {}, sentence(error.message)),
    retry && h("p", {}, h("button", { type: "button", onclick: retry }, "Try again")));
}

/** Wait for modules that are loaded when they are needed. Reject with a sentence if they cannot be loaded. */
export async function load(...modules) {
  try {
    return await Promise.all(modules);
  } catch {
    throw new Error("A part of the page cannot be loaded. Check the connection to the service, then try again.");
  }
}

/**
 * Show what `build` returns, unless the place shows it for the same key already. A button in it thus keeps its focus, and
 * an image is not loaded again. If the focused element disappears, the heading of the view gets the focus.
 */
export function refresh(place, key, build) {
  if (place.dataset.key === key) return;
  const hadFocus = place.contains(document.activeElement);
  place.dataset.key = key;
  place.replaceChildren();
  add(place, build());
  if (hadFocus) place.closest(".view").querySelector("h1").focus({ preventScroll: true });
}

/** Show a wide dialog with a title and a button that closes it. */
export function showDialog(title, ...children) {
  const dialog = h("dialog", { class: "wide", "aria-labelledby": "dialog-title", onclose: () => dialog.remove() },
    h("form", { method: "dialog" }, h("h2", { id: "dialog-title" }, title), h("button", {}, "Close")), children);
  document.body.append(dialog);
  dialog.showModal();
}

/** Return a table in a region that scrolls where the screen is narrow. */
export function table(caption, head, rows) {
  return h("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": caption },
    h("table", {},
      h("caption", { class: "hidden" }, caption),
      h("thead", {}, h("tr", {}, head.map((cell) => h("th", { scope: "col" }, cell)))),
      h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell, column) =>
        column ? h("td", {}, cell) : h("th", { scope: "row" }, cell)))))));
}
