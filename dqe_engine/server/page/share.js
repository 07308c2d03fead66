// Sharing a search: its address.

import { say } from "./notices.js";
import { toAddress } from "./state.js";

/** Put the address of a search into the clipboard; the button says how it went. */
export async function copyAddress(query, button) {
  const address = new URL(toAddress(query) || ".", location.href).href;
  const uploaded = query.reference?.upload !== undefined;
  let said = uploaded ? "Copied, without your image: an upload cannot be shared" : "Copied";
  try {
    await navigator.clipboard.writeText(address);
  } catch {
    said = "Copy the address of this page instead";
  }
  const before = button.textContent;
  button.textContent = said;
  say(said);
  setTimeout(() => (button.textContent = before === said ? "Copy link" : before), 2500);
}
