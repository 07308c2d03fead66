// The dialog about one item: its picture, why it scored as it did, its metadata, items like it, and what to do with it.

import { byId, captionOf, el, nameOf, score, words } from "./dom.js";
import { open } from "./dialogs.js";
import { parts, picture } from "./tile.js";

/**
 * Open it for an item or a hit. `does`: {pick, picks (its words), unlike, copy, edit (or null), other, similar(id, signal), closed}.
 * `attributes`: the vocabulary's names, in its order.
 */
export function showDetails(item, attributes, does) {
  const abort = new AbortController();
  const leave = (run) => {
    byId("details").addEventListener("close", run, { once: true }); // after the focus has gone back, so that `run` may move it
    byId("details").close();
  };
  const scored = typeof item.score === "number";
  const action = (text, run, strong) => el("button", { type: "button", class: strong ? "strong" : null, text, on: { click: run } });
  const actions = el("div", { class: "actions" },
    action(does.picks, () => leave(() => does.pick(item)), true),
    scored && does.unlike ? action("Not like this", () => leave(() => does.unlike(item))) : null,
    action("Copy link", ({ currentTarget }) => does.copy(item, currentTarget)),
    does.edit ? action("Edit or remove", () => leave(() => does.edit(item))) : null);
  const alike = el("section", { class: "alike", "aria-labelledby": "alike-title" }, el("h3", { id: "alike-title", text: "Similar items" }));
  const facts = el("div", { class: "about" }, actions, scored ? whyOf(item, attributes) : null, metadataOf(item), el("p", { class: "fine" }, "Id ", el("code", { text: item.id })));
  const name = nameOf(item);
  const frame = picture(item, 640, { lazy: false });
  const image = frame.querySelector("img");
  if (image) image.alt = captionOf(item) || name;
  open("details", name, [el("div", { class: "details-body" }, frame, facts), alike], {
    onClose: () => {
      abort.abort();
      does.closed();
    },
  });
  showAlike(alike, item, does, abort.signal);
}

async function showAlike(root, item, does, signal) {
  const strip = el("ul", { class: "strip small" });
  for (let i = 0; i < 6; i += 1) strip.append(el("li", { class: "tile skeleton", "aria-hidden": "true" }, el("span", { class: "picture" })));
  root.append(strip);
  try {
    const hits = await does.similar(item.id, signal);
    if (signal.aborted) return;
    strip.replaceChildren(
      ...hits.map((hit) =>
        el("li", { class: "tile" }, el("button", {
          type: "button", class: "pick", "aria-label": `Details of ${nameOf(hit)}, similarity ${score(hit.score)}`, on: { click: () => does.other(hit) },
        }, picture(hit, 160, { lazy: false }))),
      ),
    );
    if (!hits.length) strip.replaceWith(el("p", { class: "hint", text: "There is no other item." }));
  } catch (error) {
    if (!signal.aborted) strip.replaceWith(el("p", { class: "hint", text: `Not available now: ${error.message}` }));
  }
}

/** The parts of the score, each a bar from a common zero; together they are the score. */
function whyOf(hit, attributes) {
  const pieces = parts(hit, attributes);
  const head = el("h3", {}, "Score ", el("span", { class: "number", text: score(hit.score) }));
  if (!pieces.length) return el("section", { class: "why" }, head);
  const least = Math.min(0, ...pieces.map(({ value }) => value));
  const span = Math.max(...pieces.map(({ value }) => value), 0) - least || 1;
  const rows = pieces.map(({ name, value, colour }) => {
    const from = ((Math.min(value, 0) - least) / span) * 100;
    const bar = el("span", { class: value < 0 ? "part negative" : "part", "aria-hidden": "true", style: { "--c": colour, "--from": `${from.toFixed(2)}%`, "--w": `${((Math.abs(value) / span) * 100).toFixed(2)}%`, "--zero": `${((-least / span) * 100).toFixed(2)}%` } });
    return el("tr", {}, el("th", { scope: "row", text: name }), el("td", { class: "track" }, bar), el("td", { class: "number", text: (value < 0 ? "" : "+") + score(value) }));
  });
  const table = el("table", {}, el("caption", { text: "The parts of the score, which add up to it." }), el("tbody", {}, ...rows));
  return el("section", { class: "why" }, head, table);
}

function metadataOf(item) {
  const entries = Object.entries(item.metadata ?? {});
  if (!entries.length) return el("p", { class: "hint", text: "No metadata." });
  return el("dl", { class: "metadata" }, ...entries.map(([key, value]) => el("div", { class: words(value).length > 60 ? "wide" : null }, el("dt", { text: key }), el("dd", { text: words(value) }))));
}
