// The view of the completeness of each country-day.

export const view = { path: "/completeness", title: "Completeness", place: "completeness", open() {}, close() {} };
