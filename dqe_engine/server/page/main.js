// The page: what is asked, what is shown for it, and the browser's history between the two.

import { Api, Latest } from "./api.js";
import { showItems, showUnlisted } from "./browsing.js";
import { Composer, leftOut, notesOf } from "./composer.js";
import { showDetails } from "./details.js";
import { closeByBackdrop, showShortcuts } from "./dialogs.js";
import { byId, count, plural, score, still } from "./dom.js";
import { chip, described, Filters } from "./filters.js";
import { Indexing } from "./indexing.js";
import { listenToKeys, singleKeys, themeSwitch } from "./keyboard.js";
import { showManage } from "./manage.js";
import { clearNotice, notice, say } from "./notices.js";
import { Grid } from "./results.js";
import { copyAddress } from "./share.js";
import { Sliders } from "./sliders.js";
import { blank, Entries, fromAddress, isBlank, PAGE_SIZE, sameReference, toAddress, toFilter, toRequest, Trail, weighable } from "./state.js";
import { fail, lostUpload, nothing } from "./states.js";
import { showTrail, thumbnail } from "./trail.js";
import { listen, prepared, UploadError, Uploads } from "./upload.js";

const MOST_AT_ONCE = 192; // the server explains no more hits at once, and a whole number of pages
const AHEAD_PX = 600;
const LATER_MS = 1000;

class Page {
  api = new Api();
  uploads = new Uploads();
  answers = new Latest();
  facetAnswers = new Latest();
  query = fromAddress(location.search);
  trail = new Trail();
  entries = new Entries();
  vocabulary = null;
  shown = null; // "search" or "items", once there is an answer
  last = null; // the last answer of a search
  next = null; // where browsing goes on: an id, or null at the end
  exhausted = true;
  busy = false;
  facetsOf = null; // the filters, as JSON, whose facets are shown: slider moves do not change them
  coalesced = null; // the kind of the last change: slider moves in a row are one entry of the history
  unknown = []; // attributes that the address weighs and the model does not have

