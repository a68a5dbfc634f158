// The REST API, as this page uses it.

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

async function fetched(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { headers: headers("application/json"), ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The service cannot be reached", "Is it running, and is this machine connected to it?");
  }
  const body = await answer.json().catch(() => null);
  if (!answer.ok) {
    throw new Problem(body?.title ?? `Status ${answer.status}`, body?.detail ?? answer.statusText, answer);
  }
  return body;
}

/** The statistics of a range in another form, as a file. */
export async function statsFile({ from, to, country }, type) {
  const query = new URLSearchParams({ from, to, detail: "full", ...(country && { country }) });
  const answer = await fetch(`/country-stats?${query}`, { headers: headers(type) });
  if (!answer.ok) throw new Problem("The numbers cannot be had", `The service answered ${answer.status}.`, answer);
  return answer.blob();
}

/** The statistics of a range, by country slug and date, with all details. */
export function countryStats({ from, to, country }, signal) {
  const query = new URLSearchParams({ from, to, detail: "full" });
  if (country) query.set("country", country);
  return fetched(`/country-stats?${query}`, { signal });
}

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
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
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
