// Creates elements. Text is never parsed as markup, so responses of the API cannot inject any.

/** Create an element with attributes, listeners (`onclick` and the like) and children. */
export function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

const SVG = "http://www.w3.org/2000/svg";

/** Create an SVG element. */
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

/** Create a button. */
export function button(text, onclick, attributes = {}) {
  return element("button", { type: "button", onclick, ...attributes }, text);
}

/** Create a notice for an empty result or an error: a title, the reason, and the remedies. */
export function notice(kind, title, text, ...actions) {
  return element(
    "div",
    { class: `notice ${kind}`, role: kind === "error" ? "alert" : null },
    element("strong", {}, title),
    text ? element("p", {}, text) : null,
    ...actions,
  );
}

/**
 * Create a box that scrolls what is too large for it. Shadows show on which sides it has more. A box without controls can be
 * focused, so that arrow keys scroll it.
 */
export function scrollable(...children) {
  const box = element("div", { class: "scroll" }, ...children);
  const frame = element("div", { class: "scrollable" }, box);
  const update = () => {
    frame.classList.toggle("more-right", box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
    frame.classList.toggle("more-below", box.scrollTop + box.clientHeight < box.scrollHeight - 1);
    const isStuck = box.scrollWidth > box.clientWidth && !box.querySelector("[tabindex], a, button, input, summary");
    if (isStuck) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  };
  box.addEventListener("scroll", update, { passive: true });
  const sizes = new ResizeObserver(update);
  for (const one of [box, ...box.children]) sizes.observe(one);
  return frame;
}

const SLICE_MS = 12;
let sliceEnds = 0;

/** Yield to the browser during long work, at most once in SLICE_MS. */
export async function yieldToBrowser() {
  if (performance.now() < sliceEnds) return;
  await new Promise((resume) => setTimeout(resume));
  sliceEnds = performance.now() + SLICE_MS;
}

/** Show a hint at a position of the window. */
export function showHint(text, x, y) {
  const hint = document.getElementById("hint");
  if (hint.textContent !== text) hint.textContent = text;
  hint.hidden = false;
  const { width, height } = hint.getBoundingClientRect();
  hint.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 8))}px`;
  hint.style.top = `${y + 18 + height > innerHeight ? Math.max(4, y - height - 12) : y + 18}px`;
}

/** Hide the hint. */
export function hideHint() {
  document.getElementById("hint").hidden = true;
}

/** Announce a text to screen readers. */
export function announce(text) {
  document.getElementById("news").textContent = text;
}
