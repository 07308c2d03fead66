// Attribute weights: multipliers of what the model predicted, from 0 to MOST_WEIGHT, that re-rank while they are dragged.

import { byId, el } from "./dom.js";
import { MOST_WEIGHT } from "./state.js";
import { attributeColour } from "./tile.js";

const LEAST = 0.05; // a predicted weight below it, however multiplied, changes no answer: the text does not name the attribute
const DELAY_MS = 60;

export class Sliders {
  #rows = new Map();
  #moved = null; // multipliers by name that have not been passed on yet

  /** `weigh({name: multiplier})`: called while a slider moves, at most every 60 ms; `reset()`. */
  constructor(attributes, { weigh, reset }) {
    for (const name of attributes) {
      const id = `weight-${this.#rows.size}`;
      const input = el("input", { type: "range", id, min: 0, max: MOST_WEIGHT, step: 0.1, value: 1, "aria-describedby": `${id}-said` });
      const factor = el("output", { for: id, class: "factor" });
      const said = el("span", { class: "said", id: `${id}-said` });
      const row = el("div", { class: "slider", style: { "--c": attributeColour(name, attributes) } },
        el("label", { for: id }, el("i", { class: "dot", "aria-hidden": "true" }), name), factor, input, said);
      input.addEventListener("input", () => {
        this.#tell(name, Number(input.value));
        if (this.#moved === null) setTimeout(() => this.#pass(weigh), DELAY_MS);
        this.#moved = { ...this.#moved, [name]: Number(input.value) };
      });
      this.#rows.set(name, { input, factor, said, row, predicted: null });
      byId("sliders").append(row);
    }
    byId("reset-weights").addEventListener("click", reset);
  }

  /** The multipliers that are asked for, and what the last answer predicted. `why`: why they are off, or null. */
  show({ weights, predicted = null, why = null }) {
    byId("weights-why").textContent = why ?? "Less keeps more of the reference, more shows more of what your text says. 1 × is what the model read from it.";
    byId("reset-weights").hidden = why !== null || !Object.values(weights).some((value) => value !== 1);
    for (const [name, row] of this.#rows) {
      row.predicted = why === null ? (predicted?.[name] ?? row.predicted) : null;
      const off = why !== null || (row.predicted !== null && row.predicted < LEAST);
      row.input.disabled = off;
      row.row.classList.toggle("off", off);
      const value = weights[name] ?? 1;
      if (!(name in (this.#moved ?? {}))) row.input.value = value; // else its place is newer than what is asked for
      this.#tell(name, Number(row.input.value));
    }
  }

  #pass(weigh) {
    const moved = this.#moved;
    this.#moved = null;
    weigh(moved);
  }

  #tell(name, value) {
    const { factor, said, input, predicted, row } = this.#rows.get(name);
    row.style.setProperty("--at", `${(100 * value) / MOST_WEIGHT}%`);
    factor.textContent = `× ${value.toFixed(1)}`;
    input.setAttribute("aria-valuetext", `${value.toFixed(1)} times`);
    const text = predicted === null ? "" : predicted < LEAST ? "not in your text" : value === 1 ? `predicted ${predicted.toFixed(2)}` : `predicted ${predicted.toFixed(2)}, used ${(predicted * value).toFixed(2)}`;
    if (said.textContent !== text) said.textContent = text;
  }
}
