// Reads jobs from two lists of the API, newest first. Jobs older than what both lists have shown are held back, so that the
// order of the merged list does not change.

import { backfill, page, request } from "../api.js";
import { backfillJob, requestJob } from "./jobs.js";

const LISTED = 50;
const NEW_ROWS_MIN = 10;
const PAGES_AT_ONCE_MAX = 5;
const REFRESHED_MAX = 10;

const LISTS = {
  requests: { path: `/process-requests?limit=${LISTED}`, jobs: ({ requests }) => requests.filter((one) => !one.backfill_id).map(requestJob), at: ({ requests }) => requests.at(-1)?.requested_at },
  backfills: { path: `/backfills?limit=${LISTED}`, jobs: ({ backfills }) => backfills.map(backfillJob), at: ({ backfills }) => backfills.at(-1)?.created_at },
};

/** The jobs of the bucket. Requests that a backfill made are part of its job. */
export function jobSource() {
  const known = new Map();
  const older = {}; // of each list: the path of the next page (null: none is left), and the time of the oldest entry

  const keep = (job) => {
    if (!(known.get(job.id)?.version > job.version)) known.set(job.id, job);
  };

  async function read(name, path) {
    const list = LISTS[name];
    const listed = await page(path);
    list.jobs(listed).forEach(keep);
    return { next: listed.next, at: list.at(listed) ?? "" };
  }

  const frontier = () => Object.values(older).reduce((latest, { next, at }) => (next && at > latest ? at : latest), "");
  const visible = () => [...known.values()].filter((job) => job.open || job.at >= frontier());

  return {
    visible,
    hasMore: () => Object.values(older).some(({ next }) => next),
    /** Read what is new. */
    async update() {
      await Promise.all(
        Object.keys(LISTS).map(async (name) => {
          const first = await read(name, LISTS[name].path);
          older[name] ??= first;
        }),
      );
    },
    /** Read the open jobs again. */
    async refresh() {
      const open = visible().filter((job) => job.open).slice(0, REFRESHED_MAX);
      await Promise.all(open.map(async ({ kind, id }) => keep(kind === "request" ? requestJob(await request(id)) : backfillJob(await backfill(id)))));
    },
    /** Read older jobs, until there are some more to show. */
    async more() {
      const before = visible().length;
      for (let pages = 0; pages < PAGES_AT_ONCE_MAX && visible().length < before + NEW_ROWS_MIN; pages += 1) {
        const [name] = Object.keys(older).filter((one) => older[one].next).sort((one, other) => (older[one].at < older[other].at ? 1 : -1));
        if (!name) return;
        older[name] = await read(name, older[name].next);
      }
    },
  };
}
