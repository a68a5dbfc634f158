// A grid that only has the rows in sight: a table in a box that scrolls, with a cell that arrow keys move.
//
// Two rows without content stand for those above and below. All rows have the same height.

import { element, scrollable } from "../dom.js";

const ROWS_BEYOND_SIGHT = 4;
const ROW_HEIGHT_MIN = 24;
const ROWS_A_PAGE = 10;

let printed = null; // the grid that shows all its rows on paper
addEventListener("beforeprint", () => printed?.());

/**
 * Make a table a grid of `rows` rows. `makeRow(index)` creates a row: a heading and its cells. `onfocus(cell, place)` and
 * `onopen(place, event)` get a place: `{row, column}`, from 0. `start` is an earlier grid's `position()`.
 */
export function grid(table, { rows, columns, makeRow, onfocus, onopen, start }) {
  const body = element("tbody");
  const above = element("tr", { "aria-hidden": "true" }, element("td", { colspan: columns + 1 }));
  const below = above.cloneNode(true);
  const rendered = new Map();
  const frame = scrollable(table);
  const box = frame.firstElementChild;
  const active = { row: Math.min(start?.row ?? 0, rows - 1), column: Math.min(start?.column ?? 0, columns - 1) };
  let height = 0;
  table.append(body);
  table.setAttribute("aria-rowcount", rows + table.tHead.rows.length);
  body.append(above, below);

  function render(all = false) {
    const top = box.scrollTop / (height || ROW_HEIGHT_MIN);
    const sight = innerHeight / (height || ROW_HEIGHT_MIN); // the box is at most as high as the window
    const first = all ? 0 : Math.min(rows - 1, Math.max(0, Math.floor(top) - ROWS_BEYOND_SIGHT));
    const end = all ? rows : Math.min(rows, Math.ceil(top + sight) + ROWS_BEYOND_SIGHT);
    for (const [index, row] of rendered) if (index < first || index >= end) drop(index, row);
    let before = above;
    for (let index = first; index < end; index += 1) {
      if (!rendered.has(index)) rendered.set(index, newRow(index));
      const row = rendered.get(index);
      if (before.nextElementSibling !== row) before.after(row);
      before = row;
    }
    height ||= rendered.get(first).getBoundingClientRect().height;
    setHeight(above, first * height);
    setHeight(below, (rows - end) * height);
    table.tabIndex = rendered.has(active.row) ? -1 : 0;
  }

  function newRow(index) {
    const row = makeRow(index);
    row.setAttribute("aria-rowindex", index + table.tHead.rows.length + 1);
    if (index === active.row) row.cells[active.column + 1].tabIndex = 0;
    return row;
  }

  // The table keeps the focus of a cell that is scrolled out of sight, so that arrow keys go on from there.
  function drop(index, row) {
    if (row.contains(document.activeElement)) table.focus({ preventScroll: true });
    row.remove();
    rendered.delete(index);
  }

  const cellAt = ({ row, column }) => rendered.get(row)?.cells[column + 1];

  function placeOf(target) {
    const cell = target.closest("tbody td");
    const row = cell?.parentElement;
    return row?.ariaRowIndex ? { row: row.ariaRowIndex - table.tHead.rows.length - 1, column: cell.cellIndex - 1 } : null;
  }

  function moveTo(place) {
    cellAt(active)?.removeAttribute("tabindex");
    Object.assign(active, place);
    if (!cellAt(active)) {
      box.scrollTop = active.row * height - box.clientHeight / 2;
      render();
    }
    cellAt(active).tabIndex = 0;
    cellAt(active).focus();
    table.tabIndex = -1;
  }

  box.addEventListener("scroll", () => requestAnimationFrame(() => table.isConnected && render()), { passive: true });
  table.addEventListener("click", (event) => {
    const place = placeOf(event.target);
    if (!place) return;
    moveTo(place);
    onopen(place, event);
  });
  table.addEventListener("focusin", (event) => {
    const place = placeOf(event.target);
    if (place) onfocus(event.target, place);
  });
  table.addEventListener("keydown", (event) => {
    if (event.target !== table && !placeOf(event.target)) return;
    const to = target(event, active, rows, columns);
    if (to) {
      event.preventDefault();
      if (to.row >= 0 && to.row < rows && to.column >= 0 && to.column < columns) moveTo(to);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      onopen({ ...active }, event);
    }
  });
  printed = () => table.isConnected && render(true);

  return {
    frame,
    placeOf,
    /** Render the rows in sight. Call it once the frame is in the document. */
    show() {
      if (start) [box.scrollTop, box.scrollLeft] = [start.top, start.left];
      render();
      if (start) [box.scrollTop, box.scrollLeft] = [start.top, start.left];
      if (start?.hadFocus) moveTo(active);
      // A dialog that closes gives the focus back to the cell that opened it, and that is gone now.
      const dialog = document.querySelector("dialog[open]");
      dialog?.addEventListener("close", () => isFocusLost(dialog) && moveTo(active), { once: true });
    },
    position: () => ({ ...active, top: box.scrollTop, left: box.scrollLeft, hadFocus: table.contains(document.activeElement) }),
  };
}

const isFocusLost = (dialog) => document.activeElement === document.body || dialog.contains(document.activeElement);

const setHeight = (row, pixels) => {
  row.hidden = pixels === 0;
  row.cells[0].style.height = `${pixels}px`;
};

function target({ key, ctrlKey }, { row, column }, rows, columns) {
  return {
    ArrowLeft: { row, column: column - 1 },
    ArrowRight: { row, column: column + 1 },
    ArrowUp: { row: row - 1, column },
    ArrowDown: { row: row + 1, column },
    Home: { row: ctrlKey ? 0 : row, column: 0 },
    End: { row: ctrlKey ? rows - 1 : row, column: columns - 1 },
    PageUp: { row: Math.max(0, row - ROWS_A_PAGE), column },
    PageDown: { row: Math.min(rows - 1, row + ROWS_A_PAGE), column },
  }[key];
}
