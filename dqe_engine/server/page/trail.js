// The breadcrumb: a picture and a text for each step, any of which can be gone back to.

import { byId, el } from "./dom.js";
import { picture } from "./tile.js";

/** `go(i)`: show step i again. `pictureOf(reference)`: of an upload, its address, or null where it is gone. */
export function showTrail(trail, { go, uploadOf }) {
  const root = byId("trail");
  root.hidden = trail.steps.length < 2;
  root.firstElementChild.replaceChildren(
    ...trail.steps.map((step, i) => {
      const text = step.text.trim() || (step.reference ? "like this" : "everything");
      const button = el("button", {
        type: "button", class: "crumb", on: { click: () => go(i) }, title: text,
        "aria-current": i === trail.at ? "step" : null, "aria-label": `Step ${i + 1}: ${named(step.reference)}${text}`,
      }, thumbnail(step.reference, uploadOf), el("span", { class: "crumb-text", text }));
      return el("li", { class: i > trail.at ? "ahead" : null }, button);
    }),
  );
  const current = root.querySelector("[aria-current]");
  if (current) root.firstElementChild.scrollLeft = current.offsetLeft - 40;
}

/** The reference's picture, small; nothing for none. */
export function thumbnail(reference, uploadOf, size = 160) {
  if (!reference) return null;
  if (reference.id !== undefined) return picture({ id: reference.id }, size, { lazy: false });
  const upload = uploadOf(reference.upload);
  const frame = el("span", { class: "picture loaded" });
  const instead = (text) => {
    frame.classList.add("missing");
    frame.replaceChildren(el("span", { class: "why", text }));
  };
  if (!upload) instead("gone");
  else frame.append(el("img", { src: upload.address, alt: "", on: { error: () => instead("no preview") } }));
  return frame;
}

function named(reference) {
  if (!reference) return "";
  return `${reference.id ?? "your image"}, `;
}
