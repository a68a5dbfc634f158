// The view of the pipeline's health.

export const view = { path: "/pipeline", title: "Pipeline", place: "pipeline", open() {}, close() {} };
