// The sample pictures in the order of samples/tiles.webp. samples/SOURCES.md has their authors and licenses.

export const SAMPLES = [
  { name: "rocket", title: "A rocket at dusk" },
  { name: "castle", title: "A castle on a hill" },
  { name: "bear", title: "A polar bear" },
  { name: "crocodile", title: "A crocodile on a bank" },
  { name: "cup", title: "A cup of coffee" },
  { name: "chair", title: "A chair" },
  { name: "cat", title: "A cat, which is none of the classes" },
  { name: "bricks", title: "A wall of bricks, which is none of the classes" },
];
