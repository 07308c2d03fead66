// Images from outside: picked, dropped, pasted or taken; scaled down here before they are sent.

import { byId, megabytes } from "./dom.js";

const MOST_BYTES = 1 << 20;
const MOST_PIXELS = 1600;

/** The images of this visit, by key. The blob is kept: every slider move sends it again. */
export class Uploads {
  #kept = new Map();

  /** The key of a blob. It is random: the browser's history outlives this page, and a key in it must never be another image's. */
  add(blob) {
    const bytes = crypto.getRandomValues(new Uint8Array(16)); // randomUUID is there with HTTPS alone
    const key = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
    this.#kept.set(key, { blob, address: URL.createObjectURL(blob) });
    return key;
  }

  get = (key) => this.#kept.get(key) ?? null;

  /** Free the images whose keys are not in this set. */
  keep(keys) {
    for (const [key, { address }] of this.#kept) {
      if (keys.has(key)) continue;
      URL.revokeObjectURL(address);
      this.#kept.delete(key);
    }
  }
}

/** An image that cannot be searched with, in words for the reader. */
export class UploadError extends Error {}

/**
 * The image as it is sent: as it came where it is small, else with at most 1600 pixels on the longer side, upright by its EXIF orientation.
 * What this browser cannot decode is left to the server. `image`: the server's limits.
 */
export async function prepared(file, image) {
  if (!file.size) throw new UploadError("That file is empty. Choose another one.");
  if (file.type && !file.type.startsWith("image/")) {
    throw new UploadError(`“${file.name}” is not an image (${file.type}). The server takes ${image.formats.join(", ")}.`);
  }
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    if (image.max_bytes && file.size > image.max_bytes) {
      throw new UploadError(`This browser cannot read “${file.name}”, and its ${megabytes(file.size)} are over the server's ${megabytes(image.max_bytes)}. Save it as JPEG first.`);
    }
    return file;
  }
  try {
    const longer = Math.max(bitmap.width, bitmap.height);
    if (file.size <= MOST_BYTES && longer <= MOST_PIXELS) return file;
    return await drawn(bitmap, Math.min(1, MOST_PIXELS / longer));
  } finally {
    bitmap.close();
  }
}

async function drawn(bitmap, scale) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // JPEG has no transparency
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  for (const quality of [0.9, 0.75, 0.6]) {
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", quality));
    if (!blob) break;
    if (blob.size <= MOST_BYTES || quality === 0.6) return blob;
  }
  throw new UploadError("This browser cannot scale the image down. Choose a smaller one.");
}

/** Call `take(file)` with every image that is picked, dropped on the page or pasted into it, and `refuse(message)` for what is none. */
export function listen(take, refuse) {
  for (const id of ["file", "camera"]) {
    byId(id).addEventListener("change", ({ target }) => {
      const [file] = target.files;
      target.value = ""; // the same file again is a change again
      if (file) take(file);
    });
  }
  document.addEventListener("paste", (event) => {
    if (document.querySelector("dialog[open]")) return;
    const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
    if (!file) return; // text goes where it is pasted
    event.preventDefault();
    take(file);
  });

  const veil = byId("drop");
  const carriesFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files") && !document.querySelector("dialog[open]");
  document.addEventListener("dragover", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    event.dataTransfer.dropEffect = "copy";
    veil.hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) veil.hidden = true;
  });
  document.addEventListener("drop", (event) => {
    veil.hidden = true;
    if (!carriesFiles(event)) return;
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file) take(file);
    else refuse("The page cannot read what you dropped. Save the image as a file, then drop the file.");
  });
}
