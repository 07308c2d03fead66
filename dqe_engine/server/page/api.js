// The server's HTTP API. All addresses are relative to the page, so that it works behind a path prefix.

const PATIENCE_MS = 30_000;

/** An answer that is no success. status 0: there was no answer at all. */
export class ApiError extends Error {
  constructor(status, code, message, { requestId = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, requestId, retryAfter });
  }
}

/** Of several requests only the newest matters: asking again aborts the one before, and an older answer is never passed on. */
export class Latest {
  #turn = 0;
  #abort = null;

  /** What `request(signal)` gives, or null where a newer one was asked for meanwhile. */
  async ask(request) {
    this.cancel();
    const turn = this.#turn;
    const abort = (this.#abort = new AbortController());
    try {
      const answer = await request(abort.signal);
      return turn === this.#turn ? answer : null;
    } catch (error) {
      if (turn !== this.#turn) return null;
      throw error;
    }
  }

  cancel() {
    this.#turn += 1;
    this.#abort?.abort();
  }
}

export class Api {
  /** Sent with writes alone, and kept in this object until the page is closed: in no storage, and in no cookie; the session's is for reading. */
  writeKey = "";

  vocabulary = () => this.#call("v1/vocabulary");

  status = () => this.#call("v1/status");

  facets = (filter, signal) => this.#call(`v1/facets${query({ filter: json(filter) })}`, { signal });

  items = ({ limit, after, filter }, signal) => this.#call(`v1/items${query({ limit, after, filter: json(filter) })}`, { signal });

  item = (id, signal) => this.#call(itemAddress(id), { signal });

  /** `image`: a Blob that takes the place of `reference_id`. */
  search(body, image, signal) {
    if (!image) return this.#call("v1/search", { method: "POST", body, signal });
    const form = new FormData();
    form.append("image", image, "reference");
    form.append("query", JSON.stringify(body));
    return this.#call("v1/search", { method: "POST", form, signal });
  }

  signIn = (key) => this.#call("v1/session", { method: "POST", body: { key } });

  add(image, item) {
    const form = new FormData();
    form.append("image", image, "image");
    form.append("item", JSON.stringify(item));
    return this.#call("v1/items", { method: "POST", form, write: true });
  }

  update = (id, metadata) => this.#call(itemAddress(id), { method: "PATCH", body: { metadata }, write: true });

  remove = (id) => this.#call(itemAddress(id), { method: "DELETE", write: true });

  async #call(address, { method = "GET", body, form, signal, write = false } = {}) {
    const headers = { Accept: "application/json" };
    if (body) headers["Content-Type"] = "application/json";
    if (write && this.writeKey) headers.Authorization = `Bearer ${this.writeKey}`;
    const timeout = AbortSignal.timeout(PATIENCE_MS);
    let response, text;
    try {
      response = await fetch(address, {
        method, headers, body: form ?? (body && JSON.stringify(body)), credentials: "same-origin",
        signal: signal ? AbortSignal.any([signal, timeout]) : timeout,
      });
      text = await response.text();
    } catch (error) {
      if (signal?.aborted) throw error;
      throw timeout.aborted
        ? new ApiError(0, "timeout", `There was no answer within ${PATIENCE_MS / 1000} seconds.`)
        : new ApiError(0, "offline", navigator.onLine ? "The server does not answer." : "This device is offline.");
    }
    if (response.ok) return text ? parsed(text) : null;
    throw failure(response, text);
  }
}

/** The address of an item's picture with a longer side of at most `size` pixels: 160, 320 or 640. */
export const pictureAddress = (id, size) => `${itemAddress(id)}/image?size=${size}`;

const itemAddress = (id) => `v1/items/${encodeURIComponent(id)}`;

const json = (value) => (value ? JSON.stringify(value) : undefined);

function query(values) {
  const given = Object.entries(values).filter(([, value]) => value !== undefined && value !== null);
  return given.length ? `?${new URLSearchParams(given)}` : "";
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    throw new ApiError(0, "unreadable", "The answer is not from the search server. Something between the server and this page, such as a proxy, answered instead.");
  }
}

/** Gateways answer with pages of their own, so the body may be anything. */
function failure(response, text) {
  let told = {};
  try {
    told = JSON.parse(text).error ?? {};
  } catch {
    // not JSON: the status has to do
  }
  const wait = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  return new ApiError(response.status, told.code ?? "unknown", told.message ?? `The server answered ${response.status} ${response.statusText}`.trim(), {
    requestId: told.request_id ?? response.headers.get("X-Request-ID"),
    retryAfter: Number.isFinite(wait) ? Math.min(Math.max(wait, 1), 600) : null,
  });
}
