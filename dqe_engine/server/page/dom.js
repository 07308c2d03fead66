// Making elements, and the words for numbers.

/** An element; `properties`: `class`, `text`, `on` (listeners by event), `style` (custom properties), others as attributes. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") node.className = value;
    else if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name === "style") for (const [key, entry] of Object.entries(value)) node.style.setProperty(key, entry);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

/** A 20 × 20 line icon from path data. */
export function icon(path) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(SVG, "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}

export const ICONS = {
  cross: "M5 5l10 10M15 5L5 15",
  info: "M10 9v6M10 5.500v.5",
  image: "M3 4h14v12H3zM3 13l4-4 4 4 2-2 4 4M13 7.500v.1",
  camera: "M3 6h3l1.500-2h5L14 6h3v10H3zM10 8a3 3 0 1 0 .01 0",
  back: "M8 5l-5 5 5 5M3 10h14",
};

export const byId = (id) => document.getElementById(id);

export const count = (number) => Number(number).toLocaleString("en");

/** `1 item`, `2 items`. */
export const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

export const score = (number) => (Object.is(Math.round(number * 100), -0) ? "0.00" : number.toFixed(2)).replace("-", "−");

export const megabytes = (bytes) => `${(bytes / 1048576).toLocaleString("en", { maximumFractionDigits: 1 })} MB`;

/** A metadata value in words. */
export function words(value) {
  if (value === null) return "none";
  if (value === true) return "yes";
  if (value === false) return "no";
  if (Array.isArray(value)) return value.map(words).join(", ") || "none";
  if (typeof value === "object") return JSON.stringify(value);
  return String(value);
}

/** What an item is called: its metadata's title or name, or its id. */
export function nameOf(item) {
  const { title, name } = item.metadata ?? {};
  return [title, name].find((text) => typeof text === "string" && text.trim()) ?? item.id;
}

/** A few short values of the metadata, to tell items apart by. */
export function captionOf(item) {
  const texts = Object.entries(item.metadata ?? {})
    .filter(([key, value]) => typeof value === "string" && value && value.length <= 40 && key !== "title" && key !== "name")
    .map(([, value]) => value);
  return texts.slice(0, 3).join(" · ");
}

export const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
