// The terminal: a dialog over the WebSocket of a sandbox's terminal. It uses one terminal of the sandbox, always the same: closing the
// dialog leaves its shell, and opening it again shows what was there.

import { call, socket } from "/ui/api.js";
import { Screen } from "/ui/screen.js";

/** Id of the page's terminal in a sandbox. */
const TERMINAL = "page";
const HISTORY_LINES = 2000;
/** What was shown before is sent anew on connecting, questions to the terminal among it: those were answered then. */
const QUESTIONS_AFTER_MS = 500;
const RESIZE_MS = 150;
/** Close code: the sandbox does not run any more (routes/terminals.rs). */
const ASLEEP = 1012;
const ENDED = 1000;

const CURSOR_KEYS = { ArrowUp: "A", ArrowDown: "B", ArrowRight: "C", ArrowLeft: "D", Home: "H", End: "F" };
const TILDE_KEYS = { Insert: 2, Delete: 3, PageUp: 5, PageDown: 6, F5: 15, F6: 17, F7: 18, F8: 19, F9: 20, F10: 21, F11: 23, F12: 24 };
const LETTER_KEYS = { F1: "P", F2: "Q", F3: "R", F4: "S" };
const PLAIN_KEYS = { Enter: "\r", Tab: "\t", Escape: "\x1b", Backspace: "\x7f" };

const $ = (id) => document.getElementById(id);

/** What a key types; null when it is the browser's. */
export function typed(event, applicationCursor) {
  const { key, ctrlKey, altKey, shiftKey, metaKey } = event;
  if (metaKey || event.isComposing || key === "Process") return null;
  const modifier = 1 + (shiftKey ? 1 : 0) + (altKey ? 2 : 0) + (ctrlKey ? 4 : 0);
  if (CURSOR_KEYS[key]) {
    if (modifier > 1) return `\x1b[1;${modifier}${CURSOR_KEYS[key]}`;
    return `\x1b${applicationCursor ? "O" : "["}${CURSOR_KEYS[key]}`;
  }
  if (TILDE_KEYS[key]) return modifier > 1 ? `\x1b[${TILDE_KEYS[key]};${modifier}~` : `\x1b[${TILDE_KEYS[key]}~`;
  if (LETTER_KEYS[key]) return modifier > 1 ? `\x1b[1;${modifier}${LETTER_KEYS[key]}` : `\x1bO${LETTER_KEYS[key]}`;
  if (key === "Tab" && shiftKey) return "\x1b[Z";
  if (PLAIN_KEYS[key]) return (altKey ? "\x1b" : "") + PLAIN_KEYS[key];
  if ([...key].length !== 1) return null;
  if (!ctrlKey) return (altKey ? "\x1b" : "") + key;
  // AltGr is Ctrl and Alt on some systems, and then types what it says.
  if (altKey && !/^[a-z]$/iu.test(key)) return key;
  const code = key === " " ? 0 : key.toUpperCase().charCodeAt(0) - 64;
  if (code < 0 || code > 31) return key === "?" ? "\x7f" : null;
  return (altKey ? "\x1b" : "") + String.fromCharCode(code);
}

/** A line as spans of characters that look alike. */
function draw(line, cursorAt) {
  const row = document.createElement("div");
  let end = line.length;
  while (end > 0 && line[end - 1].text === " " && line[end - 1].pen.bg === null && !line[end - 1].pen.inverse && end - 1 !== cursorAt) end -= 1;
  let [text, pen, isCursor] = ["", null, false];
  const flush = () => {
    if (!text) return;
    row.append(pen === null ? text : look(text, pen, isCursor));
    text = "";
  };
  for (let col = 0; col < end; col++) {
    const cell = line[col];
    const here = col === cursorAt;
    if (cell.pen !== pen || here || isCursor) {
      flush();
      [pen, isCursor] = [cell.pen, here];
    }
    text += cell.text;
  }
  flush();
  return row;
}

function look(text, pen, isCursor) {
  const span = document.createElement("span");
  const names = [];
  for (const name of ["bold", "dim", "italic", "underline", "inverse", "hidden", "strike"]) if (pen[name]) names.push(name);
  if (isCursor) names.push("cursor");
  const colour = (value, kind, property) => {
    if (value === null) return;
    if (typeof value === "number" && value < 16) names.push(`${kind}${value}`);
    else span.style.setProperty(property, typeof value === "string" ? value : palette(value));
  };
  // Bold has always meant bright for the eight first colours.
  const fg = pen.bold && typeof pen.fg === "number" && pen.fg < 8 ? pen.fg + 8 : pen.fg;
  colour(fg, "fg", "--fg");
  colour(pen.bg, "bg", "--bg");
  if (span.style.getPropertyValue("--fg")) names.push("fg");
  if (span.style.getPropertyValue("--bg")) names.push("bg");
  span.className = names.join(" ");
  span.textContent = text;
  return span;
}

