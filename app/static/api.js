// Calls the service. Addresses are relative to the page, which a proxy may publish under a prefix. Every failure is an
// Error whose message is a sentence for the reader.

import { h } from "./dom.js";
import { sentence } from "./text.js";

const KEY = `key of ${location.pathname}`; // the tab keeps it; other services of this host have other paths

export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Return the parsed JSON of an answer. Ask for a key where the service wants one, and repeat the call with it. */
export async function call(path, options = {}) {
  return (await send(path, options)).json();
}

export const text = async (path) => (await send(path)).text();

export const sendJson = (method, path, body) =>
  call(path, { method, body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });

async function send(path, options = {}) {
  const key = readKey();
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(`./${path}`, { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError(navigator.onLine
      ? "The service does not answer. Check that it is running, then try again."
      : "This device is offline. Connect it, then try again.");
  }
  if (response.ok) return response;
  const detail = await describe(response);
  if (response.status !== 401) throw new ApiError(detail, response.status);
  if (!(await askForKey(detail, key))) throw new ApiError(`${sentence(detail)} You gave none.`, 401);
  return send(path, options);
}

async function describe(response) {
  const type = response.headers.get("Content-Type") ?? "";
  if (/json/.test(type)) {
    const { detail } = await response.json();
    if (typeof detail === "string") return sentence(detail);
  }
  return `Something between this page and the service answered instead of it (status ${response.status}). `
    + "Try again in a minute.";
}

let heldKey = ""; // where the browser forbids storage

function readKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return heldKey;
  }
}

function keepKey(key) {
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    heldKey = key;
  }
}

let asking = null;

/** Show a dialog that asks for a key. Calls that wait for a key share one dialog. Resolve to false if it is closed. */
function askForKey(detail, refused) {
  if (readKey() !== refused) return Promise.resolve(true); // another call has asked meanwhile
  asking ??= new Promise((resolve) => {
    const input = h("input", { type: "password", id: "key", required: true, autocomplete: "off", minlength: 16 });
    const dialog = h("dialog", { "aria-labelledby": "key-title", "aria-describedby": "key-reason", onclose: () => {
      dialog.remove();
      asking = null;
      resolve(dialog.returnValue === "use");
    } },
    h("form", { method: "dialog", onsubmit: (event) => {
      if (event.submitter?.value === "use") keepKey(input.value);
    } },
    h("h2", { id: "key-title" }, "This call needs a key"),
    h("p", { id: "key-reason" }, refused ? sentence(detail) : "This service wants an API key for training, canceling, promoting and "
      + "evaluating, and for predicting if it is configured so."),
    h("p", { class: "field" }, h("label", { for: "key" }, "API key"), input),
    h("p", { class: "quiet" }, "The operator of the service sets the keys in CIFAR100_API_KEYS. This tab keeps yours until you close it."),
    h("p", { class: "buttons" },
      h("button", { class: "primary", value: "use" }, "Use the key"),
      h("button", { value: "cancel", formnovalidate: true }, "Cancel"))));
    document.body.append(dialog);
    dialog.showModal();
  });
  return asking;
}
