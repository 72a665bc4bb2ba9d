// Puts numbers, times and names into words.

/** Return a share in 0-1 as a percentage with one decimal. */
export const percent = (share) => (share == null ? "–" : `${(100 * share).toFixed(1)}\u00a0%`);

export const count = (number) => number.toLocaleString("en-US");

/** Return seconds in words, such as "3 min 20 s". */
export function duration(seconds) {
  if (seconds == null) return "unknown";
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

export const when = (time) =>
  new Date(time).toLocaleString("en-US", { dateStyle: "medium", timeStyle: "short", hour12: false });

export const words = (name) => name.replaceAll("_", " ");

const SUPERCLASSES = { vehicles_1: "vehicles", vehicles_2: "other vehicles" };
export const superclassWords = (name) => SUPERCLASSES[name] ?? words(name);

/** Return a text as a sentence: with a capital letter and a full stop. */
export function sentence(text) {
  const trimmed = text.trim();
  return trimmed.charAt(0).toUpperCase() + trimmed.slice(1) + (/[.!?]$/.test(trimmed) ? "" : ".");
}
