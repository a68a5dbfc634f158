// The page: names its views, and opens the one of the address. A view is loaded when it is opened first.

import { element, hideHint } from "./dom.js";
import { watchKey } from "./key.js";
import { watchOutages } from "./outage.js";
import { startViews } from "./views.js";

addEventListener("scroll", hideHint, { passive: true });
watchOutages();
watchKey();
startViews({
  "/": () => import("./statistics/view.js"),
  "/completeness": styled("completeness", () => import("./completeness/view.js")),
  "/jobs": styled("jobs", () => import("./jobs/view.js")),
  "/pipeline": styled("pipeline", () => import("./pipeline/view.js")),
});

// A view whose style sheet is loaded with it.
function styled(name, load) {
  let loaded = null;
  return async () => {
    loaded ??= styleSheet(`/page/${name}/style.css`).catch((error) => {
      loaded = null;
      throw error;
    });
    await loaded;
    return load();
  };
}

function styleSheet(href) {
  return new Promise((resolve, reject) => {
    const link = element("link", { rel: "stylesheet", href, onload: resolve, onerror: () => reject(new TypeError(href)) });
    document.head.append(link);
  });
}
