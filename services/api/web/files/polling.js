// Polls while the window is visible and the view is open.

/** Calls `look()` now and then. `wait()` says how many milliseconds pass between two calls. */
export function polling(look, wait) {
  let timer = null;
  let stopped = true;

  async function run() {
    clearTimeout(timer);
    if (stopped || document.hidden) return;
    await look();
    clearTimeout(timer);
    if (!stopped) timer = setTimeout(run, wait());
  }

  document.addEventListener("visibilitychange", run);
  return {
    start() {
      stopped = false;
      return run();
    },
    stop() {
      stopped = true;
      clearTimeout(timer);
    },
  };
}
