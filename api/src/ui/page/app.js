// Signing in and out, creating, and what the connection is doing.

import { call, Events } from "/ui/api.js";
import { element, Sandboxes } from "/ui/sandboxes.js";
import { openTerminal } from "/ui/terminal.js";

const $ = (id) => document.getElementById(id);
const DEFAULT_TEMPLATE = "system/debian:bookworm";

let events = null;

const sandboxes = new Sandboxes($("sandboxes"), $("empty"), $("count"), {
  announce: (text) => { $("announcer").textContent = text; },
  openTerminal,
  confirmDelete,
});

function confirmDelete(id) {
  const dialog = $("delete");
  $("delete-id").textContent = id;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "delete"), { once: true });
  });
}

function showSignIn() {
  events?.stop();
  events = null;
  sandboxes.clear();
  $("signed-in").hidden = true;
  $("who").hidden = true;
  $("connection").hidden = true;
  $("sign-in").hidden = false;
  $("key").focus();
}

function showSignedIn(session) {
  $("sign-in").hidden = true;
  $("signed-in").hidden = false;
  $("who").hidden = false;
  $("tenant").textContent = session.tenant;
  $("templates").replaceChildren(...session.templates.map((name) => element("option", { value: name })));
  const known = session.templates;
  $("template").value = known.includes(DEFAULT_TEMPLATE) || !known.length ? DEFAULT_TEMPLATE : known[0];
  $("connection").hidden = false;
  events = new Events({
    event: (name, data) => sandboxes.event(name, data),
    state: (state) => {
      if (state === "live") sandboxes.restart();
      $("connection").dataset.state = state;
      $("connection").textContent = state === "live" ? "Live" : "The supervisor does not answer; trying again";
    },
    refused: showSignIn,
  });
}

$("sign-in-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const problem = $("sign-in-problem");
  problem.textContent = "";
  try {
    const session = await call("POST", "/ui/session", { key: $("key").value });
    $("key").value = "";
    showSignedIn(session);
  } catch (refused) {
    problem.textContent = refused.status === 401 ? "There is no such key, or it was revoked." : refused.message;
    $("key").select();
  }
});

$("sign-out").addEventListener("click", async () => {
  try {
    await call("DELETE", "/ui/session");
  } catch { /* Here it is over in any case. */ }
  showSignIn();
});

$("create-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = $("create");
  if (button.getAttribute("aria-disabled") === "true") return;
  button.setAttribute("aria-disabled", "true");
  button.textContent = "Creating…";
  $("create-problem").textContent = "";
  try {
    await call("POST", "/v1/sandbox", {
      template_name: $("template").value,
      vcpu: $("vcpu").valueAsNumber,
      memory: $("memory").valueAsNumber,
      timeout: $("timeout").valueAsNumber * 60,
      auto_pause: $("auto-pause").checked,
    });
  } catch (refused) {
    $("create-problem").textContent = refused.message;
  }
  button.setAttribute("aria-disabled", "false");
  button.textContent = "Create";
});

try {
  showSignedIn(await call("GET", "/ui/session"));
} catch (refused) {
  showSignIn();
  if (refused.status !== 401) $("sign-in-problem").textContent = refused.message;
}
