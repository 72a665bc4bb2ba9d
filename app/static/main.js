// Shows the view that the address names, and takes files that are dropped or pasted anywhere.

import { chooseFiles, show as showClassify } from "./classify.js";
import { byId, h, load, notify, problem } from "./dom.js";

const VIEWS = {
  train: { title: "Train", open: () => import("./train.js") },
  models: { title: "Models", open: () => import("./models.js") },
  evaluate: { title: "Evaluate", open: () => import("./evaluate.js") },
};

let styles = null; // those of the views that are loaded later
let leave = null; // ends what the view before has started

/** Split an address such as #/models/resnet/4?with=resnet18/5 into its path and its parameters. */
function readAddress() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  return { path: path.split("/").filter(Boolean).map(decodeURIComponent), parameters: Object.fromEntries(new URLSearchParams(query)) };
}

function loadStyles() {
  styles ??= new Promise((resolve, reject) => {
    document.head.append(h("link", { rel: "stylesheet", href: "./static/views.css", onload: resolve,
      onerror: () => { styles = null; reject(); } }));
  });
  return styles;
}

async function route(event) {
  if (location.hash && !location.hash.startsWith("#/")) return; // a link within the page
  const { path: [name = "classify", ...path], parameters } = readAddress();
  const view = VIEWS[name];
  leave?.();
  leave = null;
  notify("");
  for (const link of document.querySelectorAll("nav a[data-view]")) {
    const isShown = link.dataset.view === (name === "evaluate" ? "models" : name);
    if (isShown) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${view?.title ?? "Classify"} – CIFAR-100`;
  byId("classify").hidden = Boolean(view);
  byId("view").hidden = !view;
  const place = h("div", { class: `view ${name}` });
  byId("view").replaceChildren(place);
  if (view) {
    const isCurrent = () => place.isConnected; // the reader has not gone on to another view meanwhile
    byId("view").setAttribute("aria-busy", true);
    try {
      const [{ show }] = await load(view.open(), loadStyles());
      const end = await show(place, path, parameters);
      if (isCurrent()) leave = end;
      else end?.();
    } catch (error) {
      place.replaceChildren(problem(error, route));
    }
    if (!isCurrent()) return;
    byId("view").setAttribute("aria-busy", false);
  } else await showClassify(parameters);
  if (event) (byId(view ? "view" : "classify").querySelector("h1") ?? byId("main")).focus({ preventScroll: true });
}

function takeFiles(files) {
  openFiles(files).catch((error) => notify(error.message));
}

async function openFiles(files) {
  const zip = files.find(({ name, type }) => /zip/.test(type) || /\.zip$/i.test(name));
  if (zip) {
    const [{ offerZip }] = await load(import("./evaluate.js"));
    offerZip(zip);
    if (location.hash === "#/evaluate") route();
    else location.hash = "#/evaluate";
    return;
  }
  if (byId("classify").hidden) {
    history.pushState(null, "", "#/");
    await route();
  }
  await chooseFiles(files);
}

const hasFiles = ({ dataTransfer }) => dataTransfer.types.includes("Files");
const hasAddress = ({ dataTransfer }) => ["text/uri-list", "text/html"].some((type) => dataTransfer.types.includes(type));

for (const type of ["dragenter", "dragover"]) {
  addEventListener(type, (event) => {
    if (!hasFiles(event) && !hasAddress(event)) return;
    event.preventDefault();
    document.body.classList.add("over");
  });
}
addEventListener("dragleave", ({ relatedTarget }) => relatedTarget || document.body.classList.remove("over"));
addEventListener("drop", (event) => {
  document.body.classList.remove("over");
  if (!hasFiles(event) && !hasAddress(event)) return;
  event.preventDefault();
  const files = [...event.dataTransfer.files];
  if (files.length) takeFiles(files);
  else notify("That is only the address of a picture. Save the picture first, then drop its file here.");
});
addEventListener("paste", ({ clipboardData }) => {
  const files = [...clipboardData.files];
  if (files.length) takeFiles(files);
});
addEventListener("offline", () => notify("This device is offline. The page works again when it is connected."));
addEventListener("online", () => notify(""));
addEventListener("hashchange", route);
route();
