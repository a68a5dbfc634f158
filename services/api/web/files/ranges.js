// Ranges of dates.

import { latestRequests } from "./api.js";
import { moved } from "./format.js";

const DAYS_AT_FIRST = 31;
const DAYS_WITHOUT_REQUESTS = 7;
const REQUESTS_LOOKED_AT = 20;

/** Read the range of the dates that were requested last. */
export const latestRange = async () => requestedRange(await latestRequests(REQUESTS_LOOKED_AT), todayInUtc());

/** The range of the dates that were requested last, at most a month; the last week if there are no requests. */
export function requestedRange(requests, today) {
  const dates = requests.map(({ date }) => date).sort();
  const to = dates.at(-1) ?? today;
  const earliest = moved(to, 1 - DAYS_AT_FIRST);
  return { from: dates.find((date) => date >= earliest) ?? moved(to, 1 - DAYS_WITHOUT_REQUESTS), to };
}

/** The date of now, in UTC. */
export const todayInUtc = () => new Date().toISOString().slice(0, 10);
