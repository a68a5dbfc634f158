// Making elements. Text is always text: nothing that the API answers is ever read as markup.

/** Make an element: attributes by name, `onclick` and the like as listeners, then its children. */
export function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

const SVG = "http://www.w3.org/2000/svg";

/** Make an SVG element. */
export function drawn(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

/** A button that does something on this page. */
export function button(text, onclick, attributes = {}) {
  return element("button", { type: "button", onclick, ...attributes }, text);
}

/** What stands where there is nothing to show, or nothing could be had: a title, why, and what can be done. */
export function notice(kind, title, text, ...actions) {
  return element(
    "div",
    { class: `notice ${kind}`, role: kind === "error" ? "alert" : null },
    element("strong", {}, title),
    text ? element("p", {}, text) : null,
    ...actions,
  );
}

const SLICE_MS = 12;
let sliceEnds = 0;

/** Let the browser draw and listen in the midst of long work, if it was kept from that for a while. */
export async function breath() {
  if (performance.now() < sliceEnds) return;
  await new Promise((resume) => setTimeout(resume));
  sliceEnds = performance.now() + SLICE_MS;
}

/** Show `text` beside the pointer or the focus, at a place of the window. */
export function showHint(text, x, y) {
  const hint = document.getElementById("hint");
  if (hint.textContent !== text) hint.textContent = text;
  hint.hidden = false;
  const { width, height } = hint.getBoundingClientRect();
  hint.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 8))}px`;
  hint.style.top = `${y + 18 + height > innerHeight ? Math.max(4, y - height - 12) : y + 18}px`;
}

/** Take the hint away. */
export function hideHint() {
  document.getElementById("hint").hidden = true;
}

/** Tell those who listen rather than look. */
export function tell(text) {
  document.getElementById("news").textContent = text;
}
