// Formats numbers, dates and sizes for people.

const whole = new Intl.NumberFormat("en");
const names = new Intl.Collator("en", { numeric: true });

export const count = (value) => whole.format(value);
export const plural = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

/** Compare names as people sort them: `City 2` before `City 11`. */
export const byName = (one, other) => names.compare(one, other);

/** Seconds, as `61.3 s` or `3 min 20 s`. */
export function delay(seconds) {
  if (Math.abs(seconds) < 120) return `${signed(seconds, seconds.toFixed(1))} s`;
  const rounded = Math.round(Math.abs(seconds));
  const minutes = Math.floor(rounded / 60);
  return signed(seconds, `${count(minutes)} min ${rounded % 60} s`);
}

/** A number with a minus sign instead of a hyphen. */
export const signed = (value, text) => (value < 0 ? `−${text.replace("-", "")}` : text);

/** A change in percent with its sign, without the unit. */
export function shortChange(percent) {
  const digits = Math.abs(percent) < 10 ? 1 : 0;
  const text = Math.abs(percent).toLocaleString("en", { maximumFractionDigits: digits });
  return text === "0" ? "0" : `${percent < 0 ? "−" : "+"}${text}`;
}

/** A change in percent with its sign. */
export const change = (percent) => `${shortChange(percent)} %`;

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
export const isWeekend = (date) => utc(date).getUTCDay() % 6 === 0;
export const isMonday = (date) => utc(date).getUTCDay() === 1;
export const dayAndMonth = (date) => `${Number(date.slice(8))} ${month(date)}`;
export const monthAndYear = (date) => `${month(date)} ${date.slice(0, 4)}`;

/** Days in words: `1 – 31 May 2024`, `28 May – 3 June 2024`. */
export const days = (from, to) => rangeFormat.formatRange(utc(from), utc(to)).replaceAll(THIN_SPACE, " ");

const THIN_SPACE = "\u2009";
const rangeFormat = new Intl.DateTimeFormat("en-GB", { dateStyle: "long", timeZone: "UTC" });
