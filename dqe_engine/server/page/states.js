// What the page says where there is nothing to show: no items, no results, a lost image, an error.

import { askForKey } from "./dialogs.js";
import { byId, plural } from "./dom.js";
import { described } from "./filters.js";
import { explained, notice, say } from "./notices.js";

/** Nothing passed: what to loosen, or how to fill the index. */
export function nothing(page, query) {
  const active = Object.entries(query.filters);
  if (!active.length && page.indexing.items === 0) return page.indexing.showEmpty(page.vocabulary);
  if (!active.length) return notice({ title: "No item answers this", text: "Your unwanted examples leave out every item of the index. Take one back." });
  const loosened = page.filters.loosened.filter(([key, total]) => total > 0 && key in query.filters); // the totals may be those of filters before
  const actions = loosened.slice(0, 4).map(([key, total]) => ({
    label: `Without “${described(key, query.filters[key])}”: ${plural(total, "item")}`,
    run: () => page.dropFilter(key),
  }));
  if (!loosened.length || active.length > 1) actions.push({ label: "Without any filter", run: () => page.change({ filters: {} }, "filter") });
  if (page.shown === "items") byId("results-title").textContent = "No items";
  const text = loosened.length ? "Loosen one of the filters:" : "No item passes all filters together.";
  notice({ title: "No item passes the filters", text, actions });
  say(`No item passes the filters. ${loosened.length ? `Loosen ${loosened[0][0]}.` : ""}`);
}

/** The reference is an upload of a visit that has ended. */
export function lostUpload(page) {
  page.answers.cancel();
  page.setBusy(false);
  page.failed = true;
  page.grid.show([]);
  notice({ kind: "error", title: "Your image is gone", text: "An uploaded image is kept only while this page is open. Add it again, or go on without it.", actions: [
    { label: "Add it again", run: () => byId("file").click() }, { label: "Without it", run: () => page.step({ reference: null }) },
  ] });
}

/** Say what went wrong and what to do; `again()` does what failed once more. */
export function fail(page, error, again) {
  if (error.status === undefined) throw error; // not the server's: a bug of this page
  page.failed = true;
  if (!page.grid.size) {
    page.grid.show([]);
    byId("results-title").textContent = "Nothing to show yet";
    byId("summary").textContent = "";
  }
  const { title, text, wait = null } = explained(error, page.vocabulary?.image);
  const actions = [{ label: wait === null ? "Try again" : "Try now", run: again }];
  const { reference } = page.query;
  if (error.status === 401) {
    askForKey(page.api, () => (page.vocabulary ? again() : page.start()));
    actions[0] = { label: "Enter a key", run: () => askForKey(page.api, () => (page.vocabulary ? again() : page.start())) };
  }
  if (reference?.upload !== undefined && [413, 415, 422].includes(error.status)) actions[0] = { label: "Choose another image", run: () => byId("file").click() };
  if (reference && [404, 413, 415, 422].includes(error.status)) actions.push({ label: "Remove the image", run: () => page.step({ reference: null, weights: {} }) });
  if (page.query.unlike.length && [404, 422].includes(error.status)) actions.push({ label: "Forget what is not wanted", run: () => page.change({ unlike: [] }, "unlike") });
  const small = error.requestId && error.status >= 500 ? `Request ${error.requestId}` : null;
  notice({ kind: wait === null ? "error" : "wait", title, text, small, actions, wait, then: again });
}