/** Colours 16 to 255 of xterm: a cube of six, then greys. */
function palette(n) {
  if (n >= 232) return `rgb(${Array(3).fill(8 + (n - 232) * 10).join(",")})`;
  const level = (value) => (value ? 55 + value * 40 : 0);
  return `rgb(${level(Math.floor((n - 16) / 36))},${level(Math.floor((n - 16) / 6) % 6)},${level((n - 16) % 6)})`;
}

class Terminal {
  #socket = null;
  #drawing = 0;
  #resizing = 0;
  #mayAnswer = false;
  #closed = false;

  constructor(id) {
    this.id = id;
    this.path = `/v1/sandbox/${id}/pty`;
    this.size = this.#fitting();
    this.screen = new Screen(this.size.cols, this.size.rows, {
      reply: (text) => this.#mayAnswer && this.send(text),
      scrolled: (line) => this.#remember(line),
      forget: () => $("history").replaceChildren(),
    });
    this.decoder = new TextDecoder();
    this.observer = new ResizeObserver(() => this.#resized());
    this.observer.observe($("screen"));
    this.#scheduleDrawing();
  }

  /** Columns and rows that the dialog has room for. */
  #fitting() {
    const probe = document.createElement("span");
    probe.className = "probe";
    probe.textContent = "M".repeat(20);
    $("lines").append(probe);
    const box = probe.getBoundingClientRect();
    probe.remove();
    const room = $("screen");
    const style = getComputedStyle(room);
    const width = room.clientWidth - Number.parseFloat(style.paddingLeft) - Number.parseFloat(style.paddingRight);
    const height = room.clientHeight - Number.parseFloat(style.paddingTop) - Number.parseFloat(style.paddingBottom);
    this.charWidth = box.width / 20 || 8;
    this.lineHeight = box.height || 16;
    const within = (n, least, most) => Math.max(least, Math.min(Math.floor(n) || least, most));
    return { cols: within(width / this.charWidth, 20, 500), rows: within(height / this.lineHeight, 5, 200) };
  }

  async connect() {
    status("Connecting…");
    $("terminal-again").hidden = true;
    try {
      const terminal = await this.#terminal();
      if (this.#closed) return;
      if (terminal.cols !== this.size.cols || terminal.rows !== this.size.rows) await this.#tellSize();
      this.#open();
    } catch (refused) {
      status("Not connected");
      $("terminal-problem").textContent = refused.message;
      $("terminal-again").hidden = refused.code === "no-agent";
    }
  }

  /** The terminal of this page in the sandbox, with a shell that runs; wakes the sandbox. */
  async #terminal() {
    const wanted = { id: TERMINAL, ...this.size };
    try {
      return await call("POST", this.path, wanted);
    } catch (refused) {
      if (refused.status !== 409 || refused.code === "no-agent") throw refused;
    }
    const known = await call("GET", `${this.path}/${TERMINAL}`);
    if (known.active) return known;
    await call("DELETE", `${this.path}/${TERMINAL}`);
    return call("POST", this.path, wanted);
  }

  #open() {
    const ws = new WebSocket(socket(`${this.path}/${TERMINAL}/connect`));
    ws.binaryType = "arraybuffer";
    ws.addEventListener("open", () => {
      this.screen.reset();
      this.decoder = new TextDecoder();
      $("history").replaceChildren();
      $("terminal-problem").textContent = "";
      status("Connected");
      setTimeout(() => { this.#mayAnswer = true; }, QUESTIONS_AFTER_MS);
      $("keys").focus();
    });
    ws.addEventListener("message", ({ data }) => {
      this.screen.write(typeof data === "string" ? data : this.decoder.decode(data, { stream: true }));
      this.#scheduleDrawing();
    });
    ws.addEventListener("close", ({ code, reason }) => {
      if (this.#socket !== ws || this.#closed) return;
      this.#socket = null;
      this.#mayAnswer = false;
      const ended = { [ENDED]: "The shell has ended", [ASLEEP]: "The sandbox does not run any more; connecting wakes it" };
      status(ended[code] ?? (reason || "The connection broke"));
      $("terminal-again").hidden = false;
      $("terminal-again").focus();
    });
    this.#socket = ws;
  }

  send(text) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(new TextEncoder().encode(text));
  }

  paste(text) {
    // A pasted end mark would make the rest of it count as typed.
    const clean = text.replaceAll("\x1b", "").replace(/\r?\n/gu, "\r");
    this.send(this.screen.modes.bracketedPaste ? `\x1b[200~${clean}\x1b[201~` : clean);
  }

  #resized() {
    clearTimeout(this.#resizing);
    this.#resizing = setTimeout(() => {
      const size = this.#fitting();
      if (this.#closed || (size.cols === this.size.cols && size.rows === this.size.rows)) return;
      this.size = size;
      this.screen.resize(size.cols, size.rows);
      this.#scheduleDrawing();
      if (this.#socket) this.#tellSize().catch(() => { /* The shell keeps the old size. */ });
    }, RESIZE_MS);
  }

  #tellSize() {
    return call("POST", `${this.path}/${TERMINAL}/resize`, this.size);
  }

