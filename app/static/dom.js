// Builds elements, and puts numbers and names into words. The page's policy forbids style attributes, so styles are set
// as properties.

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

/** Return a share in 0-1 as a percentage with one decimal. */
export const percent = (share) => (share == null ? "–" : `${(100 * share).toFixed(1)}\u00a0%`);

export const words = (name) => name.replaceAll("_", " ");

const SUPERCLASSES = { vehicles_1: "vehicles", vehicles_2: "other vehicles" };
export const superclassWords = (name) => SUPERCLASSES[name] ?? words(name);

/** Return a text as a sentence: with a capital letter and a full stop. */
export function sentence(text) {
  const trimmed = text.trim();
  return trimmed.charAt(0).toUpperCase() + trimmed.slice(1) + (/[.!?]$/.test(trimmed) ? "" : ".");
}

/** Return seconds in words, such as "3 min 20 s". */
export function duration(seconds) {
  if (seconds == null) return "unknown";
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

export const count = (number) => number.toLocaleString("en-US");

export const when = (time) =>
  new Date(time).toLocaleString("en-US", { dateStyle: "medium", timeStyle: "short", hour12: false });

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

/** Return a table in a region that scrolls where the screen is narrow. */
export function table(caption, head, rows) {
  return h("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": caption },
    h("table", {},
      h("caption", { class: "hidden" }, caption),
      h("thead", {}, h("tr", {}, head.map((cell) => h("th", { scope: "col" }, cell)))),
      h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell, column) =>
        column ? h("td", {}, cell) : h("th", { scope: "row" }, cell)))))));
}
