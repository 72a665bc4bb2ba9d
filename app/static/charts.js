// Draws curves, bars and confusion matrices. Each figure has its content in words as well.

import { h, svg } from "./dom.js";
import { percent, words } from "./text.js";

const WIDTH = 480;
const HEIGHT = 200;
const MARGIN = { left: 48, right: 8, top: 8, bottom: 32 };
const TICKS = 4;
const BINS = 15; // of a reliability diagram
const CELL = 1.75; // of a confusion matrix, in rem

/** Formats of values and of grid lines, which have as many decimals as they need. */
export const SHARES = { value: percent, level: (share, decimals) => `${(100 * share).toFixed(Math.max(0, decimals - 2))}\u00a0%` };
export const LOSSES = { value: (loss) => loss.toFixed(2), level: (loss, decimals) => loss.toFixed(decimals) };

/**
 * Return a figure with one or several curves.
 *
 * @param title what the figure shows
 * @param series a list of { name, points }, where points are pairs of an epoch and a value
 * @param format SHARES or LOSSES
 * @param extent the first and the last epoch of the axis, if the curves are to grow into it
 */
export function curves(title, series, format, extent = []) {
  const points = series.flatMap((each) => each.points);
  if (points.length === 0) return h("figure", { class: "chart" }, h("figcaption", {}, title), h("p", { class: "quiet" }, "No values yet."));
  const [left, right] = bounds([...points.map(([x]) => x), ...extent]);
  const [bottom, top] = bounds(points.map(([, y]) => y));
  const x = (value) => MARGIN.left + ((value - left) / (right - left)) * (WIDTH - MARGIN.left - MARGIN.right);
  const y = (value) => HEIGHT - MARGIN.bottom - ((value - bottom) / (top - bottom)) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  const step = niceStep((top - bottom) / TICKS);
  const decimals = Math.max(0, -Math.floor(Math.log10(step)));
  const levels = Array.from({ length: Math.floor(top / step) - Math.ceil(bottom / step) + 1 }, (_, i) => (Math.ceil(bottom / step) + i) * step);
  const last = series.filter((each) => each.points.length).map(({ name, points: all }) => `${name} ${format.value(all.at(-1)[1])}`);
  return chart(title, `At the end: ${last.join(", ")}.`, [
    axes(levels.map((level) => [y(level), format.level(level, decimals)]), `epoch ${round(left)}`, round(right)),
    series.map(({ points: all }, i) => all.length > 0 && [
      svg("polyline", { class: `series s${i}`, points: all.map(([a, b]) => `${x(a)},${y(b)}`).join(" ") }),
      svg("rect", { class: `mark s${i}`, x: x(all.at(-1)[0]) - 4, y: y(all.at(-1)[1]) - 4, width: 8, height: 8 }),
    ]),
  ], h("p", { class: "key quiet" }, series.map(({ name, points: all }, i) => all.length > 0 && [h("span", { class: `swatch s${i}` }), name])));
}

/** Return a reliability diagram of bins with the number of images, their mean confidence and their accuracy. */
export function reliability(bins) {
  const [width, height] = [WIDTH - MARGIN.left - MARGIN.right, HEIGHT - MARGIN.top - MARGIN.bottom];
  const x = (confidence) => MARGIN.left + width * confidence;
  const y = (accuracy) => HEIGHT - MARGIN.bottom - height * accuracy;
  const bar = (0.8 * width) / BINS;
  const said = bins.map(({ images, confidence, accuracy }) => `${percent(accuracy)} right of ${images} answers at ${percent(confidence)}`);
  return chart("Reliability", `${said.join(", ")}.`, [
    axes([0, 0.25, 0.5, 0.75, 1].map((level) => [y(level), SHARES.level(level, 2)]), "probability 0\u00a0%", "100\u00a0%"),
    bins.map(({ confidence, accuracy }) =>
      svg("rect", { class: "mark s0", x: x(confidence) - bar / 2, y: y(accuracy), width: bar, height: height * accuracy })),
    svg("line", { class: "series s1", x1: x(0), y1: y(0), x2: x(1), y2: y(1) }),
  ], h("p", { class: "quiet" }, "A bar is the share that is right of the answers with about this probability. On the line both are equal."));
}

