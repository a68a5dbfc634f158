// The client of the REST API.

import { yieldToBrowser } from "./dom.js";

const PARALLEL_DATES = 4;

/** An error of the API or the network, in words for the reader. */
export class Problem extends Error {
  constructor(title, detail, { status = 0 } = {}) {
    super(detail);
    this.title = title;
    this.status = status;
  }
}

const KEPT = "tripfold-key";

/** Store an API key until this window is closed. */
export const keepKey = (key) => sessionStorage.setItem(KEPT, key);

/** Whether this window has an API key. */
export const hasKey = () => sessionStorage.getItem(KEPT) !== null;

function headers(accept) {
  const key = sessionStorage.getItem(KEPT);
  return { Accept: accept, ...(key && { "X-API-Key": key }) };
}

function keyRefused(response) {
  return sessionStorage.getItem(KEPT)
    ? new Problem("This API key is unknown", "It is mistyped or revoked. Enter a valid key.", response)
    : new Problem("An API key is needed", "Ask the operator of this service, who creates keys with `tripfold api-key`.", response);
}

async function checkedFetch(path, accept, { etag, ...options } = {}) {
  let response;
  try {
    response = await fetch(path, { headers: { ...headers(accept), ...(etag && { "If-None-Match": etag }) }, ...options });
  } catch (error) {
    throw unreachable(error);
  }
  if (response.ok || (etag && response.status === 304)) return response;
  if (response.status === 401) throw keyRefused(response);
  const body = await response.json().catch(() => null);
  throw new Problem(body?.title ?? `Status ${response.status}`, body?.detail ?? response.statusText, response);
}

function unreachable(error) {
  if (error.name === "AbortError") return error;
  return new Problem("The service cannot be reached", "Check that it runs and that this machine is connected to it.");
}

const fetched = async (path, options = {}) => (await checkedFetch(path, "application/json", options)).json().catch(() => null);

async function* pieces(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

/** The path of the detailed statistics of a range, or of one country in it. */
export const statsPath = ({ from, to, country }) =>
  `/country-stats?${new URLSearchParams({ from, to, detail: "full", ...(country && { country }) })}`;

/** The statistics of a range in another media type, as a file. */
export const statsFile = async (range, type) => (await checkedFetch(statsPath(range), type)).blob();

/**
 * Read the detailed country-days of a range. Calls `ondays` with sorted batches as they arrive, and returns the ETag. If it
 * equals `etag`, nothing has changed, and `ondays` is not called.
 */
export async function countryStats(range, { signal, etag }, ondays) {
  const response = await checkedFetch(statsPath(range), "application/x-ndjson", { signal, etag });
  if (response.status === 304) return etag;
  let rest = "";
  try {
    for await (const piece of pieces(response)) {
      const end = piece.lastIndexOf("\n");
      if (end >= 0) ondays(JSON.parse(`[${(rest + piece.slice(0, end)).replaceAll("\n", ",")}]`));
      rest = end >= 0 ? piece.slice(end + 1) : rest + piece;
      await yieldToBrowser();
    }
  } catch (error) {
    throw error instanceof SyntaxError ? error : unreachable(error);
  }
  if (rest) throw new Problem("The statistics are incomplete", "The connection ended early. Try again.");
  return response.headers.get("ETag");
}

/** The first `limit` refused files of a range of dates, and the number of all. */
export const quarantine = ({ from, to }, limit, signal) =>
  fetched(`/quarantine?${new URLSearchParams({ from, to, limit })}`, { signal });

/** A page of a country-day's cities. `next` is the path from the previous page. */
export const ledger = (country, date, next) =>
  fetched(next ?? `/country-stats/${encodeURIComponent(country)}/${date}?limit=1000`);

export const latestRequests = async (limit) => (await fetched(`/process-requests?limit=${limit}`)).requests;
export const cancel = (id) => fetched(`/process-requests/${id}`, { method: "DELETE" });
export const retry = (id) => fetched(`/process-requests/${id}/retry`, { method: "POST" });
export const request = (id) => fetched(`/process-requests/${id}`);

/** Follow a request: call `onevent` with each of its states until the stream ends. The caller reconnects. */
export async function follow(id, onevent, signal) {
  const response = await fetch(`/process-requests/${id}/events`, { headers: headers("text/event-stream"), signal });
  if (!response.ok || !response.body) return;
  let rest = "";
  for await (const piece of pieces(response)) {
    const parts = (rest + piece).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) onevent(JSON.parse(data.slice(6)));
    }
  }
}

/** Request the processing of a date, or of a range of dates as a backfill. */
export const ask = (from, to) =>
  fetched(
    from === to
      ? `/process-request?${new URLSearchParams({ date: from })}`
      : `/backfills?${new URLSearchParams({ from, to, only: "all", max_parallel: PARALLEL_DATES })}`,
    { method: "POST" },
  );

export const latestBackfills = async (limit) => (await fetched(`/backfills?limit=${limit}`)).backfills;
export const cancelBackfill = (id) => fetched(`/backfills/${id}`, { method: "DELETE" });
export const schedules = async () => (await fetched("/schedules")).schedules;
