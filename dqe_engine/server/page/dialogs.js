// Dialogs: opening with the focus inside, closing with it back where it was; the one for a key and the list of shortcuts.

import { byId, el, icon, ICONS } from "./dom.js";

/** Fill and open a dialog. When it closes, the browser puts the focus back where it was; where that is gone, the results get it. */
export function open(id, titleText, content, { onClose = null } = {}) {
  const dialog = byId(id);
  const close = el("button", { type: "button", class: "close", "aria-label": "Close", on: { click: () => dialog.close() } }, icon(ICONS.cross));
  const title = el("h2", { id: `${id}-title`, tabindex: "-1", text: titleText });
  dialog.replaceChildren(el("div", { class: "dialog-head" }, title, close), ...content);
  if (!dialog.open) {
    dialog.showModal();
    dialog.addEventListener("close", () => {
      if (document.activeElement === document.body) byId("results").focus({ preventScroll: true });
      onClose?.();
    }, { once: true });
  }
  title.focus({ preventScroll: true });
  dialog.scrollTop = 0;
  return dialog;
}

/** A click on what is behind a dialog closes it. */
export function closeByBackdrop() {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => {
      if (event.target !== dialog) return;
      const { left, right, top, bottom } = dialog.getBoundingClientRect();
      const { clientX: x, clientY: y } = event;
      if (x < left || x > right || y < top || y > bottom) dialog.close();
    });
  }
}

/** Ask for a key until the server takes one; then `done()`. */
export function askForKey(api, done) {
  if (byId("session").open) return;
  const input = el("input", { type: "password", id: "key", autocomplete: "current-password", required: true, spellcheck: "false" });
  const wrong = el("p", { class: "wrong", role: "alert" });
  const send = async (event) => {
    event.preventDefault();
    wrong.textContent = "";
    try {
      await api.signIn(input.value.trim());
    } catch (error) {
      wrong.textContent = error.status === 401 || error.status === 403 ? "The server does not know this key." : error.message;
      input.select();
      return;
    }
    dialog.close();
    done();
  };
  const form = el("form", { class: "fields", on: { submit: send } },
    el("p", { text: "This server asks for a key. Whoever runs it can give you one." }),
    el("label", { for: "key", text: "Key" }), input, wrong,
    el("div", { class: "actions" }, el("button", { type: "submit", class: "strong", text: "Go on" })));
  const dialog = open("session", "A key is needed", [form]);
  input.focus();
}

const KEYS = [
  ["/", "to the text"],
  ["Enter", "search, or change the focused item"],
  ["Esc", "close what is open; from the text, to the results"],
  ["← → ↑ ↓", "move among the items"],
  ["Home, End", "first and last item shown"],
  ["i", "details of the focused item"],
  ["x", "not like the focused item"],
  ["Alt + ←, Alt + →", "a step back, a step forward"],
  ["?", "this list"],
];

/** The list of shortcuts; `singleKeys`: {get(), set(on)} of those that are a single character. */
export function showShortcuts(singleKeys) {
  const rows = KEYS.flatMap(([key, does]) => [el("dt", {}, ...key.split(", ").map((one) => el("kbd", { text: one }))), el("dd", { text: does })]);
  const box = el("input", { type: "checkbox", on: { change: () => singleKeys.set(box.checked) } });
  box.checked = singleKeys.get();
  open("shortcuts", "Keyboard shortcuts", [el("dl", { class: "keys" }, ...rows), el("label", { class: "choice" }, box, el("span", { text: "/ and ? work as shortcuts" }))]);
}
