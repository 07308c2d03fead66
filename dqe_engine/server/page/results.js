// The grid: tiles that are kept while they stay in the answer and move to their new places, with the zones told apart among them.

import { el, plural, still } from "./dom.js";
import { parts, Tile } from "./tile.js";

const ROW_AFTER = 12;
const HEAD_PX = 140;
const MOVE_MS = 260;
const MID = "Similar but different";
const midSaid = (number) => `${plural(number, "item")} a little behind the best: close to what you asked for, and not the same in something.`;

export class Grid {
  #tiles = new Map();
  #row = null; // the mid zone, where its items are too far down to be among the tiles
  #zones = null;
  #does;
  picks = "Change this one"; // what choosing a tile does, in words

  /** `does`: {pick, details, unlike}, each called with an item. */
  constructor(root, does) {
    this.root = root;
    this.#does = does;
    root.addEventListener("keydown", (event) => this.#onKey(event));
    root.addEventListener("focusin", ({ target }) => {
      const tile = target.closest(".tile")?.tile;
      if (tile) this.#reach(tile);
    });
    new ResizeObserver(() => this.#place()).observe(root);
  }

  get size() {
    return this.#tiles.size;
  }

  item = (id) => this.#tiles.get(id)?.item ?? null;

  /** Grey tiles in the places of what is on its way. */
  skeletons(number) {
    this.#tiles.clear();
    this.#row = null;
    const bare = () => el("li", { class: "tile skeleton", "aria-hidden": "true" }, el("span", { class: "picture" }), el("span", { class: "facts" }));
    this.root.replaceChildren(...Array.from({ length: number }, bare));
  }

  /** Show these items alone. `ranked`: they are hits; `zones`: the answer's, or null. */
  show(items, { ranked = false, zones = null, attributes = [] } = {}) {
    const before = this.#places();
    const focused = this.root.contains(document.activeElement) ? document.activeElement.closest(".tile")?.dataset.id : null;
    const old = this.#tiles;
    this.#tiles = new Map();
    const scale = highest(items, attributes);
    items.forEach((item, i) => {
      const tile = old.get(item.id) ?? new Tile(item, this.#does, this.picks);
      tile.update(item, { rank: ranked ? i + 1 : null, scale, attributes });
      tile.reachable = false;
      this.#tiles.set(item.id, tile);
    });
    this.#zones = zones;
    const among = items.some(({ zone }) => zone && zone !== "near");
    this.#row = zones?.mid.length && !among ? this.#strip(zones, scale, attributes) : null;
    this.root.classList.toggle("ranked", ranked);
    this.root.replaceChildren(...[...this.#tiles.values()].flatMap(({ root, item }, i) => [this.#head(item, items[i - 1]), root]).filter(Boolean));
    this.#place();
    this.#move(before);
    const tile = this.#tiles.get(focused) ?? this.#tiles.values().next().value;
    if (tile) this.#reach(tile);
    if (focused !== null && tile && !this.root.contains(document.activeElement)) tile.pick.focus({ preventScroll: true });
  }

  /** Show these after those that are there. */
  append(items, { ranked = false, attributes = [] } = {}) {
    const scale = highest([...this.#tiles.values()].map(({ item }) => item), attributes);
    for (const item of items) {
      if (this.#tiles.has(item.id)) continue;
      const head = this.#head(item, [...this.#tiles.values()].at(-1)?.item);
      if (head) this.root.append(head);
      const tile = new Tile(item, this.#does, this.picks);
      tile.update(item, { rank: ranked ? this.#tiles.size + 1 : null, scale, attributes });
      tile.reachable = this.#tiles.size === 0;
      this.#tiles.set(item.id, tile);
      this.root.append(tile.root);
    }
    this.#place();
  }

  focus() {
    this.root.querySelector(".tile .pick[tabindex='0']")?.focus();
  }

  /** Before the first item of a zone: what begins here. Nothing before the best answers, which need no words. */
  #head(item, previous) {
    if (!item.zone || item.zone === "near" || item.zone === previous?.zone || !this.#zones) return null;
    const { counts } = this.#zones;
    const [title, text] = item.zone === "mid" ? [MID, midSaid(counts.mid)] : ["Further away", `${plural(counts.easy, "item")}, by falling score.`];
    return el("li", { class: `zone-head ${item.zone}` }, el("h3", { text: title }), el("p", { text }));
  }

  #strip(zones, scale, attributes) {
    const list = el("ul", { class: "strip", tabindex: 0, "aria-labelledby": "mid-title" });
    for (const hit of zones.mid) {
      const tile = new Tile(hit, this.#does, this.picks);
      tile.update(hit, { scale, attributes });
      tile.reachable = false;
      list.append(tile.root);
    }
    return el("li", { class: "zone" }, el("h3", { id: "mid-title", text: MID }), el("p", { text: midSaid(zones.counts.mid) }), list);
  }

  /** Heads fill what is left of the row before them; the row of the mid zone stands after whole rows of tiles. Neither leaves a gap. */
  #place() {
    const columns = getComputedStyle(this.root).gridTemplateColumns.split(" ").length;
    const width = this.root.clientWidth / columns;
    let column = 0;
    for (const node of this.root.children) {
      if (node.classList.contains("tile")) column = (column + 1) % columns;
      else if (node.classList.contains("zone-head")) {
        const left = columns - column;
        const fills = column > 0 && left * width >= HEAD_PX;
        node.classList.toggle("beside", fills);
        node.style.setProperty("grid-column", fills ? `span ${left}` : "1 / -1");
        column = 0;
      }
    }
    if (!this.#row) return;
    const after = Math.max(1, Math.ceil(ROW_AFTER / columns)) * columns;
    const next = [...this.#tiles.values()][after]?.root ?? null;
    if (next ? this.#row.nextSibling === next : this.root.lastChild === this.#row) return;
    this.root.insertBefore(this.#row, next);
  }

  #places() {
    if (still()) return null;
    return new Map([...this.#tiles].map(([id, { root }]) => [id, root.getBoundingClientRect()]));
  }

  /** First, last, invert, play: each tile that is in sight glides from where it was; new ones fade in. */
  #move(before) {
    if (!before?.size) return;
    const seen = ({ top, bottom }) => bottom > 0 && top < innerHeight;
    const moves = [...this.#tiles].map(([id, { root }]) => [root, before.get(id), root.getBoundingClientRect()]);
    for (const [root, from, to] of moves) {
      if (!seen(to) && !(from && seen(from))) continue;
      const frames = from ? { transform: [`translate(${from.left - to.left}px, ${from.top - to.top}px)`, "none"] } : { opacity: [0, 1] };
      if (!from || from.left !== to.left || from.top !== to.top) root.animate(frames, { duration: MOVE_MS, easing: "cubic-bezier(.2, .7, .2, 1)" });
    }
  }

  #reach(tile) {
    for (const pick of this.root.querySelectorAll(".pick[tabindex='0']")) pick.closest(".tile").tile.reachable = false;
    tile.reachable = true;
  }

  #onKey(event) {
    const tile = event.target.closest(".tile")?.tile;
    if (!tile || event.ctrlKey || event.metaKey || event.altKey) return;
    const tiles = [...this.root.querySelectorAll(".tile")].map((node) => node.tile).filter(Boolean);
    const at = tiles.indexOf(tile);
    const goals = {
      ArrowRight: () => tiles[at + 1], ArrowLeft: () => tiles[at - 1], Home: () => tiles[0], End: () => tiles.at(-1),
      ArrowDown: () => beside(tile, tiles.slice(at + 1), 1), ArrowUp: () => beside(tile, tiles.slice(0, at).reverse(), -1),
    };
    if (event.key in goals) {
      event.preventDefault();
      const goal = goals[event.key]();
      if (!goal) return;
      this.#reach(goal);
      goal.pick.focus();
      goal.root.scrollIntoView({ block: "nearest", inline: "nearest" });
    } else if (event.key === "i") this.#does.details(tile.item);
    else if (event.key === "x" && typeof tile.item.score === "number") this.#does.unlike(tile.item);
  }
}

/** Of `tiles`, nearest first, the one in the next row (down: 1, up: -1) whose middle is closest; by places at rest, not by those on the way. */
function beside(tile, tiles, direction) {
  const middle = ({ offsetLeft, offsetWidth }) => offsetLeft + offsetWidth / 2;
  const next = tiles.filter(({ root }) => direction * (root.offsetTop - tile.root.offsetTop) > 8);
  const row = next.filter(({ root }) => Math.abs(root.offsetTop - next[0].root.offsetTop) <= 8);
  const off = ({ root }) => Math.abs(middle(root) - middle(tile.root));
  return row.reduce((best, other) => (best && off(best) <= off(other) ? best : other), null);
}

/** The sum that fills a bar: the largest of the positive parts, or of the scores. */
function highest(items, attributes) {
  const sums = items.map((item) => parts(item, attributes).reduce((sum, { value }) => sum + Math.max(value, 0), 0) || item.score || 0);
  return Math.max(...sums, 1e-6);
}
