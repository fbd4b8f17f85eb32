// The list of sandboxes. Each row is made once and changed in place, so that focus and an opened detail stay.

import { call } from "/ui/api.js";

/** What may be asked of a sandbox in a state. What is not here waits for an operation to end. */
const VERBS = {
  running: ["pause", "stop", "terminal", "delete"],
  paused: ["resume", "terminal", "delete"],
  stopped: ["start", "delete"],
};
const LABELS = { pause: "Pause", resume: "Resume", stop: "Stop", start: "Start", terminal: "Terminal", delete: "Delete" };
const GLYPHS = { running: "●", paused: "❚❚", stopped: "■" };
/** What a phase is drawn in; phases of the same kind of work look alike. */
const COLOURS = {
  stop: 0, ahead: 0, run: 0, sync: 1, grant: 1, claim: 1, template: 1, state: 2, spawn: 2, manifest: 3, upload: 4, restore: 4, boot: 4,
  head: 5, wake: 5, free: 6, kept: 6,
};
/** How long a phase takes part in the drawing, ms: shorter ones are listed only. */
const DRAWN_MS = 0.05;

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

/** Sets a text only when it differs: a selection in it stays. */
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function bytes(n) {
  if (n < 1024) return `${n} B`;
  const units = ["KiB", "MiB", "GiB", "TiB"];
  let unit = -1;
  do {
    n /= 1024;
    unit += 1;
  } while (n >= 1024 && unit < units.length - 1);
  return `${n.toFixed(unit > 1 ? 2 : 1)} ${units[unit]}`;
}

