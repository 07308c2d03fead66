// Shortcuts, and the switch between light and dark.

import { byId } from "./dom.js";
import { showShortcuts } from "./dialogs.js";

function kept(name, fallback) {
  try {
    return localStorage.getItem(name) ?? fallback;
  } catch {
    return fallback;
  }
}

function keep(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch {
    // storage is refused: it holds until the page is left
  }
}

/** Whether `/` and `?` work: those who dictate turn them off. */
export const singleKeys = {
  get: () => kept("dqe-single-keys", "on") === "on",
  set: (on) => keep("dqe-single-keys", on ? "on" : "off"),
};

export function listenToKeys(page) {
  addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    const typing = event.target.matches?.("textarea, select, input:not([type=range], [type=checkbox], [type=radio])");
    if (event.key === "Escape") {
      if (closePanel()) return;
      if (event.target === byId("text")) page.grid.focus();
    } else if (!typing && singleKeys.get() && event.key === "/") {
      event.preventDefault();
      scrollTo({ top: 0 });
      page.composer.focus({ select: true });
    } else if (!typing && singleKeys.get() && event.key === "?") {
      event.preventDefault();
      showShortcuts(singleKeys);
    }
  });
  for (const button of byId("dock").querySelectorAll("button")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-expanded") === "true" ? null : button.dataset.shows;
      if (shown) openPanel(shown);
      else closePanel();
    });
  }
}

/** On narrow screens weights and filters are a sheet at the bottom, one at a time. */
function openPanel(shown) {
  byId("panel").dataset.shown = shown;
  for (const button of byId("dock").querySelectorAll("button")) button.setAttribute("aria-expanded", String(button.dataset.shows === shown));
}

function closePanel() {
  const open = byId("dock").querySelector("[aria-expanded='true']");
  if (!open) return false;
  delete byId("panel").dataset.shown;
  open.setAttribute("aria-expanded", "false");
  open.focus();
  return true;
}

const THEMES = ["auto", "light", "dark"];
const LABELS = { auto: "Auto", light: "Light", dark: "Dark" };

/** A button that goes from the system's colours to light to dark, and is remembered. */
export function themeSwitch(button) {
  let theme = THEMES.includes(kept("dqe-theme")) ? kept("dqe-theme") : "auto";
  const show = () => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = LABELS[theme];
    button.setAttribute("aria-label", `Colours: ${theme === "auto" ? "as the system" : theme}`);
  };
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    keep("dqe-theme", theme);
    show();
  });
  show();
}
