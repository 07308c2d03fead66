// What the page shows while nothing is asked: the items of the index, or what one can do instead.

import { leftOut } from "./composer.js";
import { byId, plural } from "./dom.js";
import { clearNotice, say } from "./notices.js";
import { nothing } from "./states.js";

/** Nothing is asked, and the index has no list of its items: what one can do instead. */
export function showUnlisted(page, query) {
  page.answers.cancel();
  page.setBusy(false);
  clearNotice();
  page.last = null;
  page.shown = "items";
  [page.next, page.exhausted] = [null, true];
  page.grid.show([]);
  page.composer.tell(leftOut(page.unknown, page.names));
  page.sliders.show({ weights: {}, why: page.whyNoWeights(query) });
  byId("results-title").textContent = "Nothing asked yet";
  byId("summary").textContent = "Describe what you look for, or add an image.";
  page.showMore();
  if (query.item !== null && !byId("details").open) page.details({ id: query.item });
}

/** A page of the items, which can be chosen to be changed. */
export function showItems(page, answer, query) {
  page.last = null;
  page.shown = "items";
  page.next = answer.next;
  page.exhausted = answer.next === null;
  page.grid.show(answer.items);
  page.composer.tell(leftOut(page.unknown, page.names));
  page.sliders.show({ weights: {}, why: page.whyNoWeights(query) });
  byId("results-title").textContent = "Choose an item to change";
  const filtered = Object.keys(query.filters).length > 0;
  byId("summary").textContent = filtered ? `${plural(answer.total, "item")} left by the filters` : "or describe what you look for";
  if (!answer.items.length) nothing(page, query);
  else say(filtered ? `${plural(answer.total, "item")} left by the filters` : plural(answer.total, "item"));
  page.showMore();
}
