// The REST API, as this page uses it.

import { breath } from "./dom.js";

/** An answer that was not what was asked for, in words for the reader. */
export class Problem extends Error {
  constructor(title, detail, { status = 0 } = {}) {
    super(detail);
    this.title = title;
    this.status = status;
  }
}

const KEPT = "tripfold-key";

/** Keep an API key for as long as this window is open. */
export const keepKey = (key) => sessionStorage.setItem(KEPT, key);

function headers(accept) {
  const key = sessionStorage.getItem(KEPT);
  return { Accept: accept, ...(key && { "X-API-Key": key }) };
}

function keyRefused(answer) {
  return sessionStorage.getItem(KEPT)
    ? new Problem("This API key is not known", "It is mistyped, or it was revoked. Enter another one.", answer)
    : new Problem("An API key is needed", "The operator of this service makes one with `tripfold api-key`.", answer);
}

async function answered(path, accept, { etag, ...options } = {}) {
  let answer;
  try {
    answer = await fetch(path, { headers: { ...headers(accept), ...(etag && { "If-None-Match": etag }) }, ...options });
  } catch (error) {
    throw unreachable(error);
  }
  if (answer.ok || (etag && answer.status === 304)) return answer;
  if (answer.status === 401) throw keyRefused(answer);
  const body = await answer.json().catch(() => null);
  throw new Problem(body?.title ?? `Status ${answer.status}`, body?.detail ?? answer.statusText, answer);
}

function unreachable(error) {
  if (error.name === "AbortError") return error;
  return new Problem("The service cannot be reached", "Is it running, and is this machine connected to it?");
}

const fetched = async (path, options = {}) => (await answered(path, "application/json", options)).json().catch(() => null);

async function* pieces(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

/** The statistics of a range in another form, as a file. */
export async function statsFile({ from, to, country }, type) {
  const query = new URLSearchParams({ from, to, detail: "full", ...(country && { country }) });
  return (await answered(`/country-stats?${query}`, type)).blob();
}

/**
 * The country-days of a range, with all details: `ondays` is called with some at a time, sorted, as they come.
 * Returns their ETag. Where that is `etag`, nothing has changed and `ondays` is not called.
 */
export async function countryStats({ from, to, country }, { signal, etag }, ondays) {
  const query = new URLSearchParams({ from, to, detail: "full", ...(country && { country }) });
  const answer = await answered(`/country-stats?${query}`, "application/x-ndjson", { signal, etag });
  if (answer.status === 304) return etag;
  let rest = "";
  try {
    for await (const piece of pieces(answer)) {
      const end = piece.lastIndexOf("\n");
      if (end >= 0) ondays(JSON.parse(`[${(rest + piece.slice(0, end)).replaceAll("\n", ",")}]`));
      rest = end >= 0 ? piece.slice(end + 1) : rest + piece;
      await breath();
    }
  } catch (error) {
    throw error instanceof SyntaxError ? error : unreachable(error);
  }
  if (rest) throw new Problem("The numbers broke off", "The service did not send all of them.");
  return answer.headers.get("ETag");
}

/** The files of a range of dates that were refused, at most `limit` of them, and how many there are. */
export const quarantine = ({ from, to }, limit, signal) =>
  fetched(`/quarantine?${new URLSearchParams({ from, to, limit })}`, { signal });

/** A page of a country-day's cities; `next` is the path that the page before named. */
export const ledger = (country, date, next) =>
  fetched(next ?? `/country-stats/${encodeURIComponent(country)}/${date}?limit=100`);

export const latestRequests = async (limit) => (await fetched(`/process-requests?limit=${limit}`)).requests;
export const cancel = (id) => fetched(`/process-requests/${id}`, { method: "DELETE" });
export const retry = (id) => fetched(`/process-requests/${id}/retry`, { method: "POST" });
export const request = (id) => fetched(`/process-requests/${id}`);

/** Follow a request: `onevent` is called with each state of it. Ends with the stream; whoever calls begins again. */
export async function follow(id, onevent, signal) {
  const answer = await fetch(`/process-requests/${id}/events`, { headers: headers("text/event-stream"), signal });
  if (!answer.ok || !answer.body) return;
  let rest = "";
  for await (const piece of pieces(answer)) {
    const parts = (rest + piece).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) onevent(JSON.parse(data.slice(6)));
    }
  }
}

/** Ask for the dates from one to another to be processed. */
export const ask = (from, to) =>
  fetched(`/process-request?${new URLSearchParams(from === to ? { date: from } : { from, to })}`, { method: "POST" });
