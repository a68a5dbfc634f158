// The views of the page and their URLs. The query of the URL holds the whole state of a view, so that bookmarks, links
// and the Back button work.
//
// A view is an object:
// - `path`: the path of its URL, such as `/jobs`. `page.py` serves the page at this path.
// - `title`: its name in the navigation and in the title of the document.
// - `place`: the id of its element in `index.html`, which is hidden while another view is open.
// - `open(params)`: shows the state in `params`. Called for each new URL of the view, also if the view is already open.
// - `close()`: stops timers and streams. Called before another view opens.

const SITE = "Tripfold";

let views = [];
let current = null;

/** Open the view of the address, and follow links between the views. */
export function startViews(all) {
  views = all;
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

function go(url, replace) {
  history[replace ? "replaceState" : "pushState"](null, "", url);
}

function openAddress() {
  const view = views.find(({ path }) => path === location.pathname) ?? views[0];
  const changed = view !== current;
  const isFirst = current === null;
  if (changed) {
    current?.close();
    for (const one of views) document.getElementById(one.place).hidden = one !== view;
    current = view;
    setTitle("");
  }
  updateNavigation();
  view.open(Object.fromEntries(new URLSearchParams(location.search)));
  if (changed && !isFirst) {
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
  if (link.origin !== location.origin || link.hash || !views.some(({ path }) => path === link.pathname)) return;
  event.preventDefault();
  if (link.href !== location.href) go(link.href, false);
  openAddress();
}
