// Shows a picture with the square that the network sees, which can be moved and resized by pointer and keyboard.

import { h } from "./dom.js";
import { centerCrop, limitCrop } from "./pictures.js";

const STEP = 1 / 32; // of the square, as the network sees it
const GROWTH = 1.1;
const CORNERS = ["nw", "ne", "sw", "se"];
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** Show a picture in `stage`. `onmove` is called with every new square, `onchange` after the last of a movement. */
export class CropBox {
  constructor(stage, onmove, onchange) {
    this.stage = stage;
    this.onmove = onmove;
    this.onchange = onchange;
    this.square = h("div", { class: "square", role: "slider", tabindex: 0, "aria-label": "Square that the network sees",
      "aria-describedby": "crop-keys", onkeydown: (event) => this.press(event),
      onpointerdown: (event) => this.grab(event) },
    CORNERS.map((corner) => h("span", { class: `corner ${corner}`, "data-corner": corner })));
  }

  show(picture, crop) {
    this.picture = picture;
    this.crop = limitCrop(crop, picture);
    picture.canvas.setAttribute("role", "img");
    picture.canvas.setAttribute("aria-label", `Your photo ${picture.name}`);
    picture.canvas.onclick = (event) => this.center(event);
    this.stage.style.setProperty("--ratio", picture.width / picture.height);
    this.stage.replaceChildren(picture.canvas, this.square);
    this.draw();
  }

  /** Lay an element over the square, or remove it. */
  cover(element) {
    this.square.querySelector(".cover")?.remove();
    if (element) this.square.prepend(element);
  }

  set(crop, isLast = true) {
    this.crop = limitCrop(crop, this.picture);
    this.draw();
    this.onmove(this.crop);
    if (isLast) this.onchange(this.crop);
  }

  reset() {
    this.set(centerCrop(this.picture));
  }

  /** Make the square larger or smaller around its center. */
  scale(factor) {
    const { x, y, size } = this.crop;
    const { size: side } = limitCrop({ ...this.crop, size: size * factor }, this.picture);
    this.set({ x: x + (size - side) / 2, y: y + (size - side) / 2, size: side });
  }

  draw() {
    const { x, y, size } = this.crop;
    const { width, height } = this.picture;
    const { style } = this.square;
    style.left = `${(100 * x) / width}%`;
    style.top = `${(100 * y) / height}%`;
    style.width = `${(100 * size) / width}%`;
    style.height = `${(100 * size) / height}%`;
    const share = Math.round((100 * size) / Math.min(width, height));
    const [left, top] = [x / width, y / height].map((part) => Math.round(100 * part));
    const values = { valuemin: 1, valuemax: 100, valuenow: share };
    values.valuetext = `${share} % of the shorter side, ${left} % from the left, ${top} % from the top`;
    for (const [name, value] of Object.entries(values)) this.square.setAttribute(`aria-${name}`, value);
  }

  press(event) {
    const { x, y, size } = this.crop;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in ARROWS) {
      const step = size * STEP * (event.shiftKey ? 4 : 1);
      const [right, down] = ARROWS[event.key];
      this.set({ x: x + right * step, y: y + down * step, size });
    } else if (event.key === "+" || event.key === "=") this.scale(GROWTH);
    else if (event.key === "-") this.scale(1 / GROWTH);
    else if (event.key === "Home") this.reset();
    else return;
    event.preventDefault();
  }

  /** Move the center of the square to the point that was clicked. */
  center(event) {
    const [x, y] = this.point(event);
    this.set({ x: x - this.crop.size / 2, y: y - this.crop.size / 2, size: this.crop.size });
  }

  point(event) {
    const box = this.picture.canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) / box.width) * this.picture.width,
      ((event.clientY - box.top) / box.height) * this.picture.height,
    ];
  }

  grab(event) {
    if (event.button !== 0) return;
    const start = this.crop;
    const [fromX, fromY] = this.point(event);
    const corner = event.target.dataset.corner;
    const move = (moved) => {
      const [x, y] = this.point(moved);
      this.set(corner ? this.stretch(start, corner, x, y) : { ...start, x: start.x + x - fromX, y: start.y + y - fromY }, false);
    };
    const release = () => {
      this.square.removeEventListener("pointermove", move);
      this.square.removeEventListener("pointerup", release);
      this.square.removeEventListener("pointercancel", release);
      if (this.crop !== start) this.onchange(this.crop);
    };
    this.square.setPointerCapture(event.pointerId);
    this.square.addEventListener("pointermove", move);
    this.square.addEventListener("pointerup", release);
    this.square.addEventListener("pointercancel", release);
  }

  /** Return the square whose corner is at a point, or as near as the picture allows. The opposite corner stays. */
  stretch({ x, y, size }, corner, toX, toY) {
    const isWest = corner.includes("w");
    const isNorth = corner.includes("n");
    const fixedX = isWest ? x + size : x;
    const fixedY = isNorth ? y + size : y;
    const room = Math.min(isWest ? fixedX : this.picture.width - fixedX, isNorth ? fixedY : this.picture.height - fixedY);
    const wanted = Math.max((toX - fixedX) * (isWest ? -1 : 1), (toY - fixedY) * (isNorth ? -1 : 1));
    const { size: side } = limitCrop({ x: 0, y: 0, size: Math.min(room, wanted) }, this.picture);
    return { x: isWest ? fixedX - side : fixedX, y: isNorth ? fixedY - side : fixedY, size: side };
  }
}
