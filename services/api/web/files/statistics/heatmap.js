// A heat map of countries and days: a table with coloured cells, which screen readers read and arrow keys navigate.

import { button, element, hideHint, scrollable, showHint, yieldToBrowser } from "../dom.js";
import { dayOfWeek, month } from "../format.js";
import { COLOURS, MEASURES, colour, sentence, thresholds } from "./stats.js";

const DAYS_WITH_TEXT_MAX = 16;
const DAYS_WITH_NUMBERS_MAX = 62;
const CELLS_AT_ONCE_MAX = 1_500;
const CELLS_AT_FIRST_MAX = 12_000;
const ROWS_AT_FIRST_MIN = 10;

/** Create the heat map of a measure. Calls `onopen(country, day)` for the selected country-day. */
export function heatmap({ countries, dates }, measure, onopen) {
  const { name, of, short } = MEASURES[measure];
  const met = thresholds(countries.flatMap(({ days }) => days.filter((day) => day.standing !== "none").map(of)));
  const rowsAtFirst = Math.max(ROWS_AT_FIRST_MIN, Math.floor(CELLS_AT_FIRST_MAX / dates.length));
  const body = element("tbody");
  const density = dates.length <= DAYS_WITH_TEXT_MAX ? "roomy" : dates.length <= DAYS_WITH_NUMBERS_MAX ? "close" : "dense";
  const table = element(
    "table",
    { class: `heatmap ${density}`, role: "grid", "aria-readonly": "true", "aria-rowcount": countries.length + 2 },
    element("caption", { class: "unseen" }, `${name} by country and day. Arrow keys move, Enter shows the cities.`),
    heads(dates),
    body,
  );
  table.style.setProperty("--days", dates.length);
  const cellOf = (day) => {
    const cell = element("td", { class: day.standing });
    if (day.standing === "none") {
      cell.append(element("span", { class: "unseen" }, "no data"));
      return cell;
    }
    cell.classList.add(`c${colour(of(day), met)}`);
    cell.append(short(of(day)));
    if (day.standing === "provisional") cell.append(element("span", { class: "unseen" }, " provisional"));
    return cell;
  };
  const rowsAtOnce = Math.max(1, Math.floor(CELLS_AT_ONCE_MAX / dates.length));
  const rowOf = (country) =>
    element("tr", {}, element("th", { scope: "row", title: country.name }, country.name), country.days.map(cellOf));
  const addRows = async (to) => {
    while (body.rows.length < to) {
      body.append(...countries.slice(body.rows.length, Math.min(to, body.rows.length + rowsAtOnce)).map(rowOf));
      await yieldToBrowser();
    }
  };
  addRows(Math.min(rowsAtFirst, countries.length));
  body.rows[0]?.cells[1]?.setAttribute("tabindex", "0");
  const more =
    rowsAtFirst < countries.length
      ? button(`Show all ${countries.length} countries`, async () => {
          more.remove();
          await addRows(rowsAtFirst + 1);
          moveTo(table, body.rows[rowsAtFirst].cells[1]);
          await addRows(countries.length);
        })
      : null;
  listen(table, (cell) => {
    const country = countries[cell.parentElement.sectionRowIndex];
    return [country, country.days[cell.cellIndex - 1]];
  }, onopen);
  return element(
    "div",
    {},
    scrollable(table),
    more,
    legend(met, MEASURES[measure]),
  );
}

function heads(dates) {
  const months = [];
  for (const date of dates) {
    if (months.at(-1)?.key === date.slice(0, 7)) months.at(-1).days += 1;
    else months.push({ key: date.slice(0, 7), date, days: 1 });
  }
  return element(
    "thead",
    {},
    element(
      "tr",
      {},
      element("td", { rowspan: 2 }),
      months.map(({ key, date, days }) =>
        element("th", { scope: "colgroup", colspan: days }, days > 2 ? `${month(date)} ${key.slice(0, 4)}` : month(date)),
      ),
    ),
    element(
      "tr",
      {},
      dates.map((date) =>
        element(
          "th",
          { scope: "col", abbr: date, class: ["Sat", "Sun"].includes(dayOfWeek(date)) ? "weekend" : null },
          element("span", { class: "weekday" }, `${dayOfWeek(date)} `),
          String(Number(date.slice(8))),
        ),
      ),
    ),
  );
}

