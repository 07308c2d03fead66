// One item in the grid: its picture, its place and score, a bar of what the score is made of, and what can be done with it.

import { pictureAddress } from "./api.js";
import { captionOf, el, icon, ICONS, nameOf, score } from "./dom.js";

/** A picture of an item; where there is none, a tile with its id. `size`: pixels of the longer side. */
export function picture(item, size, { lazy = true } = {}) {
  const frame = el("span", { class: "picture" });
  const image = el("img", { alt: "", decoding: "async", loading: lazy && "lazy", width: size, height: size });
  image.addEventListener("load", () => frame.classList.add("loaded"));
  image.addEventListener("error", () => {
    frame.classList.add("loaded", "missing");
    frame.replaceChildren(el("span", { class: "name", text: item.id }), el("span", { class: "why", text: "no picture" }));
  });
  image.src = pictureAddress(item.id, size);
  frame.append(image);
  return frame;
}

/** What a hit's score is made of, in the order of the vocabulary: [{name, value, colour}]; zeros are left out but for the base. */
export function parts(hit, attributes) {
  const { explanation } = hit;
  if (!explanation) return [];
  const named = attributes.filter((name) => name in explanation.attributes);
  return [
    { name: "whole query", value: explanation.base, colour: "var(--base)" },
    ...named.map((name) => ({ name, value: explanation.attributes[name], colour: attributeColour(name, attributes) })),
    ...(explanation.unlike ? [{ name: "not wanted", value: explanation.unlike, colour: "var(--unlike)" }] : []),
  ];
}

export const attributeColour = (name, attributes) => `var(--a${attributes.indexOf(name) % 8})`;

export class Tile {
  /** `does`: {pick, details, unlike}, each called with the item. `picks`: what the first does, in words. */
  constructor(item, does, picks) {
    this.item = item;
    this.picks = picks;
    this.pick = el("button", { type: "button", class: "pick", on: { click: () => does.pick(this.item) } },
      picture(item, 320), el("span", { class: "pick-hint", "aria-hidden": "true", text: picks }));
    this.bar = el("span", { class: "bar", "aria-hidden": "true" });
    this.rank = el("span", { class: "rank" });
    this.score = el("span", { class: "score" });
    this.caption = el("span", { class: "caption" });
    this.info = tool("info", ICONS.info, () => does.details(this.item));
    this.not = tool("not", ICONS.cross, () => does.unlike(this.item));
    this.root = el("li", { class: "tile" }, this.pick, this.bar,
      el("span", { class: "facts", "aria-hidden": "true" }, this.rank, this.caption, this.score),
      el("span", { class: "tile-tools" }, this.info, this.not));
    this.root.tile = this;
  }

  /** `rank`: from 1, or null for an item that was not searched for; `scale`: the score that fills the bar. */
  update(item, { rank = null, scale = 1, attributes = [] } = {}) {
    this.item = item;
    const scored = typeof item.score === "number";
    const [name, caption] = [nameOf(item), captionOf(item)];
    this.root.dataset.id = item.id;
    this.root.classList.toggle("near", item.zone === "near");
    this.rank.textContent = rank ?? "";
    this.score.textContent = scored ? score(item.score) : "";
    this.caption.textContent = caption || name;
    this.caption.title = name;
    const told = [name, caption !== name && caption, scored && `score ${score(item.score)}`, item.zone === "near" && "one of the best"];
    this.pick.setAttribute("aria-label", `${this.picks}: ${told.filter(Boolean).join(", ")}`);
    this.info.setAttribute("aria-label", `Details of ${name}`);
    this.not.setAttribute("aria-label", `Not like ${name}`);
    this.not.hidden = !scored;
    this.bar.hidden = !scored;
    const positive = parts(item, attributes).filter(({ value }) => value > 0);
    const pieces = positive.length ? positive : scored ? [{ value: Math.max(item.score, 0), colour: "var(--base)" }] : [];
    while (this.bar.children.length > pieces.length) this.bar.lastChild.remove();
    while (this.bar.children.length < pieces.length) this.bar.append(el("i"));
    pieces.forEach(({ value, colour }, i) => {
      this.bar.children[i].style.setProperty("--c", colour);
      this.bar.children[i].style.setProperty("--w", `${Math.min((100 * value) / (scale || 1), 100).toFixed(2)}%`);
    });
  }

  /** Whether Tab stops here: at one tile of the grid only, arrows move to the others. */
  set reachable(reachable) {
    for (const button of [this.pick, this.info, this.not]) button.tabIndex = reachable ? 0 : -1;
  }
}

function tool(name, path, run) {
  return el("button", { type: "button", class: `tool ${name}`, on: { click: run } }, icon(path));
}
