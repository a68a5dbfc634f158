// The page: registers its views and opens the one of the address.

import { hideHint } from "./dom.js";
import * as completeness from "./completeness/view.js";
import * as jobs from "./jobs/view.js";
import * as pipeline from "./pipeline/view.js";
import * as statistics from "./statistics/view.js";
import { startViews } from "./views.js";

addEventListener("scroll", hideHint, { passive: true });
startViews([statistics, completeness, jobs, pipeline].map(({ view }) => view));