function listen(table, dayOf, onopen) {
  const cellOf = (event) => event.target.closest("tbody td");
  table.addEventListener("click", (event) => {
    const cell = cellOf(event);
    if (!cell) return;
    moveTo(table, cell);
    onopen(...dayOf(cell));
  });
  table.addEventListener("pointermove", (event) => {
    const cell = event.pointerType === "mouse" ? cellOf(event) : null;
    if (cell) showHint(sentence(...dayOf(cell)), event.clientX, event.clientY);
    else hideHint();
  });
  table.addEventListener("pointerleave", hideHint);
  table.addEventListener("focusout", hideHint);
  table.addEventListener("focusin", (event) => {
    const cell = cellOf(event);
    if (!cell) return;
    cell.setAttribute("aria-label", sentence(...dayOf(cell)));
    const { left, bottom } = cell.getBoundingClientRect();
    if (cell.matches(":focus-visible")) showHint(sentence(...dayOf(cell)), left, bottom - 12);
  });
  table.addEventListener("keydown", (event) => {
    const cell = cellOf(event);
    if (!cell) return;
    const { rows } = table.tBodies[0];
    const row = cell.parentElement.sectionRowIndex;
    const column = cell.cellIndex;
    const last = rows[row].cells.length - 1;
    const to = {
      ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1],
      ArrowUp: [row - 1, column],
      ArrowDown: [row + 1, column],
      Home: [event.ctrlKey ? 0 : row, 1],
      End: [event.ctrlKey ? rows.length - 1 : row, last],
      PageUp: [Math.max(0, row - 10), column],
      PageDown: [Math.min(rows.length - 1, row + 10), column],
    }[event.key];
    if (to) {
      event.preventDefault();
      const next = to[1] >= 1 && rows[to[0]]?.cells[to[1]];
      if (next) moveTo(table, next);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      onopen(...dayOf(cell));
    }
  });
}

// Only the cell that had the focus last is in the tab order.
function moveTo(table, cell) {
  table.querySelector("tbody [tabindex]")?.removeAttribute("tabindex");
  cell.setAttribute("tabindex", "0");
  cell.focus();
}

/** Call `draw`, which redraws the map, and restore the focus to the same country-day. */
export function keepingFocus(place, draw) {
  const cell = document.activeElement.closest("#results .heatmap tbody td");
  const name = cell?.parentElement.cells[0].textContent;
  draw();
  const row = cell && [...place.querySelectorAll(".heatmap tbody tr")].find((one) => one.cells[0].textContent === name);
  if (row?.cells[cell.cellIndex]) moveTo(row.closest("table"), row.cells[cell.cellIndex]);
}

function legend(met, { bound }) {
  const steps = met.length + 1;
  const label = (place) => {
    if (steps === 1) return "all the same";
    if (place === 0) return `under ${bound(met[0])}`;
    if (place === steps - 1) return `${bound(met.at(-1))} and more`;
    return [element("span", { class: "unseen" }, "from "), bound(met[place - 1])];
  };
  const place = (step) => (steps === 1 ? 3 : Math.round((step * (COLOURS - 1)) / (steps - 1)));
  return element(
    "ul",
    { class: "legend colours", "aria-label": "Legend of the colours" },
    Array.from({ length: steps }, (_, step) =>
      element("li", { class: "step" }, element("i", { class: `c${place(step)}` }), element("span", {}, label(step))),
    ),
    element("li", {}, element("i", { class: "c2 provisional" }), "provisional: cities are missing"),
    element("li", {}, element("i", { class: "none" }), "no data"),
  );
}
