// Opens image files, and cuts out the square that the network sees.
//
//   file --open--> Picture --crop--> upload, at most 1024 pixels wide
//                          --preview--> 32×32 pixels, as the service would compute them

export const NETWORK_SIDE = 32;
const UPLOAD_SIDE = 1024;
const WORKING_SIDE = 2048; // twice the upload, so that half of a large photo still has all its detail
const LOSSLESS_SIDE = 256;
const JPEG_QUALITY = 0.95;
const PREVIEW_SIDE = 256;

/**
 * Decode a file that the browser can show. The picture is upright, in sRGB, and at most 2048 pixels wide and high.
 * Returns its name and a canvas. Throws an Error with a sentence if the browser cannot show the file.
 */
export async function openPicture(file) {
  const source = await decode(file);
  const scale = Math.min(1, WORKING_SIDE / Math.max(source.width, source.height));
  const width = Math.max(1, Math.round(source.width * scale));
  const height = Math.max(1, Math.round(source.height * scale));
  const canvas = makeCanvas(width, height);
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // the service lays transparent images over white as well
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(source.image, 0, 0, width, height);
  source.image.close?.();
  return { name: file.name, canvas, width, height };
}

async function decode(file) {
  if (file.size === 0) throw new Error(`${file.name} is empty. Choose another file.`);
  try {
    const image = await createImageBitmap(file);
    return { image, width: image.width, height: image.height };
  } catch {
    // SVG, and the formats that the browser decodes for elements only.
  }
  const address = URL.createObjectURL(file);
  try {
    const image = new Image();
    image.src = address;
    await image.decode();
    const { naturalWidth: width, naturalHeight: height } = image;
    const scale = file.type === "image/svg+xml" ? UPLOAD_SIDE / Math.max(width, height, 1) : 1;
    return { image, width: (width || 1) * scale, height: (height || 1) * scale };
  } catch {
    throw new Error(`This browser cannot show ${file.name || "the file"}. Save it as a JPEG or PNG, then choose that.`);
  } finally {
    URL.revokeObjectURL(address);
  }
}

function makeCanvas(width, height) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  return canvas;
}

/** Return the central square, which the service would cut out itself. */
export function centerCrop({ width, height }) {
  const size = Math.min(width, height);
  return { x: (width - size) / 2, y: (height - size) / 2, size };
}

/** Return a square that lies within the picture, with a side of at least 32 pixels where the picture has as many. */
export function limitCrop({ x, y, size }, { width, height }) {
  const largest = Math.min(width, height);
  const side = Math.min(largest, Math.max(Math.min(NETWORK_SIDE, largest), size));
  return {
    x: Math.min(width - side, Math.max(0, x)),
    y: Math.min(height - side, Math.max(0, y)),
    size: side,
  };
}

function cut(picture, { x, y, size }, side) {
  const canvas = makeCanvas(side, side);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(picture.canvas, x, y, size, size, 0, 0, side, side);
  return canvas;
}

/** Return the square as a file to upload: a PNG if it is small, else a JPEG. */
export async function encodeCrop(picture, crop) {
  const side = Math.max(1, Math.min(UPLOAD_SIDE, Math.round(crop.size)));
  const type = side <= LOSSLESS_SIDE ? "image/png" : "image/jpeg";
  const blob = await new Promise((resolve) => cut(picture, crop, side).toBlob(resolve, type, JPEG_QUALITY));
  return new File([blob], picture.name || "picture", { type });
}

/** Draw the 32×32 pixels of the square into a canvas. The service computes them in the same way from the upload. */
export function drawPreview(canvas, picture, crop) {
  const side = Math.max(1, Math.min(PREVIEW_SIDE, Math.round(crop.size)));
  const { data } = cut(picture, crop, side).getContext("2d").getImageData(0, 0, side, side);
  const pixels = resample(data, side, NETWORK_SIDE);
  canvas.getContext("2d").putImageData(new ImageData(pixels, NETWORK_SIDE, NETWORK_SIDE), 0, 0);
}

/** Scale a square of RGBA bytes with the antialiased bicubic filter of Pillow, first its rows and then its columns. */
function resample(data, from, to) {
  const filter = filterWeights(from, to);
  const rows = new Float32Array(from * to * 4);
  for (let y = 0; y < from; y++) {
    for (let x = 0; x < to; x++) {
      const { first, weights } = filter[x];
      for (let channel = 0; channel < 4; channel++) {
        let sum = 0;
        for (let k = 0; k < weights.length; k++) sum += weights[k] * data[(y * from + first + k) * 4 + channel];
        rows[(y * to + x) * 4 + channel] = sum;
      }
    }
  }
  const pixels = new Uint8ClampedArray(to * to * 4); // rounds and clamps
  for (let y = 0; y < to; y++) {
    const { first, weights } = filter[y];
    for (let i = 0; i < to * 4; i++) {
      let sum = 0;
      for (let k = 0; k < weights.length; k++) sum += weights[k] * rows[(first + k) * to * 4 + i];
      pixels[y * to * 4 + i] = sum;
    }
  }
  return pixels;
}

function filterWeights(from, to) {
  const scale = from / to;
  const stretch = Math.max(1, scale);
  return Array.from({ length: to }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.round(center - 2 * stretch));
    const last = Math.min(from, Math.round(center + 2 * stretch));
    const raw = Array.from({ length: last - first }, (_, k) => bicubic((first + k + 0.5 - center) / stretch));
    const total = raw.reduce((sum, weight) => sum + weight, 0);
    return { first, weights: raw.map((weight) => weight / total) };
  });
}

function bicubic(distance) {
  const x = Math.abs(distance);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}
