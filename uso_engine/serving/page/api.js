// The server: what it accepts, whether it is ready, and one request with its events.

import { readEvents } from "./event_stream.js";

const PATH = "/v1/images/generations";

/** An answer that is no success, with the server's own words. */
export class ApiError extends Error {
  /**
   * @param {number} status HTTP status, 0 where there was no answer
   * @param {{message?: string, errors?: string[], fields?: string[], requestId?: string}} body of the answer
   * @param {string|null} retryAfter seconds, as the header has them
   */
  constructor(status, body, retryAfter = null) {
    super(body.message || `HTTP status ${status}`);
    this.status = status;
    this.errors = body.errors || [];
    this.fields = body.fields || [];
    this.requestId = body.requestId || "";
    this.retryAfter = retryAfter;
  }
}

/**
 * What the server accepts.
 * @returns {Promise<{fields: object, needsKey: boolean, version: string}>} JSON schema of each field of a request
 */
export async function readLimits() {
  const response = await fetch("/openapi.json");
  if (!response.ok) throw new ApiError(response.status, {});
  const document = await response.json();
  return {
    fields: document.components.schemas.GenerationRequest.properties,
    needsKey: Boolean(document.components.securitySchemes),
    version: document.info.version,
  };
}

/** @returns {Promise<string>} "ready", "loading" or "unreachable" */
export async function readState() {
  try {
    const response = await fetch("/readyz", { cache: "no-store" });
    return response.ok ? "ready" : "loading";
  } catch {
    return "unreachable";
  }
}

/**
 * Send a request; its events come as they happen, the last one is "done" with the answer.
 * @param {object} request the body
 * @param {string} key API key, or ""
 * @param {AbortSignal} signal ends the request on the server, too
 * @yields {{name: string, data: object}}
 */
export async function* generate(request, key, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(`${PATH}?stream=true&previews=true`, {
      method: "POST",
      headers,
      body: JSON.stringify({ ...request, sync_mode: true }),  // the pictures themselves: they are kept in this browser
      signal,
    });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new ApiError(0, { message: "The server cannot be reached." });
  }
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new ApiError(response.status, body, response.headers.get("Retry-After"));
  }
  for await (const event of readEvents(response.body)) {
    if (event.name === "error") throw new ApiError(event.data.statusCode, event.data);
    yield event;
    if (event.name === "done") return;
  }
  throw new ApiError(0, { message: "The connection ended before the picture was there." });
}
