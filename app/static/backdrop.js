// Draws the backdrop of the place for photos: a field of pixels, dense at its edges.

const COLUMNS = 32;
const ROWS = 24;
const STRONGEST = 0.5; // opacity

/** Fill a canvas with pixels in the accent color of the page. They are the same at every visit. */
export function drawBackdrop(canvas) {
  Object.assign(canvas, { width: COLUMNS, height: ROWS });
  const context = canvas.getContext("2d");
  context.fillStyle = getComputedStyle(canvas).color;
  let state = 7;
  for (let y = 0; y < ROWS; y++) {
    for (let x = 0; x < COLUMNS; x++) {
      state = (state * 1103515245 + 12345) % 2 ** 31; // a linear congruential generator
      const distance = Math.max(Math.abs(x - 15.5) / 16, Math.abs(y - 11.5) / 12);
      context.globalAlpha = STRONGEST * (state / 2 ** 31) ** 2 * distance ** 3;
      context.fillRect(x, y, 1, 1);
    }
  }
}
