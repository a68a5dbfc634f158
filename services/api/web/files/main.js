// The page: names its views, and opens the one of the address. A view is loaded when it is opened first.

import { hideHint } from "./dom.js";
import { startViews } from "./views.js";

addEventListener("scroll", hideHint, { passive: true });
startViews({
  "/": () => import("./statistics/view.js"),
  "/completeness": () => import("./completeness/view.js"),
  "/jobs": () => import("./jobs/view.js"),
  "/pipeline": () => import("./pipeline/view.js"),
});
