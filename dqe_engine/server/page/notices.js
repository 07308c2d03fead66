// What the page says: to everybody in a box above the results, to screen readers in the live region.

import { byId, el, megabytes } from "./dom.js";

let timer = null;

/** Say something to screen readers; the same words again are said again. */
export function say(text) {
  const live = byId("live");
  live.textContent = live.textContent === text ? `${text}\u00a0` : text;
}

export function clearNotice() {
  clearInterval(timer);
  byId("notice").replaceChildren();
}

/**
 * A box above the results. kind: "error", "wait" or "plain". actions: [{label, run}]. wait: seconds after which `then` runs, counted down
 * in sight; it is announced once.
 */
export function notice({ kind = "plain", title, text, small, actions = [], wait = null, then = null }) {
  clearInterval(timer);
  const left = el("span", { class: "countdown", "aria-hidden": "true" });
  const buttons = actions.map(({ label, run }) => el("button", { type: "button", text: label, on: { click: run } }));
  const box = el("div", { class: `notice ${kind}`, role: kind === "error" ? "alert" : "status" },
    el("h3", { text: title }), text && el("p", { text }), wait !== null ? left : null,
    buttons.length ? el("div", { class: "actions" }, ...buttons) : null, small && el("p", { class: "fine", text: small }));
  byId("notice").replaceChildren(box);
  if (wait === null) return;
  const end = Date.now() + wait * 1000;
  const tick = () => {
    const seconds = Math.max(0, Math.ceil((end - Date.now()) / 1000));
    left.textContent = seconds ? `Trying again in ${seconds} s` : "Trying again…";
    if (seconds) return;
    clearInterval(timer);
    then();
  };
  timer = setInterval(tick, 250);
  tick();
}

/** What an error of the API means to the one who searches, and what to do: {title, text, wait?}. `image`: the server's limits, if known. */
export function explained(error, image) {
  const most = image?.max_bytes ? `at most ${megabytes(image.max_bytes)}` : "less";
  const formats = image?.formats?.length ? image.formats.join(", ") : "JPEG, PNG and other common formats";
  const wait = error.retryAfter ?? 3;
  switch (error.status) {
    case 0:
      return error.code === "offline"
        ? { title: "No connection", text: `${error.message} Check the connection; this page tries again when it is back.` }
        : { title: "No answer", text: `${error.message} Try again.` };
    case 401:
      return { title: "A key is needed", text: "This server asks for a key. Whoever runs it can give you one." };
    case 403:
      return { title: "Not allowed", text: tidy(error.message) };
    case 404:
      return { title: "Not in the index", text: `${tidy(error.message.split(";")[0])} It may have been removed.` };
    case 408:
    case 504:
      return { title: "That took too long", text: "The server gave up on this request. Try again; fewer results or a filter make it quicker." };
    case 413:
      return { title: "The image is too large", text: `The server takes ${most}. Choose a smaller image, or save it with fewer pixels.` };
    case 415:
      return { title: "This kind of image is not accepted", text: `The server takes ${formats}. Save the image as one of these.` };
    case 422:
      return { title: "The server cannot use this", text: tidy(error.message) };
    case 429:
      return { title: "Many are searching just now", text: "Your search waits for its turn.", wait };
    case 503:
      return { title: "The server is not ready yet", text: tidy(error.message), wait };
    case 507:
      return { title: "The server's disk is full", text: `${tidy(error.message)} Nothing was changed.` };
    default:
      return { title: "The server made a mistake", text: tidy(error.message) };
  }
}

/** One of the server's lines as a sentence. */
const tidy = (message) => {
  const text = message.trim();
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
};
