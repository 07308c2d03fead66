// Menus of what the items' metadata can be narrowed by, and the chips of what is.

import { byId, count, el, icon, ICONS, words } from "./dom.js";
import { toFilter } from "./state.js";

const SEARCHED_FROM = 9;

export class Filters {
  #menus = new Map();
  #totals = new Map();

  /** `change(filters)`: called with all of them, after each choice. */
  constructor(change) {
    this.change = change;
    byId("clear-filters").addEventListener("click", () => change({}));
  }

  /**
   * The facets of what the filters leave. Those of a key that is filtered by are counted without its own filter, so that its other values
   * still show what they would add. `api`: see `Api`.
   */
  async load(api, filters, signal) {
    const active = Object.keys(filters);
    const unseen = active.length && !this.#menus.size; // menus are of all items, whatever an address came with
    const [every, all, ...own] = await Promise.all([
      unseen ? api.facets(null, signal) : null,
      api.facets(toFilter(filters), signal),
      ...active.map((key) => api.facets(toFilter(filters, key), signal)),
    ]);
    const keys = new Map((every?.keys ?? []).map((facet) => [facet.key, emptied(facet)]));
    for (const facet of all.keys) {
      const other = keys.get(facet.key);
      if (!other || other.kind === facet.kind || holders(facet) > holders(other)) keys.set(facet.key, facet); // values of several kinds: the commonest
    }
    this.#totals = new Map();
    active.forEach((key, i) => {
      this.#totals.set(key, own[i].total);
      const facet = own[i].keys.filter((one) => one.key === key).sort((a, b) => holders(b) - holders(a))[0];
      if (facet) keys.set(key, facet);
    });
    const sorted = [...keys.values()].sort((a, b) => a.key.localeCompare(b.key, "en", { numeric: true }));
    return { keys: sorted, total: all.total };
  }