/** Return a figure with a drawing of WIDTH x HEIGHT, which `said` describes. */
function chart(title, said, drawing, legend) {
  return h("figure", { class: "chart" }, h("figcaption", {}, title),
    svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}. ${said}` }, drawing), legend);
}

/** Return grid lines, given as pairs of a height and a label, and the labels of both ends of the horizontal axis. */
function axes(levels, from, to) {
  return [
    levels.map(([y, label]) => [
      svg("line", { class: "grid", x1: MARGIN.left, x2: WIDTH - MARGIN.right, y1: y, y2: y }),
      svg("text", { x: MARGIN.left - 8, y: y + 4, "text-anchor": "end" }, label),
    ]),
    svg("text", { x: MARGIN.left, y: HEIGHT - 8 }, from),
    svg("text", { x: WIDTH - MARGIN.right, y: HEIGHT - 8, "text-anchor": "end" }, to),
  ];
}

/** Return 1, 2, 5 or 10 times a power of ten, near a value. */
function niceStep(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= value / 1.5);
}

const round = (value) => Math.round(10 * value) / 10;

function bounds(values) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  return low === high ? [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2] : [low, high];
}

/** Return bars with a name and a share in 0-1 each, or several shares that are compared. */
export function bars(rows) {
  return h("ul", { class: "rates" }, rows.map(({ name, shares, note }) => h("li", {},
    h("span", { class: "name" }, words(name), note && [" ", h("small", {}, note)]),
    h("span", { class: "share" }, shares.map(percent).join(" / ")),
    shares.map((share, i) => h("span", { class: "bar" }, h("span", { class: `s${i}`, style: { width: `${100 * (share ?? 0)}%` } }))))));
}

/**
 * Return a confusion matrix as a figure, with the most frequent confusions in words.
 *
 * @param labels names of the rows (the true class) and columns (the answer)
 * @param counts number of images by row and column
 */
export function confusion(labels, counts) {
  const size = labels.length;
  const totals = counts.map((row) => row.reduce((sum, each) => sum + each, 0));
  const pairs = counts
    .flatMap((row, truth) => row.map((number, answer) => ({ truth, answer, number })))
    .filter(({ truth, answer, number }) => truth !== answer && number > 0)
    .sort((a, b) => b.number - a.number);
  return h("figure", { class: "confusion" },
    h("figcaption", {}, "Rows are the true classes, columns the answers in the same order."),
    h("div", { class: "matrix" },
      h("ol", { class: "quiet" }, labels.map((label) => h("li", { style: { "min-height": `${CELL}rem` } }, words(label)))),
      h("div", { style: { "max-width": `${CELL * size}rem` } }, svg("svg", { viewBox: `0 0 ${size} ${size}`, preserveAspectRatio: "none", role: "img", "aria-label": `Confusion matrix of ${size} classes` },
        counts.map((row, truth) => row.map((number, answer) => number > 0 && svg("rect", {
          class: truth === answer ? "right" : "wrong", x: answer, y: truth, width: 1, height: 1,
          "fill-opacity": 0.15 + (0.85 * number) / totals[truth],
        }, svg("title", {}, `${words(labels[truth])}, answered as ${words(labels[answer])}: ${number} of ${totals[truth]}`))))))),
    pairs.length > 0 && h("p", {}, "Most often: ", pairs.slice(0, 5).map(({ truth, answer, number }) =>
      `${words(labels[truth])} answered as ${words(labels[answer])} (${number})`).join(", "), "."));
}

/** Sum a confusion matrix of classes over their superclasses. Returns { labels, counts }. */
export function bySuperclass(counts, superclasses) {
  const labels = [...new Set(superclasses)].sort();
  const index = superclasses.map((each) => labels.indexOf(each));
  const sums = labels.map(() => labels.map(() => 0));
  counts.forEach((row, truth) => row.forEach((number, answer) => { sums[index[truth]][index[answer]] += number; }));
  return { labels, counts: sums };
}
