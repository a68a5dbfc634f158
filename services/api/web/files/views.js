// The views of the page and their URLs. The query of the URL holds the whole state of a view, so that bookmarks, links
// and the Back button work.
//
// The module of a view exports an object `view`:
// - `path`: the path of its URL, such as `/jobs`. `page.py` serves the page at this path.
// - `title`: its name in the navigation and in the title of the document.
// - `place`: the id of its element in `index.html`, which is hidden while another view is open.
// - `open(params)`: shows the state in `params`. Called for each new URL of the view, also if the view is already open.
// - `close()`: stops timers and streams. Called before another view opens.

import { unreachable } from "./api.js";

const SITE = "Tripfold";

let loaders = {}; // what imports the module of a view, by its path
let current = null;
let opening = null;

/** Open the view of the address, and follow links between the views. `all` has a function that imports each, by path. */
export function startViews(all) {
  loaders = all;
  addEventListener("popstate", openAddress);
  document.addEventListener("click", followLink);
  openAddress();
}

/** The URL of a view with parameters. Empty parameters are left out. */
export function urlOf(path, params = {}) {
  const query = new URLSearchParams(Object.entries(params).filter(([, value]) => value));
  return query.size ? `${path}?${query}` : path;
}

/** Open a view with parameters, as a link does. */
export function visit(path, params = {}, { replace = false } = {}) {
  go(urlOf(path, params), replace);
  openAddress();
}

/** Write the state of the open view into its URL, without opening it again. */
export function keepInUrl(params) {
  go(urlOf(current.path, params), true);
  updateNavigation();
}

/** Set the title of the document: the contents of the open view, its name, and the site. */
export function setTitle(contents) {
  document.title = [contents, current.title, SITE].filter(Boolean).join(" · ");
}

/** Open the view of the address again, as after an outage. */
export const reopen = () => openAddress();

function go(url, replace) {
  history[replace ? "replaceState" : "pushState"](null, "", url);
}

async function openAddress() {
  const load = loaders[location.pathname] ?? loaders["/"];
  opening = load;
  const { view } = await load().catch((error) => ({ failed: unreachable(error) }));
  if (opening !== load || !view) return; // the reader went on to another view, or it cannot be loaded now
  const before = current;
  if (view !== before) {
    before?.close();
    if (before) document.getElementById(before.place).hidden = true;
    document.getElementById(view.place).hidden = false;
    current = view;
    setTitle("");
  }
  updateNavigation();
  view.open(Object.fromEntries(new URLSearchParams(location.search)));
  if (before && view !== before) {
    scrollTo(0, 0);
    document.getElementById("view").focus({ preventScroll: true });
  }
}

// A link of the navigation leads to the last state of its view.
function updateNavigation() {
  for (const link of document.querySelectorAll("#views a")) {
    const isCurrent = link.pathname === current.path;
    if (isCurrent) {
      link.href = location.pathname + location.search;
      link.setAttribute("aria-current", "page");
    } else link.removeAttribute("aria-current");
  }
}

function followLink(event) {
  const link = event.target.closest("a[href]");
  const isPlain = event.button === 0 && !(event.ctrlKey || event.metaKey || event.shiftKey || event.altKey);
  if (!link || !isPlain || event.defaultPrevented || link.target || link.hasAttribute("download")) return;
  if (link.origin !== location.origin || link.hash || !(link.pathname in loaders)) return;
  event.preventDefault();
  if (link.href !== location.href) go(link.href, false);
  openAddress();
}
