// Asks for the right class of a picture, in a dialog, and sends it to POST /feedback.

import { call } from "./api.js";
import { groupClasses } from "./classes.js";
import { h, notify, problem } from "./dom.js";
import { superclassWords, words } from "./text.js";

/** Show the classes of the model that answered. `encode` returns the square of the picture as a file. */
export async function askForClass({ model, version, classes: [{ label: answered }] }, encode) {
  const failure = h("div");
  const select = h("select", { id: "right-class", required: true }, h("option", { value: "" }, "Choose the class"));
  const send = h("button", { class: "primary", value: "send", disabled: true }, "Send");
  const dialog = h("dialog", { "aria-labelledby": "feedback-title", "aria-describedby": "feedback-kept", onclose: () => dialog.remove() },
    h("form", { method: "dialog", onsubmit: async (event) => {
      if (event.submitter !== send) return;
      event.preventDefault();
      send.disabled = true;
      failure.replaceChildren();
      try {
        const form = new FormData();
        form.append("file", await encode());
        await call(`feedback?${new URLSearchParams({ model, version, class: select.value })}`, { method: "POST", body: form });
        dialog.close();
        notify(`Thank you. The service keeps this picture as ${words(select.value)}.`);
      } catch (error) {
        failure.replaceChildren(problem(error));
        send.disabled = false;
      }
    } },
    h("h2", { id: "feedback-title" }, "What is in the picture?"),
    h("p", { class: "field" }, h("label", { for: "right-class" }, "Right class"), select),
    h("p", { class: "quiet", id: "feedback-kept" }, "The service keeps the 32×32 pixels that the network sees, this class and the "
      + `answer “${words(answered)}”. Its operator can train on them. It does not keep the photo.`),
    failure,
    h("p", { class: "buttons" }, send, h("button", { value: "cancel", formnovalidate: true }, "Cancel"))));
  document.body.append(dialog);
  dialog.showModal();
  try {
    select.append(...(await groupClasses(model, version)).map(([superclass, labels]) =>
      h("optgroup", { label: superclassWords(superclass) }, labels.map((label) => h("option", { value: label }, words(label))))));
    send.disabled = false;
  } catch (error) {
    failure.replaceChildren(problem(error));
  }
}