function duration(ms) {
  if (ms < 1) return `${ms.toFixed(2)} ms`;
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  return ms < 10_000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

function span(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172_800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86_400)} days`;
}

const ago = (iso) => `${span((Date.now() - Date.parse(iso)) / 1000)} ago`;

/** One operation: its phases as a bar, in figures below, and its bytes. */
function cost(operation) {
  const drawn = operation.phases.filter((phase) => phase.ms >= DRAWN_MS);
  const moved = operation.bytes.map(({ name, bytes: n }) => `${bytes(n)} ${name}`);
  const figure = element("figure", { class: operation.failure ? "cost failed" : "cost", "data-operation": operation.operation });
  const caption = element("figcaption", {},
    element("strong", {}, LABELS[operation.operation] ?? "Create"), " ",
    element("span", { class: "total" }, duration(operation.ms)),
    ...moved.flatMap((text) => [" · ", text]), " · ",
    element("time", { datetime: operation.ended_at, "data-ago": "" }, ago(operation.ended_at)));
  const bar = element("div", { class: "bar", "aria-hidden": "true" });
  const legend = element("ul", { class: "legend" });
  for (const phase of drawn) {
    const colour = `c${COLOURS[phase.name] ?? 7}`;
    const part = element("span", { class: `part ${colour}`, title: `${phase.name} ${duration(phase.ms)}` });
    part.style.flexGrow = String(phase.ms);
    bar.append(part);
    legend.append(element("li", {}, element("span", { class: `swatch ${colour}`, "aria-hidden": "true" }), `${phase.name} ${duration(phase.ms)}`));
  }
  figure.append(caption);
  if (operation.failure) figure.append(element("p", { class: "problem" }, operation.failure));
  if (drawn.length) figure.append(bar, legend);
  return figure;
}

class Row {
  constructor(id, list) {
    this.list = list;
    this.state = element("span", { class: "state" });
    this.phase = element("span", { class: "phase" });
    this.facts = element("p", { class: "facts" });
    this.problem = element("p", { class: "problem", role: "alert" });
    this.costs = element("div", { class: "costs" });
    this.history = element("div", { class: "costs" });
    this.details = element("details", { hidden: "" }, element("summary", {}, "Earlier operations"), this.history);
    this.actions = element("div", { class: "row", role: "group", "aria-label": `Actions for ${id}` });
    this.buttons = {};
    for (const verb of Object.keys(LABELS)) {
      const button = element("button", { type: "button", "data-verb": verb, hidden: "" }, LABELS[verb]);
      button.addEventListener("click", () => this.act(verb));
      this.buttons[verb] = button;
      this.actions.append(button);
    }
    const head = element("div", { class: "head" }, element("h3", {}, element("code", {}, id)), this.state, this.phase);
    this.node = element("li", { class: "sandbox", id }, head, this.facts, this.actions, this.problem, this.costs, this.details);
    this.shown = "";
  }

  show(sandbox) {
    const before = this.sandbox;
    this.sandbox = sandbox;
    this.node.dataset.state = sandbox.state;
    say(this.state, `${GLYPHS[sandbox.state] ?? "◌"} ${sandbox.state}`);
    say(this.phase, sandbox.phase ?? "");
    this.tick();
    this.showActions(VERBS[sandbox.state] ?? []);
    if (before && before.state !== sandbox.state) {
      this.list.announce(`${sandbox.id} is ${sandbox.state}`);
      say(this.problem, "");
    }
    this.showCosts(sandbox.operations);
  }

  /** While an operation is under way, the buttons of before stay where they are; then the focus goes to what can be done next. */
  showActions(allowed) {
    const focused = Object.values(this.buttons).find((button) => button === document.activeElement);
    for (const [verb, button] of Object.entries(this.buttons)) {
      button.setAttribute("aria-disabled", String(!allowed.includes(verb)));
      if (allowed.length) button.hidden = !allowed.includes(verb);
    }
    if (focused?.hidden) this.buttons[allowed[0]].focus();
  }

  showCosts(operations) {
    const key = JSON.stringify(operations);
    if (key === this.shown) return;
    this.shown = key;
    // The last one of each kind is what people ask for; the others are a click away.
    const last = ["pause", "resume"].map((kind) => operations.findLast((o) => o.operation === kind)).filter(Boolean);
    if (!last.length && operations.length) last.push(operations.at(-1));
    const others = operations.filter((o) => !last.includes(o)).reverse();
    this.costs.replaceChildren(...last.map(cost));
    this.history.replaceChildren(...others.map(cost));
    this.details.hidden = !others.length;
  }

  /** Brings the times up to date. */
  tick() {
    const s = this.sandbox;
    const facts = [s.template_name, `${s.vcpu} vCPU`, `${s.memory_mib} MiB`, `made ${ago(s.created_at)}`];
    if (s.timeout_at) facts.push(`${s.auto_pause ? "pauses" : "is deleted"} in ${span(s.timeout_at - Date.now() / 1000)}`);
    if (s.reason) facts.push(s.reason);
    say(this.facts, facts.join(" · "));
    for (const time of this.node.querySelectorAll("time[data-ago]")) say(time, ago(time.dateTime));
  }

  async act(verb) {
    const { id } = this.sandbox;
    if (this.buttons[verb].getAttribute("aria-disabled") === "true") return;
    if (verb === "terminal") return this.list.openTerminal(id);
    if (verb === "delete" && !(await this.list.confirmDelete(id))) return;
    say(this.problem, "");
    this.buttons[verb].setAttribute("aria-disabled", "true");
    try {
      await (verb === "delete" ? call("DELETE", `/v1/sandbox/${id}`) : call("POST", `/v1/sandbox/${id}/${verb}`));
    } catch (refused) {
      say(this.problem, `${LABELS[verb]}: ${refused.message}`);
      this.buttons[verb].setAttribute("aria-disabled", "false");
    }
  }
}

/** All rows. `on`: `announce(text)`, `openTerminal(id)`, `confirmDelete(id)`. */
export class Sandboxes {
  #rows = new Map();

  constructor(list, empty, count, on) {
    Object.assign(this, on);
    this.nodes = { list, empty, count };
    setInterval(() => this.#rows.forEach((row) => row.tick()), 10_000);
  }

  /** The stream begins anew: what it does not tell of again is gone. */
  restart() {
    this.unseen = new Set(this.#rows.keys());
  }

  event(name, data) {
    if (name === "sandbox") {
      let row = this.#rows.get(data.id);
      if (!row) {
        row = new Row(data.id, this);
        this.#rows.set(data.id, row);
        // The newest first.
        this.nodes.list.prepend(row.node);
      }
      this.unseen?.delete(data.id);
      row.show(data);
    } else if (name === "gone") {
      this.#remove(data.id);
    } else if (name === "listed") {
      this.unseen?.forEach((id) => this.#remove(id));
    }
    const states = [...this.#rows.values()].map((row) => row.sandbox.state);
    const running = states.filter((state) => state === "running").length;
    say(this.nodes.count, states.length ? `${running} of ${states.length} running` : "");
    this.nodes.empty.hidden = states.length > 0;
  }

  #remove(id) {
    const row = this.#rows.get(id);
    if (!row) return;
    this.#rows.delete(id);
    const hadFocus = row.node.contains(document.activeElement);
    row.node.remove();
    this.announce(`${id} is deleted`);
    if (hadFocus) document.getElementById("main").focus();
  }

  clear() {
    this.#rows.clear();
    this.nodes.list.replaceChildren();
  }
}
