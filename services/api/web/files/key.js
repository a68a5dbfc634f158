// The API key: which one is used, and what it may do. It can be switched or forgotten at any time.

import { access, forgetKey, hasKey, keepKey } from "./api.js";
import { button, element } from "./dom.js";

const control = document.getElementById("key");
const dialog = document.getElementById("key-dialog");
const SCOPES = { read: "read", process: "process dates" };

/** Show the key in use. An API without keys has no control. */
export async function watchKey() {
  control.addEventListener("click", openKeyDialog);
  try {
    const { key, scopes, expires_at: expires } = await access();
    control.hidden = key === null && !hasKey();
    control.textContent = key === null ? "Key" : `Key: ${key} (${scopes.join(", ")})`;
    control.dataset.detail = key === null ? "This service needs no key." : `Key ${key} may ${scopes.map((scope) => SCOPES[scope]).join(" and ")}.${expires ? ` It expires on ${expires.slice(0, 10)}.` : ""}`;
  } catch (problem) {
    control.hidden = problem.status !== 401;
    control.textContent = "Key";
    control.dataset.detail = problem.message;
  }
}

/** Open the dialog of the key. */
export function openKeyDialog() {
  dialog.replaceChildren(
    element(
      "div",
      { class: "content" },
      element("header", {}, element("h2", { id: "key-title" }, "API key"), button("Close", () => dialog.close(), { "aria-keyshortcuts": "Escape" })),
      element("p", {}, control.dataset.detail ?? ""),
      keyForm(),
      hasKey() ? element("p", {}, button("Forget the key", () => renew(forgetKey))) : "",
      element("p", { class: "none-text" }, "The key is kept until this window is closed."),
    ),
  );
  dialog.showModal();
}

/** A form that takes another key. */
export function keyForm() {
  const key = element("input", { type: "password", name: "key", autocomplete: "off", required: true });
  return element(
    "form",
    {
      class: "controls",
      onsubmit: (event) => {
        event.preventDefault();
        renew(() => keepKey(key.value.trim()));
      },
    },
    element("label", {}, "API key", key),
    element("button", { class: "primary" }, "Use this key"),
  );
}

function renew(change) {
  change();
  location.reload();
}
