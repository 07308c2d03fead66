// What the server says of its index: how far a job in the background is, and whether the index has changed.

import { byId, count, el, plural } from "./dom.js";
import { notice } from "./notices.js";

const BUSY_MS = 1500;
const IDLE_MS = 20_000;
const PACE_SECONDS = 10;

export class Indexing {
  items = 0;
  following = false;
  #revision = null;
  #told = null; // {vocabulary, filling, box}: what was said of an empty index, and where
  #begun = null; // {state, done, at}: where this page first saw the present state, to tell how long it takes
  #seen = false; // whether this page saw it going on: what was left out is news then

  /** `changed()`: called when the index is another one than before. */
  constructor(api, changed) {
    this.api = api;
    this.changed = changed;
  }

  start({ items, revision }) {
    if (this.following) return;
    this.following = true;
    this.items = items;
    this.#revision = revision;
    this.#follow();
  }

  async #follow() {
    const busy = document.visibilityState === "visible" && (await this.look());
    setTimeout(() => this.#follow(), busy ? BUSY_MS : IDLE_MS);
  }

  /** Ask once; returns whether it is worth asking again soon. */
  async look() {
    try {
      const status = await this.api.status();
      const going = this.#show(status.indexing);
      if (this.items === 0 && this.#told?.box.isConnected && this.#told.filling !== going) this.showEmpty(this.#told.vocabulary);
      if (status.revision !== this.#revision) {
        this.#revision = status.revision;
        this.items = status.items;
        this.changed();
      }
      return going || this.items === 0;
    } catch {
      return false; // whoever searches is told; this only looks again
    }
  }

  /** The progress bar; returns whether something is going on. */
  #show(indexing) {
    const root = byId("indexing");
    const going = indexing?.state === "comparing" || indexing?.state === "indexing";
    const left = indexing?.state === "done" && this.#seen ? leftOut(indexing.skipped) : "";
    root.hidden = !going && indexing?.state !== "failed" && !left;
    if (root.hidden) return false;
    this.#seen ||= going;
    if (left) {
      root.replaceChildren(el("p", { class: "hint", text: `Indexing is done. ${left}` }));
      return false;
    }
    if (!going) {
      root.replaceChildren(el("p", { class: "warn", text: `Indexing stopped: ${indexing.message ?? "see the server's log"}` }));
      return false;
    }
    const known = indexing.total > 0;
    const text = indexing.state === "comparing" ? "Comparing the images with the index" : `Indexing: ${count(indexing.done)} of ${count(indexing.total)}`;
    let bar = root.querySelector("progress");
    if (!bar) {
      bar = el("progress", { "aria-label": "Indexing" });
      root.replaceChildren(el("p"), bar);
    }
    const last = indexing.state === "indexing" && known ? this.#remaining(indexing) : "";
    root.firstElementChild.textContent = `${text}${last}.${this.items ? " You can search what is there already." : ""}`;
    if (known) {
      bar.max = indexing.total;
      bar.value = indexing.done;
    } else bar.removeAttribute("value");
    return true;
  }

  /** `, about 3 minutes left`, by the pace since this page saw it begin; empty while there is none to go by. */
  #remaining({ state, done, total }) {
    if (this.#begun?.state !== state || done < this.#begun.done) this.#begun = { state, done, at: Date.now() };
    const [made, seconds] = [done - this.#begun.done, (Date.now() - this.#begun.at) / 1000];
    if (made <= 0 || seconds < PACE_SECONDS) return "";
    const minutes = Math.ceil(((total - done) * seconds) / made / 60);
    return minutes > 1 ? `, about ${plural(minutes, "minute")} left` : ", less than a minute left";
  }

  showEmpty(vocabulary) {
    const filling = byId("indexing").querySelector("progress") !== null && !byId("indexing").hidden;
    const how = vocabulary.writes ? "Add images with “Manage” above, or index" : "Index";
    notice({
      title: filling ? "The first items are on their way" : "The index is empty",
      text: filling ? "They appear here as soon as they are indexed." : `${how} a folder: dqe-index BUNDLE FOLDER --out INDEX, or start dqe-serve with --images FOLDER --update. This page shows the items as soon as there are any.`,
    });
    this.#told = { vocabulary, filling, box: byId("notice").firstElementChild };
    byId("summary").textContent = plural(0, "item");
    byId("results-title").textContent = "Nothing to search yet";
  }
}

/** `3 files were left out: 2 damaged image, 1 not an image.`; empty for none. */
function leftOut(skipped) {
  const reasons = Object.entries(skipped ?? {}).filter(([, number]) => number > 0);
  if (!reasons.length) return "";
  const total = reasons.reduce((sum, [, number]) => sum + number, 0);
  const listed = reasons.map(([reason, number]) => `${count(number)} ${reason}`).join(", ");
  return `${plural(total, "file")} ${total === 1 ? "was" : "were"} left out: ${listed}.`;
}