  #remember(line) {
    const history = $("history");
    history.append(draw(line, -1));
    while (history.childElementCount > HISTORY_LINES) history.firstElementChild.remove();
  }

  #scheduleDrawing() {
    // A page that is not seen gets no frames; it is drawn all the same, for who reads it otherwise.
    this.#drawing ||= setTimeout(() => {
      this.#drawing = 0;
      this.#draw();
    }, 16);
  }

  #draw() {
    const { screen } = this;
    const lines = $("lines");
    const room = $("screen");
    const atEnd = room.scrollHeight - room.scrollTop - room.clientHeight < this.lineHeight * 2;
    while (lines.childElementCount > screen.rows) lines.lastElementChild.remove();
    while (lines.childElementCount < screen.rows) lines.append(document.createElement("div"));
    for (const row of screen.dirty) {
      const cursorAt = row === screen.cursor.row && screen.modes.cursorVisible ? screen.cursor.col : -1;
      lines.children[row]?.replaceWith(draw(screen.lines[row], cursorAt));
    }
    screen.dirty.clear();
    // Where an input method shows what is being composed.
    const keys = $("keys");
    keys.style.top = `${lines.offsetTop + screen.cursor.row * this.lineHeight}px`;
    keys.style.left = `${screen.cursor.col * this.charWidth}px`;
    if (atEnd) room.scrollTop = room.scrollHeight;
    lines.setAttribute("aria-label", `Terminal screen: ${screen.text().split("\n").slice(-5).join("; ")}`);
    $("terminal-title").textContent = screen.title ? `Terminal: ${screen.title}` : `Terminal of ${this.id}`;
  }

  close() {
    this.#closed = true;
    this.observer.disconnect();
    clearTimeout(this.#resizing);
    clearTimeout(this.#drawing);
    this.#socket?.close();
  }
}

function status(text) {
  $("terminal-status").textContent = text;
}

let open = null;

/** Shows the terminal of a sandbox, waking it. */
export function openTerminal(id) {
  const dialog = $("terminal");
  $("terminal-problem").textContent = "";
  $("terminal-title").textContent = `Terminal of ${id}`;
  $("history").replaceChildren();
  $("lines").replaceChildren();
  dialog.showModal();
  open = new Terminal(id);
  open.connect();
}

const keys = $("keys");
keys.addEventListener("keydown", (event) => {
  if (!open) return;
  if (event.key === "F6" && event.shiftKey) {
    event.preventDefault();
    $("terminal-close").focus();
    return;
  }
  const selection = String(getSelection());
  const clipboard = event.ctrlKey && !event.altKey && ((event.key === "c" && selection) || /^[vV]$/u.test(event.key) || (event.key === "C" && event.shiftKey));
  if (clipboard) return;
  const text = typed(event, open.screen.modes.applicationCursor);
  if (text === null) return;
  event.preventDefault();
  open.send(text);
  $("screen").scrollTop = $("screen").scrollHeight;
});
// What input methods and the keyboards of telephones write.
keys.addEventListener("input", (event) => {
  if (event.isComposing) return;
  open?.send(keys.value.replaceAll("\n", "\r"));
  keys.value = "";
});
keys.addEventListener("compositionend", () => {
  open?.send(keys.value);
  keys.value = "";
});
keys.addEventListener("paste", (event) => {
  event.preventDefault();
  open?.paste(event.clipboardData.getData("text"));
});
$("screen").addEventListener("mouseup", () => {
  if (!String(getSelection())) keys.focus({ preventScroll: true });
});
$("terminal-close").addEventListener("click", () => $("terminal").close());
$("terminal-again").addEventListener("click", () => open?.connect());
// Escape belongs to the shell.
$("terminal").addEventListener("cancel", (event) => { if (document.activeElement === keys) event.preventDefault(); });
$("terminal").addEventListener("close", () => {
  open?.close();
  open = null;
});