  constructor() {
    const does = { pick: (item) => this.pick(item), details: (item) => this.details(item), unlike: (item) => this.unlike(item) };
    this.grid = new Grid(byId("grid"), does);
    this.composer = new Composer({
      search: (text) => this.search(text),
      clear: () => this.step({ reference: null, weights: {} }),
      about: (id) => this.details(this.grid.item(id) ?? { id }),
      uploadOf: this.uploads.get,
    });
    this.filters = new Filters((filters) => this.change({ filters }, "filter"));
    this.indexing = new Indexing(this.api, () => this.grown());
    byId("more").addEventListener("click", () => this.more());
    byId("copy-link").addEventListener("click", ({ currentTarget }) => copyAddress(this.query, currentTarget));
    byId("home").addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      this.go(blank(), new Trail());
    });
    new IntersectionObserver(([entry]) => entry.isIntersecting && this.more(), { rootMargin: `${AHEAD_PX}px` }).observe(byId("more"));
    addEventListener("popstate", ({ state }) => this.restore(state));
    addEventListener("online", () => this.failed && this.refresh());
    listen((file) => this.take(file), (text) => notice({ kind: "error", title: "No image", text }));
    listenToKeys(this);
    themeSwitch(byId("theme"));
    closeByBackdrop();
    byId("open-shortcuts").addEventListener("click", () => showShortcuts(singleKeys));
    byId("open-manage").addEventListener("click", () => this.manage());
    this.start();
  }

  async start() {
    this.grid.skeletons(PAGE_SIZE);
    this.composer.show(this.query);
    try {
      this.vocabulary = await this.api.vocabulary();
    } catch (error) {
      fail(this, error, () => this.start());
      return;
    }
    clearNotice();
    const { attributes, index, writes, model, limits } = this.vocabulary;
    this.offers = (ability) => this.vocabulary.offers?.includes(ability) ?? true;
    this.names = attributes.map(({ name }) => name);
    const weighs = this.names.length > 0;
    const filters = this.offers("facets");
    byId("dock").querySelector("[data-shows='weights']").hidden = !weighs;
    byId("dock").querySelector("[data-shows='filters']").hidden = byId("filters").hidden = !filters;
    byId("dock").hidden = !weighs && !filters;
    byId("panel").setAttribute("aria-label", [weighs && "Weights", filters && "Filters"].filter(Boolean).join(" and ") || "Weights");
    byId("dock").setAttribute("aria-label", weighs && filters ? "Show weights or filters" : `Show ${weighs ? "weights" : "filters"}`);
    this.composer.refines = this.offers("refine");
    this.sliders ??= new Sliders(this.names, {
      weigh: (moved) => this.change({ weights: { ...this.query.weights, ...moved } }, "weigh"),
      reset: () => this.change({ weights: {} }, "reset"),
    });
    this.composer.examples(attributes, Boolean(this.query.reference));
    this.composer.text.maxLength = limits?.text ?? 10_000;
    byId("open-manage").hidden = !writes;
    this.grid.picks = this.offers("refine") ? "Change this one" : "Find items like this one";
    byId("facts").title = model?.name ? `Model: ${model.name}` : "";
    this.tellSize(index);
    this.indexing.start(index);
    this.restore(history.state);
  }

  // ---- what is asked -------------------------------------------------------------------------------------------------------------

  search(text) {
    if (!this.vocabulary) return;
    if (text.trim() === this.query.text.trim() && this.shown && !this.failed) return void this.grid.focus();
    this.step({ text, weights: text.trim() ? this.query.weights : {} });
  }

  /** The item becomes the reference. A text that was typed and not yet searched for is for it; one that was belongs to the step before. */
  pick(item) {
    const refines = this.offers("refine");
    const typed = refines ? this.composer.unsent(this.query) : null;
    this.step({ reference: { id: item.id }, text: typed ?? "", weights: {} });
    say(`The reference is now ${item.id}.${refines && typed === null ? " Type what should differ." : ""}`);
    scrollTo({ top: 0, behavior: still() ? "auto" : "smooth" });
    if (refines && matchMedia("(pointer: fine)").matches) this.composer.focus();
  }

  async take(file) {
    try {
      const blob = await prepared(file, this.vocabulary?.image ?? { formats: [] });
      this.step({ reference: { upload: this.uploads.add(blob) }, text: this.composer.unsent(this.query) ?? this.query.text });
      this.composer.focus();
    } catch (error) {
      if (!(error instanceof UploadError)) throw error;
      notice({ kind: "error", title: "Not this image", text: error.message });
    }
  }

  unlike(item) {
    if (this.query.unlike.includes(item.id)) return;
    this.change({ unlike: [...this.query.unlike, item.id] }, "unlike");
    say(`Nothing like ${item.id}. You can undo this among the active filters.`);
  }

  /** Another reference or text: a new step of the trail. */
  step(changes) {
    const query = { ...this.query, ...changes, pages: 1, item: null };
    if (isBlank(query)) query.unlike = [];
    const same = sameReference(query.reference, this.query.reference) && query.text.trim() === this.query.text.trim();
    this.go(query, same ? this.trail.changed(query) : isBlank(query) ? new Trail() : this.trail.next(query));
  }

  /** Other weights, filters or examples: the same step. Moves of sliders in a row are one entry of the browser's history. */
  change(changes, kind) {
    const query = { ...this.query, ...changes, pages: 1, item: null };
    const replace = kind === "weigh" && this.coalesced === "weigh";
    this.go(query, this.trail.changed(query), { replace, quiet: kind === "weigh" });
    this.coalesced = kind;
  }

  go(query, trail, { replace = false, quiet = false } = {}) {
    [this.query, this.trail, this.coalesced, this.unknown] = [query, trail, null, []];
    this.remember(replace);
    this.refresh({ quiet });
  }

  /** `made`: the present entry is one that the browser made, by a link within the page say. */
  remember(replace, { made = false } = {}) {
    this.entries.wrote({ query: this.query, steps: this.trail.steps, replace: replace && !made });
    this.uploads.keep(this.entries.uploads);
    const state = { query: this.query, steps: this.trail.steps, at: this.trail.at, entry: this.entries.at };
    const address = toAddress(this.query) || location.pathname;
    try {
      history[replace ? "replaceState" : "pushState"](state, "", address);
    } catch {
      history[replace ? "replaceState" : "pushState"](null, "", location.pathname); // too long for this browser: the search goes on without an address
    }
  }

  restore(state) {
    if (!this.vocabulary) return;
    document.querySelectorAll("dialog[open]").forEach((dialog) => dialog.close());
    const { query, unknown } = weighable(state?.query ?? fromAddress(location.search), this.names);
    [this.query, this.unknown, this.coalesced] = [query, unknown, null];
    const steps = state?.steps.map((step) => weighable(step, this.names).query);
    this.trail = state ? new Trail(steps, state.at) : isBlank(query) ? new Trail() : new Trail([query], 0);
    if (state) this.entries.at = state.entry;
    if (!state || unknown.length) this.remember(true, { made: !state });
    this.refresh({ quiet: true });
  }

  // ---- what is shown -------------------------------------------------------------------------------------------------------------

  async refresh({ quiet = false } = {}) {
    const query = this.query;
    const asked = !isBlank(query);
    this.showControls();
    this.failed = false;
    const upload = query.reference?.upload === undefined ? null : this.uploads.get(query.reference.upload);
    if (query.reference?.upload !== undefined && !upload) return lostUpload(this);
    this.setBusy(true);
    if (!asked && !this.offers("list")) return showUnlisted(this, query);
    const wanted = Math.min(query.pages * PAGE_SIZE, MOST_AT_ONCE);
    const filter = toFilter(query.filters);
    if (this.offers("facets") && this.facetsOf !== JSON.stringify(query.filters)) this.loadFacets(query);
    try {
      const answer = await this.answers.ask((signal) =>
        asked
          ? this.api.search(toRequest(query, { k: wanted, zones: this.countsZones(query) }), upload?.blob, signal)
          : this.api.items({ limit: wanted, filter }, signal),
      );
      if (!answer) return;
      clearNotice();
      this.setBusy(false);
      if (asked) this.showAnswer(answer, query, wanted);
      else showItems(this, answer, query);
      if (!quiet && asked) this.revealResults();
      if (query.item !== null && !byId("details").open) this.details(this.grid.item(query.item) ?? { id: query.item });
    } catch (error) {
      this.setBusy(false);
      fail(this, error, () => this.refresh({ quiet }));
    }
  }

  showAnswer(answer, query, wanted) {
    this.last = answer;
    this.shown = "search";
    const counts = answer.zones?.counts;
    const candidates = counts ? counts.near + counts.mid + counts.easy : null;
    this.exhausted = answer.hits.length < wanted || answer.hits.length === candidates || wanted >= (this.vocabulary.limits?.k ?? 10_000);
    this.grid.show(answer.hits, { ranked: true, zones: answer.zones, attributes: this.names });
    this.composer.tell([...leftOut(this.unknown, this.names), ...notesOf(answer, this.vocabulary.model, { refines: this.offers("refine"), uploaded: query.reference?.upload !== undefined })]);
    this.sliders.show({ weights: query.weights, predicted: answer.predicted_weights, why: this.whyNoWeights(query) });
    byId("results-title").textContent = answer.hits.length ? "Results" : "No results";
    const best = answer.hits[0]?.score;
    const near = counts?.near ?? 0;
    const told = [candidates !== null && `of ${plural(candidates, "item")}`, near > 1 && `the first ${count(near)} equally good`];
    byId("summary").textContent = answer.hits.length ? told.filter(Boolean).join(", ") : "";
    if (answer.index) this.tellSize(answer.index);
    if (answer.hits.length) say(`${plural(answer.hits.length, "result")}, best ${score(best)}`);
    else nothing(this, query);
    this.showMore();
  }

  /** Whether the near and the mid zone can be asked for. */
  countsZones(query) {
    return this.vocabulary.zones !== false && (this.offers("filtered_zones") || !Object.keys(query.filters).length);
  }

  async more() {
    if (this.busy || this.exhausted || this.failed || !this.vocabulary || byId("more").hidden) return;
    const { query } = this;
    const offset = this.grid.size;
    this.setBusy(true, true);
    try {
      const asked = this.shown === "search";
      const upload = query.reference?.upload === undefined ? null : this.uploads.get(query.reference.upload);
      const zones = this.countsZones(query);
      const k = Math.min(PAGE_SIZE, (this.vocabulary.limits?.k ?? 10_000) - offset);
      const answer = await this.answers.ask((signal) =>
        asked
          ? this.api.search(toRequest(query, { k, offset, zones }), upload?.blob, signal)
          : this.api.items({ limit: PAGE_SIZE, after: this.next, filter: toFilter(query.filters) }, signal),
      );
      if (!answer) return;
      const found = asked ? answer.hits : answer.items;
      this.grid.append(found, { ranked: asked, attributes: this.names });
      this.next = answer.next ?? null;
      this.exhausted = asked ? found.length < k || k < PAGE_SIZE : answer.next === null;
      this.query = { ...query, pages: query.pages + 1 };
      this.trail = this.trail.changed(this.query);
      this.remember(true);
      this.setBusy(false);
      say(`${plural(this.grid.size, asked ? "result" : "item")} shown`);
      this.showMore();
    } catch (error) {
      this.setBusy(false);
      if (error.code === "page_gone") return void this.refresh({ quiet: true }); // the index was rewritten since
      fail(this, error, () => {
        this.failed = false;
        clearNotice();
        this.more();
      });
    }
  }

  showMore() {
    const more = byId("more");
    more.hidden = this.exhausted || this.grid.size === 0;
    more.textContent = this.shown === "search" ? "More results" : "More items";
    if (!more.hidden && more.getBoundingClientRect().top < innerHeight + AHEAD_PX) this.more(); // the observer tells of changes alone
  }

  async loadFacets(query) {
    try {
      const facets = await this.facetAnswers.ask((signal) => this.filters.load(this.api, query.filters, signal));
      if (!facets) return;
      this.facetsOf = JSON.stringify(query.filters);
      this.filters.show(facets.keys, query.filters);
    } catch (error) {
      if (error.status === undefined) throw error; // not the server's: a bug of this page
      this.facetsOf = null; // asked for again with the next search, also where its filters are those of before
      this.filters.showUnloaded(query.filters);
    }
    const empty = this.grid.size === 0 && !this.busy && !this.failed && this.query === query;
    if (empty && Object.keys(query.filters).length) nothing(this, query); // by these totals, or by none, and not by those of before
  }

  showControls() {
    const { query } = this;
    this.composer.show(query);
    this.sliders.show({ weights: query.weights, predicted: this.last?.predicted_weights ?? null, why: this.whyNoWeights(query) });
    showTrail(this.trail, { go: (at) => this.go({ ...this.trail.steps[at], item: null }, this.trail.moved(at)), uploadOf: this.uploads.get });
    const filters = Object.entries(query.filters).map(([key, filter]) => chip(described(key, filter), () => this.dropFilter(key)));
    const unlike = query.unlike.map((id) => chip(`not like ${id}`, () => this.change({ unlike: query.unlike.filter((one) => one !== id) }, "unlike"), {
      picture: thumbnail({ id }, this.uploads.get), label: `Undo: not like ${id}`,
    }));
    byId("chips").hidden = filters.length + unlike.length === 0;
    byId("chips").replaceChildren(...filters, ...unlike);
    byId("copy-link").hidden = isBlank(query) && !Object.keys(query.filters).length;
    document.title = [query.text.trim().slice(0, 60), query.reference?.id && `like ${query.reference.id}`, "Image search"].filter(Boolean).join(" · ");
  }

  whyNoWeights(query) {
    if (!this.names.length) return "This model has no attributes to weigh.";
    return query.text.trim() ? null : "Off until you write a text: the model reads the weights from it.";
  }

  dropFilter(key) {
    const { [key]: _, ...filters } = this.query.filters;
    this.change({ filters }, "filter");
  }

  setBusy(busy, more = false) {
    this.busy = busy;
    byId("results").setAttribute("aria-busy", busy ? "true" : "false");
    byId("results").classList.toggle("busy", busy && !more);
  }

  revealResults() {
    const top = byId("results").getBoundingClientRect().top;
    if (top < 0) scrollTo({ top: 0, behavior: still() ? "auto" : "smooth" });
  }

  tellSize({ items }) {
    this.indexing.items = items;
    byId("facts").textContent = plural(items, "item");
  }

  /** Something was written from this page: the dialog stays open, what is behind it is new. */
  rewritten() {
    this.facetsOf = null;
    this.refresh({ quiet: true });
    this.indexing.look();
  }

  /** The index holds other items than before. */
  grown() {
    this.tellSize({ items: this.indexing.items });
    this.facetsOf = null;
    if (this.busy || document.querySelector("dialog[open]")) setTimeout(() => this.grown(), LATER_MS);
    else this.refresh({ quiet: true });
  }

  // ---- what else can be done -----------------------------------------------------------------------------------------------------

  async details(item) {
    let known = item;
    if (known.metadata === undefined) {
      try {
        known = { ...(await this.api.item(item.id)), ...item };
      } catch (error) {
        return fail(this, error, () => this.details(item));
      }
    }
    if (this.query.item !== known.id) {
      this.query = { ...this.query, item: known.id };
      this.remember(true);
    }
    showDetails(known, this.names, {
      pick: (one) => this.pick(one),
      picks: this.grid.picks,
      unlike: isBlank(this.query) ? null : (one) => this.unlike(one),
      copy: (one, button) => copyAddress({ ...this.query, item: one.id }, button),
      edit: this.vocabulary.writes ? (one) => this.manage(one.id) : null,
      other: (one) => this.details(this.grid.item(one.id) ?? { id: one.id, metadata: one.metadata }),
      similar: async (id, signal) => (await this.api.search({ reference_id: id, k: 6 }, null, signal)).hits,
      closed: () => {
        this.query = { ...this.query, item: null };
        this.remember(true);
      },
    });
  }

  manage(id = "") {
    showManage(this.api, { limits: this.vocabulary.image, needsKey: this.vocabulary.keys !== false, id, changed: () => this.rewritten() });
  }
}

new Page();
