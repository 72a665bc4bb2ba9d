// Shows how a program asks for the same answer, in a dialog.

import { h, showDialog } from "./dom.js";

/** Show calls of /predict with a model: for a terminal, and in Python. */
export function showProgram(model) {
  const address = new URL(`predict?model=${model}`, document.baseURI).href;
  showDialog("From a program",
    code("In a terminal", `curl -F file=@photo.jpg '${address}'`),
    code("In Python", `import httpx\n\nwith open("photo.jpg", "rb") as photo:\n    answer = httpx.post("${address}", files={"file": photo}).json()\n`
      + `print(answer["predictions"][0]["classes"][0])`),
    h("p", {}, "The service cuts out the central square itself. If it wants a key, send the header ", h("code", {}, "Authorization: Bearer KEY"),
      ". ", h("a", { href: "./docs" }, "Docs"), " has all calls."));
}

const code = (title, text) => [h("h3", {}, title), h("pre", { tabindex: 0, role: "region", "aria-label": title }, text)];
