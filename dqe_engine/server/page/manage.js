// The dialog for those who have a write key: add an image, change metadata, remove an item.

import { byId, el, megabytes } from "./dom.js";
import { open } from "./dialogs.js";
import { say } from "./notices.js";

/** `limits`: the server's for images; `changed()`: called after a write; `id`: the item to begin with. */
export function showManage(api, { limits, changed, id = "", needsKey = true }) {
  const key = field("write-key", "Write key", { type: "password", autocomplete: "off", spellcheck: "false", value: api.writeKey, "aria-describedby": "write-key-kept" });
  key.input.addEventListener("input", () => (api.writeKey = key.input.value.trim()));
  const content = [addForm(api, limits, changed), itemForm(api, changed, id)];
  if (needsKey) content.unshift(el("section", { class: "fields" }, ...key.nodes, el("p", { class: "hint", id: "write-key-kept", text: "This page keeps the key until it is closed or loaded again, and sends it with changes alone." })));
  open("manage", "Manage the index", content);
  if (id) byId("item-id").focus();
}

function addForm(api, limits, changed) {
  const file = field("add-file", "Image", { type: "file", accept: "image/*", required: true });
  const id = field("add-id", "Id", { type: "text", required: true, maxlength: 1000, autocomplete: "off", spellcheck: "false" });
  const metadata = area("add-metadata", "Metadata, a JSON object (may be empty)");
  const replace = el("input", { type: "checkbox", id: "add-replace" });
  file.input.addEventListener("change", () => {
    if (!id.input.value && file.input.files[0]) id.input.value = file.input.files[0].name;
  });
  const form = work("Add an image", "Add", async () => {
    const [image] = file.input.files;
    if (limits.max_bytes && image.size > limits.max_bytes) throw new Error(`The image has ${megabytes(image.size)}; the server takes at most ${megabytes(limits.max_bytes)}.`);
    const item = { id: id.input.value, metadata: read(metadata.input.value), replace: replace.checked };
    await api.add(image, item);
    form.reset();
    changed();
    return `Added ${item.id}.`;
  }, [...file.nodes, ...id.nodes, ...metadata.nodes, el("label", { class: "choice" }, replace, el("span", { text: "Replace the item if it exists" }))]);
  return form;
}

function itemForm(api, changed, first) {
  const id = field("item-id", "Id", { type: "text", required: true, maxlength: 1000, autocomplete: "off", spellcheck: "false", value: first });
  const metadata = area("item-metadata", "Metadata, a JSON object");
  const load = async () => {
    const item = await api.item(id.input.value);
    metadata.input.value = item.metadata ? JSON.stringify(item.metadata, null, 2) : "";
    return `${item.id} is loaded.`;
  };
  const remove = el("button", { type: "button", class: "danger", text: "Remove the item", "aria-describedby": "returns" });
  const returns = el("p", { id: "returns", class: "hint", hidden: true, text: "A photo in the server's folder stays there, and is left out of later updates; adding it here under the same id brings it back." });
  let sure = false;
  const ask = (asked) => {
    sure = asked;
    remove.textContent = asked ? "Remove it from the index?" : "Remove the item";
    returns.hidden = !asked;
  };
  id.input.addEventListener("input", () => ask(false));
  const form = work("Change metadata, or remove an item", "Change metadata", async () => {
    await api.update(id.input.value, read(metadata.input.value));
    changed();
    return `Changed the metadata of ${id.input.value}.`;
  }, [...id.nodes, el("button", { type: "button", text: "Load its metadata", on: { click: () => form.run(load) } }), ...metadata.nodes], [remove]);
  remove.addEventListener("click", () => {
    if (!id.input.value) return id.input.focus();
    if (!sure) {
      ask(true);
      return say(`${remove.textContent} ${returns.textContent}`);
    }
    ask(false);
    return form.run(async () => {
      await api.remove(id.input.value);
      const gone = id.input.value;
      form.reset();
      changed();
      return `Removed ${gone}.`;
    });
  });
  form.append(returns);
  if (first) form.run(load);
  return form;
}

/** A form whose work says how it went; `form.run(work)` does other work of the same form. */
function work(title, label, submit, nodes, buttons = []) {
  const said = el("p", { class: "said" });
  const send = el("button", { type: "submit", class: "strong", text: label });
  const form = el("form", { class: "fields" }, el("h3", { text: title }), ...nodes, el("div", { class: "actions" }, send, ...buttons), said);
  form.run = async (job) => {
    said.classList.remove("wrong");
    said.textContent = "Working…";
    send.disabled = true;
    try {
      said.textContent = await job();
    } catch (error) {
      said.classList.add("wrong");
      said.textContent = error.status === 401 ? "A write key is needed: enter it above." : error.message;
    } finally {
      send.disabled = false;
      say(said.textContent);
    }
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    form.run(submit);
  });
  return form;
}

function field(id, label, properties) {
  const input = el("input", { id, ...properties });
  return { input, nodes: [el("label", { for: id, text: label }), input] };
}

function area(id, label) {
  const input = el("textarea", { id, rows: 4, spellcheck: "false", placeholder: '{"brand": "x", "price": 19.5}' });
  return { input, nodes: [el("label", { for: id, text: label }), input] };
}

function read(text) {
  if (!text.trim()) return null;
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Error(`The metadata is not valid JSON: ${error.message}`);
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) throw new Error('The metadata must be an object such as {"brand": "x"}.');
  return value;
}
