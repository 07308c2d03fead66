// The sentence that is the search: "Like [picture], but [text]"; and what the server told about it.

import { byId, el, icon, ICONS, plural } from "./dom.js";
import { thumbnail } from "./trail.js";

const LONG_TEXT = 90;

export class Composer {
  #drawn = null;
  #text = "";
  #attributes = [];
  refines = true; // whether a text can change an item of the index

  /** `does`: {search(text), clear(), about(id), uploadOf(key)}. */
  constructor(does) {
    this.does = does;
    this.text = byId("text");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      does.search(this.text.value);
    });
    this.text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      does.search(this.text.value);
    });
    this.text.addEventListener("input", () => this.#fit());
    new ResizeObserver(() => this.#fit()).observe(this.text.parentElement);
  }

  /** Two or three texts made from the vocabulary, so that they fit the model; of what should differ where there is a reference. */
  examples(attributes, changing) {
    this.#attributes = attributes;
    const is = changing ? "is " : "";
    const valued = attributes.filter(({ values }) => values?.length);
    const pick = (attribute, i) => attribute?.values[i % attribute.values.length];
    const [first, second] = [valued[0], valued.length > 2 ? valued[2] : valued[1]];
    const texts = [
      first && `${is}${pick(first, 3)}`,
      first && second && `${is}${pick(first, 7)} and ${pick(second, 1)}`,
      second && second.values.length > 2 && `${is}${pick(second, 2)} and not ${pick(second, 0)}`,
    ].filter(Boolean);
    byId("examples").replaceChildren(
      ...(texts.length ? [el("span", { text: "For instance" })] : []),
      ...texts.map((text) => el("button", { type: "button", text, on: { click: () => this.does.search(text) } })),
    );
  }

  show(query) {
    const key = JSON.stringify(query.reference);
    if (this.#drawn !== key) this.#draw(query.reference);
    this.#drawn = key;
    const fixed = !this.refines && query.reference?.id !== undefined && !query.text.trim(); // a text that an address came with can be taken away
    byId("lead").textContent = fixed ? "Like this" : query.reference ? "Like this, but" : "Show me";
    this.text.placeholder = fixed ? "" : query.reference ? "what should differ?" : "what you look for";
    this.text.disabled = byId("go").disabled = fixed;
    if (this.#text !== query.text) this.text.value = query.text; // else what is being typed stays
    this.#text = query.text;
    this.examples(this.#attributes, Boolean(query.reference));
    byId("examples").hidden = fixed || Boolean(query.text.trim());
    this.#fit();
  }

  /** Below the text: what became of it. notes: [{kind: "plain"|"warn", text}]. */
  tell(notes) {
    const shown = notes.map(({ kind, text }) => el("p", { class: kind, text }));
    byId("notes").replaceChildren(...shown);
  }

  /** What is typed and not yet searched for, or null. */
  unsent(query) {
    const typed = this.text.value;
    return typed.trim() && typed.trim() !== query.text.trim() ? typed : null;
  }

  focus({ select = false } = {}) {
    this.text.focus({ preventScroll: true });
    if (select) this.text.select();
  }

  #draw(reference) {
    const root = byId("reference");
    if (!reference) {
      const camera = matchMedia("(pointer: coarse)").matches
        ? el("button", { type: "button", class: "link", on: { click: () => byId("camera").click() } }, icon(ICONS.camera), el("span", { text: "Camera" }))
        : null;
      const choose = el("button", { type: "button", class: "choose", on: { click: () => byId("file").click() } },
        icon(ICONS.image), el("span", { class: "choose-text", text: "Add an image" }), el("span", { class: "choose-hint", text: "choose, drop or paste" }));
      root.replaceChildren(choose, ...(camera ? [camera] : []));
      return;
    }
    const clear = el("button", { type: "button", class: "tool clear", "aria-label": "Remove the reference image", on: { click: () => this.does.clear() } }, icon(ICONS.cross));
    const picture = thumbnail(reference, this.does.uploadOf, 320);
    const label = reference.id === undefined ? "Choose another image" : `About the reference, ${reference.id}`;
    const run = reference.id === undefined ? () => byId("file").click() : () => this.does.about(reference.id);
    const about = el("button", { type: "button", class: "chosen", "aria-label": label, on: { click: run } }, picture);
    root.replaceChildren(about, clear);
  }

  /** As tall as its text, up to five lines; long ones are smaller. */
  #fit() {
    byId("composer").classList.toggle("long", this.text.value.length > LONG_TEXT);
    this.text.style.setProperty("height", "auto");
    this.text.style.setProperty("height", `${Math.min(this.text.scrollHeight, 5.2 * Number.parseFloat(getComputedStyle(this.text).lineHeight) || 200)}px`);
  }
}

/** A note for weights of attributes that the model does not have. */
export function leftOut(unknown, attributes) {
  if (!unknown.length) return [];
  const listed = unknown.slice(0, 8).map((name) => `“${name.length > 40 ? `${name.slice(0, 40)}…` : name}”`).join(", ");
  const why = attributes.length ? `this model weighs ${attributes.join(", ")}` : "this model has no attributes to weigh";
  return [{ kind: "warn", text: `The address had a weight for ${listed}, which was left out: ${why}.` }];
}

/** What is said of a way to ask, by whether the model was trained to combine an image and a text, or adds their embeddings. */
const MODES = {
  trained: {
    image: "An image alone finds items that look like it overall. That is not what the model was trained for: say what should differ.",
    text: "A text alone works, but it is not what the model was trained for: choose an item below, or add an image, to change that one.",
  },
  unrefined: {
    image: "Items of this index cannot be changed by a text here. Add the picture of this one as an image to say what should differ.",
    text: "A text alone works, but it is not what the model was trained for: add an image to change that one.",
  },
  added: {
    image: "An image alone finds items that look like it overall.",
    composed: "This model was not trained to change an image by a text: it adds up what each of them means, so hits may follow one and forget the other.",
  },
};

/** Notes for an answer of a model: its mode, words that are not known, a text that was cut. */
export function notesOf(answer, model, { refines = true, uploaded = false } = {}) {
  const composition = model?.composition ?? "trained";
  const kind = refines || uploaded || (composition === "added" && answer.mode === "text") ? composition : "unrefined";
  const said = MODES[kind]?.[answer.mode];
  const notes = said ? [{ kind: "plain", text: said }] : [];
  if (answer.unknown_words?.length) {
    const listed = answer.unknown_words.slice(0, 8).map((word) => `“${word.length > 40 ? `${word.slice(0, 40)}…` : word}”`).join(", ");
    const more = answer.unknown_words.length > 8 ? ` and ${answer.unknown_words.length - 8} more` : "";
    notes.push({ kind: "warn", text: `The model does not know ${listed}${more}. It reads unknown words as one and the same; try others.` });
  }
  if (answer.lost?.length) {
    const named = answer.lost.length > 3 ? [...answer.lost.slice(0, 3), "…"] : answer.lost;
    const parts = `${plural(answer.lost.length, "part")} of the index gave no answer (${named.join(", ")})`;
    notes.push({ kind: "warn", text: `${parts}, so items may be missing. Search again in a moment.` });
  }
  if (answer.exact === false && !answer.lost?.length) notes.push({ kind: "plain", text: "It is not proved that nothing in the index fits better." });
  if (answer.truncated) notes.push({ kind: "warn", text: `The text is longer than the model reads, so its end had no part. Put what matters first.` });
  return notes;
}