  /** How many items there would be without the filter of a key: [[key, total]], most first. */
  get loosened() {
    return [...this.#totals].sort(([, a], [, b]) => b - a);
  }

  show(facets, filters) {
    const root = this.#begin(filters);
    const found = new Map(facets.map((facet) => [facet.key, facet]));
    for (const key of new Set([...this.#menus.keys(), ...found.keys()])) {
      const known = this.#menus.get(key);
      const facet = found.get(key) ?? emptied(known.facet);
      const menu = known?.facet.kind === facet.kind ? known : makers[facet.kind]?.(key, (filter) => this.#set(key, filter));
      if (!menu) continue; // a kind that this page does not know
      if (menu !== known) {
        if (known) known.root.replaceWith(menu.root);
        else root.append(menu.root);
        this.#menus.set(key, menu);
      }
      menu.facet = facet;
      this.#choose(key, menu, filters);
    }
    if (!this.#menus.size) root.append(el("p", { class: "hint", text: "The items have no metadata to filter by." }));
  }

  /** The facets could not be loaded: the menus stay, with the choices of `filters` and the counts of the last answer, below a hint. */
  showUnloaded(filters) {
    const root = this.#begin(filters);
    this.#totals = new Map(); // those of other filters
    for (const [key, menu] of this.#menus) this.#choose(key, menu, filters);
    const stale = this.#menus.size ? "The filters cannot be loaded just now: their counts may be out of date." : "The filters cannot be loaded just now.";
    root.prepend(el("p", { class: "hint", text: stale }));
  }

  #begin(filters) {
    this.filters = filters;
    byId("clear-filters").hidden = !Object.keys(filters).length;
    const root = byId("facets");
    root.querySelector(":scope > .hint")?.remove();
    return root;
  }

  #choose(key, menu, filters) {
    menu.show(menu.facet, filters[key] ?? null);
    menu.root.classList.toggle("active", key in filters);
  }

  #set(key, filter) {
    const { [key]: _, ...others } = this.filters;
    this.change(filter ? { ...others, [key]: filter } : others);
  }
}

/** A filter in words: `brand: Corvid, Dunlin`. */
export function described(key, filter) {
  if (filter.kind === "boolean") return `${key}: ${words(filter.value)}`;
  if (filter.kind === "number") {
    if (filter.from === null) return `${key}: at most ${filter.to}`;
    return filter.to === null ? `${key}: at least ${filter.from}` : `${key}: ${filter.from} to ${filter.to}`;
  }
  return `${key}: ${filter.values.join(", ")}`;
}

/** Something that is active, with a button that takes it away. */
export function chip(text, remove, { picture = null, label = `Remove ${text}` } = {}) {
  return el("span", { class: "chip" }, picture, el("span", { class: "chip-text", text, title: text }),
    el("button", { type: "button", "aria-label": label, on: { click: remove } }, icon(ICONS.cross)));
}

const menuOf = (key, ...children) => {
  const note = el("span", { class: "picked" });
  const root = el("details", { class: "menu" }, el("summary", {}, el("span", { class: "key", text: key }), note), ...children);
  return { root, note };
};

function textMenu(key, set) {
  const list = el("div", { class: "choices", role: "group", "aria-label": key });
  const find = el("input", { type: "search", placeholder: "Find a value", "aria-label": `Find a value of ${key}`, autocomplete: "off" });
  const more = el("p", { class: "hint" });
  const { root, note } = menuOf(key, find, list, more);
  const boxes = new Map();
  let facet = null;
  let chosen = [];

  const choose = (value, on) => {
    const values = on ? [...chosen, value] : chosen.filter((one) => one !== value);
    set(values.length ? { kind: facet.listed ? "list" : "text", values } : null);
  };
  const narrow = () => {
    const wanted = find.value.trim().toLowerCase();
    for (const [value, { row }] of boxes) row.hidden = !value.toLowerCase().includes(wanted);
  };
  find.addEventListener("input", narrow);
  find.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    const value = find.value.trim();
    if (value && !chosen.includes(value)) choose(value, true);
  });

  const show = (shown, filter) => {
    facet = shown;
    chosen = filter?.values ?? [];
    const counts = new Map(facet.values.map((one) => [String(one.value), one.count]));
    for (const value of chosen) if (!counts.has(value)) counts.set(value, 0);
    for (const value of [...boxes.keys()]) {
      if (counts.has(value) || boxes.get(value).box === document.activeElement) continue;
      boxes.get(value).row.remove();
      boxes.delete(value);
    }
    for (const [value, number] of counts) {
      if (!boxes.has(value)) {
        const box = el("input", { type: "checkbox", on: { change: () => choose(value, box.checked) } });
        const tally = el("span", { class: "tally" });
        const row = el("label", { class: "choice" }, box, el("span", { class: "value", text: value || "(empty)", title: value }), tally);
        boxes.set(value, { box, tally, row });
        list.append(row);
      }
      const { box, tally } = boxes.get(value);
      box.checked = chosen.includes(value);
      tally.textContent = count(number);
    }
    const distinct = facet.distinct ?? counts.size;
    find.hidden = distinct < SEARCHED_FROM;
    more.textContent = distinct > facet.values.length ? `The ${facet.values.length} most common of ${count(distinct)}. Type a whole value and press Enter for another.` : "";
    more.hidden = !more.textContent;
    note.textContent = chosen.length ? chosen.length : "";
    narrow();
  };
  return { root, show };
}

function numberMenu(key, set) {
  const bound = (label) => el("input", { type: "number", step: "any", inputmode: "decimal", "aria-label": `${key}, ${label}` });
  const [from, to] = [bound("at least"), bound("at most")];
  const { root, note } = menuOf(key, el("div", { class: "range" }, from, el("span", { text: "to" }), to));
  const read = () => {
    const [least, most] = [from, to].map(({ value }) => (value === "" || !Number.isFinite(Number(value)) ? null : Number(value)));
    set(least === null && most === null ? null : { kind: "number", from: least, to: most });
  };
  for (const input of [from, to]) input.addEventListener("change", read);
  const show = (facet, filter) => {
    from.placeholder = String(facet.least ?? "");
    to.placeholder = String(facet.most ?? "");
    if (document.activeElement !== from) from.value = filter?.from ?? "";
    if (document.activeElement !== to) to.value = filter?.to ?? "";
    note.textContent = filter ? "1" : "";
  };
  return { root, show };
}

let groups = 0;

function booleanMenu(key, set) {
  const name = `boolean-${(groups += 1)}`;
  const answers = [["either", null], ["yes", true], ["no", false]];
  const rows = answers.map(([word, value]) => {
    const box = el("input", { type: "radio", name, on: { change: () => set(value === null ? null : { kind: "boolean", value }) } });
    const tally = el("span", { class: "tally" });
    return { value, box, tally, row: el("label", { class: "choice" }, box, el("span", { class: "value", text: word }), tally) };
  });
  const { root, note } = menuOf(key, el("div", { class: "choices", role: "radiogroup", "aria-label": key }, ...rows.map(({ row }) => row)));
  const show = (facet, filter) => {
    for (const { value, box, tally } of rows) {
      box.checked = value === (filter ? filter.value : null);
      if (value !== null) tally.textContent = count(facet.values.find((one) => one.value === value)?.count ?? 0);
    }
    note.textContent = filter ? "1" : "";
  };
  return { root, show };
}

const holders = (facet) => (facet.values ?? []).reduce((sum, { count: number }) => sum + number, 0);

/** The same menu where the other filters leave none of its values. */
const emptied = (facet) => ({ ...facet, values: facet.values?.map(({ value }) => ({ value, count: 0 })) });

const makers = { text: textMenu, number: numberMenu, boolean: booleanMenu };
