// Draws the map of POST /explain: orange regions speak for the class, blue ones against it.

import { h } from "./dom.js";

const FOR = [255, 138, 0];
const AGAINST = [30, 110, 255];
const STRONGEST = 0.75; // opacity
const ROWS = ["top", "middle", "bottom"];
const COLUMNS = ["left", "center", "right"];

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

/** Return the place of the largest number in words, such as "top left". */
export function findStrongest(map) {
  const values = map.flat();
  const index = values.indexOf(Math.max(...values));
  const third = (place, size) => Math.floor((3 * (place + 0.5)) / size);
  const row = third(Math.floor(index / map[0].length), map.length);
  return `${ROWS[row]} ${COLUMNS[third(index % map[0].length, map[0].length)]}`;
}
