// What is asked: its form in this page, in the address, and in the API.

export const PAGE_SIZE = 24;
const MOST_STEPS = 40;
/** The largest multiplier of a predicted weight; beyond it answers get worse. */
export const MOST_WEIGHT = 2;

/**
 * reference: null, {id} of an item, or {upload} (a key of `Uploads`); text; weights: multipliers by attribute; unlike: ids;
 * filters: by metadata key, see `toFilter`; pages: how many are shown; item: whose details are open.
 */
export const blank = () => ({ reference: null, text: "", weights: {}, unlike: [], filters: {}, pages: 1, item: null });

export const isBlank = (query) => !query.reference && !query.text.trim();

export const sameReference = (a, b) => (a?.id ?? null) === (b?.id ?? null) && (a?.upload ?? null) === (b?.upload ?? null);

/** The query string of a search; an upload leaves none, since nobody else has it. */
export function toAddress(query) {
  const pairs = [];
  if (query.reference?.id !== undefined) pairs.push(["ref", query.reference.id]);
  if (query.text.trim()) pairs.push(["text", query.text.trim()]);
  for (const [name, value] of Object.entries(query.weights)) if (value !== 1) pairs.push([`w.${name}`, value]);
  for (const id of query.unlike) pairs.push(["unlike", id]);
  for (const [key, filter] of Object.entries(query.filters)) {
    if (filter.kind === "text") for (const value of filter.values) pairs.push([`is.${key}`, value]);
    if (filter.kind === "list") for (const value of filter.values) pairs.push([`has.${key}`, value]);
    if (filter.kind === "number") pairs.push([`in.${key}`, `${filter.from ?? ""}..${filter.to ?? ""}`]);
    if (filter.kind === "boolean") pairs.push([`on.${key}`, filter.value ? "yes" : "no"]);
  }
  if (query.pages > 1) pairs.push(["page", query.pages]);
  if (query.item !== null) pairs.push(["item", query.item]);
  return pairs.length ? `?${new URLSearchParams(pairs)}` : "";
}

/** The search of a query string; what cannot be read in it is left out. */
export function fromAddress(search) {
  const query = blank();
  for (const [name, value] of new URLSearchParams(search)) {
    const dot = name.indexOf(".");
    const [kind, key] = dot < 0 ? [name, ""] : [name.slice(0, dot), name.slice(dot + 1)];
    if (name === "ref") query.reference = { id: value };
    else if (name === "text") query.text = value;
    else if (name === "unlike" && !query.unlike.includes(value)) query.unlike.push(value);
    else if (name === "item") query.item = value;
    else if (name === "page") query.pages = Math.min(Math.max(Number.parseInt(value, 10) || 1, 1), 400);
    else if (kind === "w") {
      const number = Number(value);
      if (value && number >= 0) query.weights[key] = Math.min(number, MOST_WEIGHT);
    } else if (kind === "is" || kind === "has") {
      const filter = (query.filters[key] ??= { kind: kind === "is" ? "text" : "list", values: [] });
      if (filter.values && !filter.values.includes(value)) filter.values.push(value);
    } else if (kind === "in") {
      const [from, to] = value.split("..").map((text) => (text && Number.isFinite(Number(text)) ? Number(text) : null));
      if (from !== null || (to ?? null) !== null) query.filters[key] = { kind: "number", from, to: to ?? null };
    } else if (kind === "on") query.filters[key] = { kind: "boolean", value: value === "yes" };
  }
  return query;
}

/** The query without weights of attributes that the model does not have, and their names: an address may come from another model's page. */
export function weighable(query, attributes) {
  const unknown = Object.keys(query.weights).filter((name) => !attributes.includes(name));
  if (!unknown.length) return { query, unknown };
  return { query: { ...query, weights: Object.fromEntries(Object.entries(query.weights).filter(([name]) => attributes.includes(name))) }, unknown };
}

/** The API's filter, or null; `except` leaves a key's out. */
export function toFilter(filters, except = null) {
  const conditions = Object.entries(filters).filter(([key]) => key !== except).map(([key, filter]) => condition(key, filter));
  if (conditions.length < 2) return conditions[0] ?? null;
  return { and: conditions };
}

function condition(key, filter) {
  if (filter.kind === "text") return { [key]: { in: filter.values } };
  if (filter.kind === "boolean") return { [key]: filter.value };
  if (filter.kind === "list") return { or: [...filter.values.map((value) => ({ [key]: { contains: value } })), { [key]: { in: filter.values } }] };
  const bounds = {};
  if (filter.from !== null) bounds[">="] = filter.from;
  if (filter.to !== null) bounds["<="] = filter.to;
  return { [key]: bounds };
}

/** The body of POST /v1/search for `k` hits from `offset` on. */
export function toRequest(query, { k, offset = 0, zones = false }) {
  const text = query.text.trim();
  const body = { k, offset, zones, explain: true };
  if (query.reference?.id !== undefined) body.reference_id = query.reference.id;
  if (text) body.text = text;
  const weights = Object.entries(query.weights).filter(([, value]) => value !== 1);
  if (text && weights.length) body.weights = Object.fromEntries(weights);
  if (query.unlike.length) body.unlike = query.unlike;
  const filter = toFilter(query.filters);
  if (filter) body.filter = filter;
  return body;
}

/** The steps of a dialogue and the one that is shown. Never changed in place: each entry of the browser's history keeps its own. */
export class Trail {
  constructor(steps = [], at = -1) {
    this.steps = steps;
    this.at = at;
  }

  /** After another reference or text: a new step, which drops those after the present one. A bare reference that gets its text stays one step. */
  next(query) {
    const kept = this.steps.slice(0, this.at + 1);
    const last = kept.at(-1);
    if (last && !last.text.trim() && sameReference(last.reference, query.reference)) kept.pop();
    const steps = [...kept, query].slice(-MOST_STEPS);
    return new Trail(steps, steps.length - 1);
  }

  /** After other weights, filters or examples: the present step, changed. */
  changed(query) {
    if (this.at < 0) return this;
    return new Trail(this.steps.map((step, i) => (i === this.at ? query : step)), this.at);
  }

  moved(at) {
    return new Trail(this.steps, at);
  }
}

const MOST_ENTRIES = 50; // browsers keep no more of a tab

/** The uploads that can still come up again: those of the trails in the browser's history, which Back and Forward lead to. */
export class Entries {
  #keys = []; // by the entry's number: the upload keys of its trail
  at = -1;

  /** There is a new entry after the present one, or another in its place (`replace`). What was ahead of a new one cannot be reached any more. */
  wrote({ query, steps, replace }) {
    if (!replace) {
      this.at += 1;
      this.#keys.length = this.at;
    }
    this.#keys[this.at] = [query, ...steps].map(({ reference }) => reference?.upload).filter((key) => key !== undefined);
    delete this.#keys[this.at - MOST_ENTRIES];
  }

  get uploads() {
    return new Set(this.#keys.flat());
  }
}
