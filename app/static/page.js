// Sends a dropped or chosen image to /predict and shows the most probable classes. URLs are relative to the page, which
// a proxy may publish under a prefix.

const element = (id) => document.getElementById(id);
let image = null;
let asking = new AbortController();
let key = ""; // asked for where the service wants one

async function json(url, options = {}) {
  const response = await fetch(url, { ...options, headers: key ? { Authorization: `Bearer ${key}` } : {} });
  const body = await response.json();
  if (response.status === 401) {
    key = prompt(body.detail) ?? "";
    if (key) return json(url, options);
  }
  if (!response.ok) throw new Error(body.detail);
  return body;
}

function say(text, isError = false) {
  element("status").textContent = text;
  element("status").classList.toggle("error", isError);
}

async function listModels() {
  const { models } = await json("./health");
  const best = Object.keys(models).sort((a, b) => models[b].test_top1 - models[a].test_top1);
  element("model").replaceChildren(
    ...best.map((name) => new Option(`${name} (${(100 * models[name].test_top1).toFixed(1)} % on the test set)`, name)),
  );
}

function show(classes) {
  element("classes").replaceChildren(
    ...classes.map(({ label, superclass, probability }) => {
      const row = document.createElement("li");
      const name = document.createElement("span");
      const group = document.createElement("small");
      group.textContent = ` ${superclass.replaceAll("_", " ")}`;
      name.append(label.replaceAll("_", " "), group);
      const percent = document.createElement("span");
      percent.textContent = `${(100 * probability).toFixed(1)} %`;
      const bar = document.createElement("meter");
      bar.value = probability;
      row.append(name, percent, bar);
      return row;
    }),
  );
}

async function classify() {
  if (!image) return;
  asking.abort(); // the answer about another image or of another model
  asking = new AbortController();
  const { signal } = asking;
  const form = new FormData();
  form.append("file", image);
  say("…");
  try {
    const chosen = element("model").value; // none while no model is live
    const query = new URLSearchParams(chosen ? { model: chosen } : {});
    const { model, version, milliseconds, predictions } = await json(`./predict?${query}`, { method: "POST", body: form, signal });
    show(predictions[0].classes);
    say([`${model}, version ${version}, ${milliseconds.toFixed(1)} ms`, ...predictions[0].warnings].join("; "));
  } catch (error) {
    if (signal.aborted) return;
    show([]);
    say(error.message, true);
  }
}

function choose(file) {
  if (!file) return;
  image = file;
  URL.revokeObjectURL(element("preview").src);
  element("preview").src = URL.createObjectURL(file);
  element("preview").hidden = false;
  element("hint").hidden = true;
  classify();
}

const drop = element("drop");
for (const type of ["dragenter", "dragover"]) {
  drop.addEventListener(type, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  choose(event.dataTransfer.files[0]);
});
element("file").addEventListener("change", (event) => choose(event.target.files[0]));
element("model").addEventListener("change", classify);
listModels().catch((error) => say(error.message, true));
