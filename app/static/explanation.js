// Draws the map of POST /explain: orange regions speak for the class, blue ones against it.

import { h } from "./dom.js";

const FOR = [255, 138, 0];
const AGAINST = [30, 110, 255];
const STRONGEST = 0.75; // opacity

/** Return a canvas for rows of numbers. A number is positive where the region speaks for the class. */
export function drawMap(map) {
  const canvas = h("canvas", { class: "cover", width: map[0].length, height: map.length, "aria-hidden": "true" });
  const largest = Math.max(...map.flat().map(Math.abs)) || 1;
  const pixels = map.flat().flatMap((value) => [
    ...(value < 0 ? AGAINST : FOR), Math.round(255 * STRONGEST * (Math.abs(value) / largest)),
  ]);
  canvas.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(pixels), map[0].length, map.length), 0, 0);
  return canvas;
}
