// The map of completeness: a grid of countries and days. Shift and the arrow keys, or dragging, choose a range.

import { element, hideHint, showHint } from "../dom.js";
import { dayOfWeek, month } from "../format.js";
import { grid } from "../statistics/grid.js";
import { STATES, classOf, contains, rectangle, rowsOf, sentence } from "./states.js";

const WIDE_DAYS_MAX = 40;
const TARGET_MIN = 24;

/** A map in `place`. Calls `onopen(rectangle)` for chosen days, and `onzoom(column)` for a cell too narrow for a finger. */
export function completenessMap(place, { onopen, onzoom }) {
  let shown = null;

  function draw(content) {
    const rows = rowsOf(content);
    const start = shown?.position();
    const spoken = ({ row, column }) => sentence(rows[row].name, rows[row].days[column]);
    const table = element(
      "table",
      { class: `completeness ${content.dates.length <= WIDE_DAYS_MAX ? "wide" : "narrow"}`, role: "grid", "aria-readonly": "true", "aria-multiselectable": "true" },
      element("caption", { class: "unseen" }, "Completeness by country and day. Arrow keys move, Shift with arrow keys chooses a range, Enter opens it."),
      headOf(content.dates),
    );
    table.style.setProperty("--days", content.dates.length);
    const choice = choiceIn(table, (target) => shown.placeOf(target));
    shown = grid(table, {
      rows: rows.length,
      columns: content.dates.length,
      start,
      makeRow: (index) => choice.marked(rowOf(rows[index]), index),
      onopen(at, event) {
        const isNarrow = event.pointerType === "touch" && event.target.clientWidth < TARGET_MIN;
        if (isNarrow) onzoom(at.column);
        else onopen(choice.at(at));
      },
      onfocus(cell, at) {
        const { left, bottom } = cell.getBoundingClientRect();
        cell.setAttribute("aria-label", spoken(at));
        choice.reach(at);
        if (cell.matches(":focus-visible")) showHint(spoken(at), left, bottom - 12);
      },
    });
    choice.ondrag = onopen;
    table.addEventListener("pointermove", (event) => {
      const at = event.pointerType === "mouse" ? shown.placeOf(event.target) : null;
      if (at) showHint(spoken(at), event.clientX, event.clientY);
      else hideHint();
    });
    table.addEventListener("pointerleave", hideHint);
    table.addEventListener("focusout", hideHint);
    place.replaceChildren(shown.frame);
    shown.show();
  }

  return { draw, focus: () => place.querySelector("td[tabindex='0']")?.focus() };
}

// Keeps the rectangle from the place where Shift or the mouse button was pressed to the present one.
function choiceIn(table, placeOf) {
  let anchor = null;
  let end = null;
  let extending = false;
  let dragging = false;
  const choice = { at, reach, marked, ondrag: null };

  function at(place) {
    const isInside = anchor && contains(rectangle(anchor, end), place);
    return isInside ? rectangle(anchor, end) : rectangle(place, place);
  }

  function reach(place) {
    if (dragging) return;
    if (!extending || !anchor) anchor = place;
    end = place;
    mark();
  }

  function marked(row, index) {
    for (const cell of [...row.cells].slice(1)) {
      const isChosen = anchor && contains(rectangle(anchor, end), { row: index, column: cell.cellIndex - 1 });
      const isRange = anchor && !isSame(anchor, end);
      cell.classList.toggle("chosen", Boolean(isChosen && isRange));
      if (isChosen) cell.setAttribute("aria-selected", "true");
      else cell.removeAttribute("aria-selected");
    }
    return row;
  }

  function mark() {
    for (const row of table.tBodies[0].rows) {
      if (row.ariaRowIndex) marked(row, row.ariaRowIndex - table.tHead.rows.length - 1);
    }
  }

  table.addEventListener("keydown", (event) => (extending = event.shiftKey), { capture: true });
  table.addEventListener("pointerdown", (event) => {
    const place = event.pointerType === "mouse" && event.button === 0 && placeOf(event.target);
    if (!place) return;
    extending = event.shiftKey;
    if (!extending || !anchor) anchor = place;
    end = place;
    dragging = true;
    addEventListener("pointerup", release, { once: true });
    mark();
  });
  table.addEventListener("pointerover", (event) => {
    const place = dragging && placeOf(event.target);
    if (!place) return;
    end = place;
    mark();
  });

  function release(event) {
    dragging = false;
    if (table.isConnected && !isSame(anchor, end) && placeOf(event.target)) choice.ondrag(rectangle(anchor, end));
  }

  return choice;
}

const isSame = (one, other) => one.row === other.row && one.column === other.column;

function rowOf(row) {
  return element(
    "tr",
    {},
    element("th", { scope: "row", title: row.name }, row.name),
    row.days.map(({ state }) => element("td", { class: classOf(state) }, element("span", { "aria-hidden": "true" }, STATES[state].letter), element("span", { class: "unseen" }, state))),
  );
}

function headOf(dates) {
  const months = [];
  for (const { date } of dates) {
    if (months.at(-1)?.key === date.slice(0, 7)) months.at(-1).days += 1;
    else months.push({ key: date.slice(0, 7), date, days: 1 });
  }
  const nameOf = ({ key, date, days }) => (days > 2 ? `${month(date)} ${key.slice(0, 4)}` : month(date));
  return element(
    "thead",
    {},
    element("tr", {}, element("td", { rowspan: 2 }), months.map((one) => element("th", { scope: "colgroup", colspan: one.days }, nameOf(one)))),
    element("tr", {}, dates.map(({ date }) => element("th", { scope: "col", abbr: date, title: `${dayOfWeek(date)} ${date}` }, String(Number(date.slice(8)))))),
  );
}
