// Formats numbers, dates and sizes for people.

const whole = new Intl.NumberFormat("en");
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const count = (value) => whole.format(value);
export const short = (value) => (Math.abs(value) < 10_000 ? whole.format(value) : compact.format(value));
export const plural = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

/** Seconds, as `61.3 s` or `3 min 20 s`. */
export function delay(seconds) {
  if (Math.abs(seconds) < 120) return `${signed(seconds, seconds.toFixed(1))} s`;
  const rounded = Math.round(Math.abs(seconds));
  const minutes = Math.floor(rounded / 60);
  return signed(seconds, `${count(minutes)} min ${rounded % 60} s`);
}

/** Round seconds, as `30 s`, `2 min` or `2 min 30 s`. */
export function roundDelay(seconds) {
  const whole = Math.abs(seconds);
  const parts = [];
  if (whole >= 60) parts.push(`${count(Math.floor(whole / 60))} min`);
  if (whole < 60 || whole % 60) parts.push(`${Number((whole % 60).toPrecision(6))} s`);
  return signed(seconds, parts.join(" "));
}

/** Round seconds, in the unit of a narrow cell. */
export const secondsOrMore = (seconds) => (Math.abs(seconds) < 1000 ? signed(seconds, `${seconds} s`) : roundDelay(seconds));

const signed = (value, text) => (value < 0 ? `−${text.replace("-", "")}` : text);

/** Seconds, for a narrow cell. */
export function shortDelay(seconds) {
  return signed(seconds, Math.abs(seconds) < 1000 ? seconds.toFixed(1) : `${(seconds / 60).toFixed(0)} m`);
}

/** Bytes, in units of 1,000. */
export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let place = 0;
  while (value >= 1000 && place < units.length - 1) {
    value /= 1000;
    place += 1;
  }
  return `${place && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[place]}`;
}

const moment = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "short" });

/** An instant in the reader's time zone. */
export const instant = (text) => moment.format(new Date(text));

/** A date `YYYY-MM-DD` moved by days. Dates are the upstream's local dates and have no time zone. */
export function moved(date, days) {
  const at = new Date(`${date}T00:00:00Z`);
  at.setUTCDate(at.getUTCDate() + days);
  return at.toISOString().slice(0, 10);
}

/** The number of days from one date to another, both included. */
export const daysIn = (from, to) => Math.round((Date.parse(to) - Date.parse(from)) / 86_400_000) + 1;

const weekday = new Intl.DateTimeFormat("en", { weekday: "short", timeZone: "UTC" });
const monthName = new Intl.DateTimeFormat("en", { month: "short", timeZone: "UTC" });
const utc = (date) => new Date(`${date}T00:00:00Z`);

export const dayOfWeek = (date) => weekday.format(utc(date));
export const month = (date) => monthName.format(utc(date));
export const dayAndMonth = (date) => `${Number(date.slice(8))} ${month(date)}`;
export const monthAndYear = (date) => `${month(date)} ${date.slice(0, 4)}`;
