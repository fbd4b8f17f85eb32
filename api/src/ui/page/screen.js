// What a terminal shows, from the text that it was sent: the part of xterm's control sequences that shells, editors and pagers use
// (TERM=xterm-256color). Knows nothing of the page. What it does not know it swallows whole, so that nothing of it is shown.

const TAB = 8;
/** Characters of a control sequence at most; longer ones are dropped. */
const SEQUENCE = 4096;
const LINE_DRAWING = {
  "`": "◆", a: "▒", f: "°", g: "±", j: "┘", k: "┐", l: "┌", m: "└", n: "┼", o: "⎺", p: "⎻", q: "─", r: "⎼", s: "⎽", t: "├", u: "┤",
  v: "┴", w: "┬", x: "│", y: "≤", z: "≥", "{": "π", "|": "≠", "}": "£", "~": "·",
};

/** How a character looks. Colours: null (the default), 0 to 255, or "#rrggbb". */
const PLAIN = Object.freeze({ fg: null, bg: null, bold: false, dim: false, italic: false, underline: false, inverse: false, hidden: false, strike: false });
const BLANK = Object.freeze({ text: " ", pen: PLAIN, width: 1 });
/** The right half of a wide character. */
const HALF = (pen) => ({ text: "", pen, width: 0 });

const COMBINING = /^[\p{M}\u200b-\u200f\u2060\ufe00-\ufe0f]$/u;
const WIDE = /^[\u1100-\u115f\u2329\u232a\u2e80-\u303e\u3041-\u33ff\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6\u{1f300}-\u{1f64f}\u{1f900}-\u{1f9ff}\u{20000}-\u{3fffd}]$/u;

function widthOf(character) {
  const code = character.codePointAt(0);
  if (code < 0x300) return 1;
  if (COMBINING.test(character)) return 0;
  return WIDE.test(character) ? 2 : 1;
}

export class Screen {
  /** `on.reply(text)`: what the terminal answers to who asks it; `on.scrolled(line)`: a line left the screen at the top. */
  constructor(cols, rows, on = {}) {
    Object.assign(this, { cols, rows, on });
    this.reset();
  }

  reset() {
    this.main = this.#blankLines(this.rows);
    this.alternate = null;
    this.lines = this.main;
    this.cursor = { row: 0, col: 0 };
    this.pen = PLAIN;
    this.saved = {};
    this.region = { top: 0, bottom: this.rows - 1 };
    this.modes = { wrap: true, insert: false, origin: false, cursorVisible: true, applicationCursor: false, bracketedPaste: false };
    this.charsets = { G0: "B", G1: "B", active: "G0" };
    this.tabs = null;
    this.title = "";
    this.pendingWrap = false;
    this.last = "";
    this.state = "ground";
    this.sequence = "";
    /** Rows that differ from what was drawn. */
    this.dirty = new Set(this.lines.keys());
  }

  #blankLines(count) {
    return Array.from({ length: count }, () => this.#blankLine());
  }

  #blankLine() {
    return Array.from({ length: this.cols }, () => this.#blank());
  }

  /** An erased cell keeps the background that is set. */
  #blank() {
    return this.pen === undefined || this.pen.bg === null ? BLANK : { text: " ", pen: Object.freeze({ ...PLAIN, bg: this.pen.bg }), width: 1 };
  }

  resize(cols, rows) {
    if (cols === this.cols && rows === this.rows) return;
    const fit = (lines, follow) => {
      for (const line of lines) {
        while (line.length < cols) line.push(BLANK);
        line.length = cols;
      }
      // The line of the cursor stays: what is above it leaves first.
      while (lines.length > rows && follow && this.cursor.row >= rows) {
        const gone = lines.shift();
        if (lines !== this.alternate) this.on.scrolled?.(gone);
        this.cursor.row -= 1;
      }
      lines.length = Math.min(lines.length, rows);
      while (lines.length < rows) lines.push(Array.from({ length: cols }, () => BLANK));
    };
    fit(this.main, this.lines === this.main);
    if (this.alternate) fit(this.alternate, this.lines === this.alternate);
    Object.assign(this, { cols, rows, region: { top: 0, bottom: rows - 1 }, pendingWrap: false, tabs: null });
    this.cursor.row = Math.min(this.cursor.row, rows - 1);
    this.cursor.col = Math.min(this.cursor.col, cols - 1);
    this.#touchAll();
  }

  #touch(row) {
    this.dirty.add(row);
  }

  #touchAll() {
    for (let row = 0; row < this.rows; row++) this.dirty.add(row);
  }

  /** The visible text, without trailing blanks. */
  text() {
    return this.lines.map((line) => line.map((cell) => cell.text).join("").trimEnd()).join("\n").trimEnd();
  }

  write(text) {
    this.#touch(this.cursor.row);
    for (const character of text) this.#take(character);
    this.#touch(this.cursor.row);
  }

  #take(c) {
    const code = c.codePointAt(0);
    switch (this.state) {
      case "ground":
        if (code >= 0x20 && code !== 0x7f) this.#print(c);
        else this.#control(code);
        return;
      case "escape":
        return this.#escape(c, code);
      case "charset":
        this.charsets[this.sequence === "(" ? "G0" : "G1"] = c;
        this.state = "ground";
        return;
      case "swallow":
        this.state = "ground";
        return;
      case "csi":
        if (code === 0x1b) return this.#begin();
        if (code === 0x18 || code === 0x1a) this.state = "ground";
        else if (code < 0x20) this.#control(code);
        else if (code >= 0x40 && code <= 0x7e) {
          this.state = "ground";
          if (this.sequence.length <= SEQUENCE) this.#csi(this.sequence, c);
        } else if (this.sequence.length <= SEQUENCE) this.sequence += c;
        return;
      case "string":
        // A title or another text for the terminal; ends with BEL or ESC \.
        if (code === 0x07) this.#string();
        else if (code === 0x1b) this.state = "string-end";
        else if (code === 0x18 || code === 0x1a) this.state = "ground";
        else if (this.sequence.length <= SEQUENCE) this.sequence += c;
        return;
      case "string-end":
        if (c === "\\") return this.#string();
        this.#begin();
        return this.#escape(c, code);
    }
  }

  #begin() {
    this.state = "escape";
    this.sequence = "";
  }

  #string() {
    this.state = "ground";
    const title = /^\]([02]);(.*)$/su.exec(this.sequence);
    if (title) this.title = title[2];
  }

  #control(code) {
    switch (code) {
      case 0x08: this.#column(this.cursor.col - 1); break;
      case 0x09: this.#column(this.#nextTab(1)); break;
      case 0x0a: case 0x0b: case 0x0c: this.#index(); break;
      case 0x0d: this.#column(0); break;
      case 0x0e: this.charsets.active = "G1"; break;
      case 0x0f: this.charsets.active = "G0"; break;
      case 0x1b: this.#begin(); break;
    }
  }

  #escape(c, code) {
    this.state = "ground";
    switch (c) {
      case "[": this.state = "csi"; break;
      case "]": case "P": case "X": case "^": case "_": this.state = "string"; this.sequence = c; break;
      case "(": case ")": this.state = "charset"; this.sequence = c; break;
      case "*": case "+": case "-": case ".": case "/": case "#": case "%": case " ": this.state = "swallow"; break;
      case "7": this.#save(); break;
      case "8": this.#restore(); break;
      case "D": this.#index(); break;
      case "E": this.#index(); this.#column(0); break;
      case "M": this.#reverseIndex(); break;
      case "H": this.#tabStops().add(this.cursor.col); break;
      case "c": this.reset(); break;
      default: if (code < 0x20) this.#control(code);
    }
  }

  #print(c) {
    if (this.charsets[this.charsets.active] === "0") c = LINE_DRAWING[c] ?? c;
    const width = widthOf(c);
    if (width === 0) return this.#combine(c);
    if (this.pendingWrap && this.modes.wrap) {
      this.#index();
      this.#column(0);
    }
    this.pendingWrap = false;
    if (width === 2 && this.cursor.col === this.cols - 1) {
      if (!this.modes.wrap || this.cols < 2) return;
      this.#put(this.cursor.col, this.#blank());
      this.#index();
      this.#column(0);
    }
    const line = this.lines[this.cursor.row];
    if (this.modes.insert) line.splice(this.cursor.col, 0, ...Array(width).fill(BLANK));
    this.#put(this.cursor.col, { text: c, pen: this.pen, width });
    if (width === 2) this.#put(this.cursor.col + 1, HALF(this.pen));
    line.length = this.cols;
    this.last = c;
    if (this.cursor.col + width >= this.cols) {
      this.cursor.col = this.cols - 1;
      this.pendingWrap = true;
    } else {
      this.cursor.col += width;
    }
  }

  /** Writes a cell; half of a wide character does not stay without the other. */
  #put(col, cell) {
    const line = this.lines[this.cursor.row];
    if (line[col]?.width === 0 && col > 0 && line[col - 1].width === 2) line[col - 1] = BLANK;
    if (line[col]?.width === 2 && line[col + 1]?.width === 0) line[col + 1] = BLANK;
    line[col] = cell;
  }

  #combine(c) {
    const line = this.lines[this.cursor.row];
    let col = this.pendingWrap ? this.cursor.col : this.cursor.col - 1;
    if (line[col]?.width === 0) col -= 1;
    const cell = line[col];
    if (cell && cell.text.length < 16) line[col] = { ...cell, text: cell.text + c };
  }

  #column(col) {
    this.cursor.col = Math.max(0, Math.min(col, this.cols - 1));
    this.pendingWrap = false;
  }

  #row(row) {
    this.#touch(this.cursor.row);
    this.cursor.row = Math.max(0, Math.min(row, this.rows - 1));
    this.#touch(this.cursor.row);
    this.pendingWrap = false;
  }

  /** To an absolute place, as programs count it: in the scroll region under origin mode. */
  #place(row, col) {
    if (this.modes.origin) this.#row(Math.min(this.region.top + row, this.region.bottom));
    else this.#row(row);
    this.#column(col);
  }

  #index() {
    if (this.cursor.row === this.region.bottom) this.#scrollUp(1);
    else this.#row(this.cursor.row + 1);
    this.pendingWrap = false;
  }

  #reverseIndex() {
    if (this.cursor.row === this.region.top) this.#scrollDown(1);
    else this.#row(this.cursor.row - 1);
  }

  #scrollUp(count, top = this.region.top) {
    const { bottom } = this.region;
    for (let i = 0; i < Math.min(count, bottom - top + 1); i++) {
      const [gone] = this.lines.splice(top, 1);
      if (top === 0 && this.lines === this.main && this.region.top === 0) this.on.scrolled?.(gone);
      this.lines.splice(bottom, 0, this.#blankLine());
    }
    for (let row = top; row <= bottom; row++) this.#touch(row);
  }

  #scrollDown(count, top = this.region.top) {
    const { bottom } = this.region;
    for (let i = 0; i < Math.min(count, bottom - top + 1); i++) {
      this.lines.splice(bottom, 1);
      this.lines.splice(top, 0, this.#blankLine());
    }
    for (let row = top; row <= bottom; row++) this.#touch(row);
  }

  #tabStops() {
    if (!this.tabs) {
      this.tabs = new Set();
      for (let col = TAB; col < this.cols; col += TAB) this.tabs.add(col);
    }
    return this.tabs;
  }

  #nextTab(direction) {
    const stops = this.#tabStops();
    let col = this.cursor.col + direction;
    while (col > 0 && col < this.cols - 1 && !stops.has(col)) col += direction;
    return col;
  }

  #save() {
    const { cursor, pen, charsets, modes } = this;
    this.saved[this.lines === this.main ? "main" : "alternate"] = { cursor: { ...cursor }, pen, charsets: { ...charsets }, origin: modes.origin };
  }

  #restore() {
    const saved = this.saved[this.lines === this.main ? "main" : "alternate"];
    this.pen = saved?.pen ?? PLAIN;
    if (saved) {
      this.charsets = { ...saved.charsets };
      this.modes.origin = saved.origin;
    }
    this.#row(saved?.cursor.row ?? 0);
    this.#column(saved?.cursor.col ?? 0);
  }

  #erase(row, from, to) {
    for (let col = Math.max(0, from); col < Math.min(to, this.cols); col++) this.lines[row][col] = this.#blank();
    this.#touch(row);
  }

  #csi(sequence, final) {
    const [, mark, digits, between] = /^([<-?]?)([\d;:]*)([ -/]*)$/u.exec(sequence) ?? [];
    if (mark === undefined) return;
    const numbers = digits.split(";").map((n) => (n === "" ? null : Math.min(Number.parseInt(n, 10) || 0, 65535)));
    const at = (i, otherwise) => numbers[i] || otherwise;
    const { row, col } = this.cursor;
    if (mark === "?") {
      if (final === "h" || final === "l") numbers.forEach((n) => this.#privateMode(n, final === "h"));
      if (final !== "J" && final !== "K") return;
    } else if (mark === ">") {
      if (final === "c") this.on.reply?.("\x1b[>0;0;0c");
      return;
    } else if (mark) {
      return;
    }
    if (between === "!" && final === "p") return this.#softReset();
    if (between) return;
    switch (final) {
      case "@": this.#shift(at(0, 1)); break;
      case "A": this.#row(Math.max(row - at(0, 1), row >= this.region.top ? this.region.top : 0)); break;
      case "B": case "e": this.#row(Math.min(row + at(0, 1), row <= this.region.bottom ? this.region.bottom : this.rows - 1)); break;
      case "C": case "a": this.#column(col + at(0, 1)); break;
      case "D": this.#column(col - at(0, 1)); break;
      case "E": this.#row(row + at(0, 1)); this.#column(0); break;
      case "F": this.#row(row - at(0, 1)); this.#column(0); break;
      case "G": case "`": this.#column(at(0, 1) - 1); break;
      case "H": case "f": this.#place(at(0, 1) - 1, at(1, 1) - 1); break;
      case "d": this.#place(at(0, 1) - 1, col); break;
      case "I": for (let i = 0; i < Math.min(at(0, 1), this.cols); i++) this.#column(this.#nextTab(1)); break;
      case "Z": for (let i = 0; i < Math.min(at(0, 1), this.cols); i++) this.#column(this.#nextTab(-1)); break;
      case "J": this.#eraseDisplay(numbers[0] ?? 0); break;
      case "K": this.#erase(row, numbers[0] ? 0 : col, numbers[0] === 1 ? col + 1 : this.cols); this.pendingWrap = false; break;
      case "L": if (this.#inRegion()) this.#scrollDown(at(0, 1), row); break;
      case "M": if (this.#inRegion()) this.#scrollUp(at(0, 1), row); break;
      case "P": this.#unshift(at(0, 1)); break;
      case "X": this.#erase(row, col, col + at(0, 1)); break;
      case "S": this.#scrollUp(at(0, 1)); break;
      case "T": this.#scrollDown(at(0, 1)); break;
      case "b": for (let i = 0; this.last && i < Math.min(at(0, 1), this.cols * this.rows); i++) this.#print(this.last); break;
      case "c": this.on.reply?.("\x1b[?62;22c"); break;
      case "g": if (numbers[0] === 3) this.tabs = new Set(); else this.#tabStops().delete(col); break;
      case "h": case "l": if (numbers.includes(4)) this.modes.insert = final === "h"; break;
      case "m": this.#look(digits); break;
      case "n":
        if (numbers[0] === 5) this.on.reply?.("\x1b[0n");
        if (numbers[0] === 6) this.on.reply?.(`\x1b[${row + 1 - (this.modes.origin ? this.region.top : 0)};${col + 1}R`);
        break;
      case "r": {
        const [top, bottom] = [at(0, 1) - 1, Math.min(at(1, this.rows), this.rows) - 1];
        if (top < bottom) {
          this.region = { top, bottom };
          this.#place(0, 0);
        }
        break;
      }
      case "s": this.#save(); break;
      case "u": this.#restore(); break;
    }
  }

  #inRegion() {
    return this.cursor.row >= this.region.top && this.cursor.row <= this.region.bottom;
  }

  #shift(count) {
    const line = this.lines[this.cursor.row];
    line.splice(this.cursor.col, 0, ...Array.from({ length: Math.min(count, this.cols) }, () => this.#blank()));
    line.length = this.cols;
  }

  #unshift(count) {
    const line = this.lines[this.cursor.row];
    line.splice(this.cursor.col, count);
    while (line.length < this.cols) line.push(this.#blank());
  }

  #eraseDisplay(what) {
    const { row, col } = this.cursor;
    if (what === 0) this.#erase(row, col, this.cols);
    if (what === 1) this.#erase(row, 0, col + 1);
    for (let other = 0; other < this.rows; other++) {
      if (what === 2 || (what === 0 && other > row) || (what === 1 && other < row)) this.#erase(other, 0, this.cols);
    }
    if (what === 3) this.on.forget?.();
    this.pendingWrap = false;
  }

  #softReset() {
    this.pen = PLAIN;
    this.region = { top: 0, bottom: this.rows - 1 };
    Object.assign(this.modes, { wrap: true, insert: false, origin: false, cursorVisible: true, applicationCursor: false });
    this.charsets = { G0: "B", G1: "B", active: "G0" };
  }

  #privateMode(mode, on) {
    const named = { 1: "applicationCursor", 6: "origin", 7: "wrap", 25: "cursorVisible", 2004: "bracketedPaste" };
    if (named[mode]) {
      this.modes[named[mode]] = on;
      if (mode === 6) this.#place(0, 0);
      return;
    }
    if (mode === 1048 || mode === 1049) {
      if (on) this.#save();
    }
    if (mode === 47 || mode === 1047 || mode === 1049) {
      if (on && !this.alternate) {
        this.alternate = this.#blankLines(this.rows);
        this.lines = this.alternate;
      } else if (!on && this.alternate) {
        this.alternate = null;
        this.lines = this.main;
      }
      this.#touchAll();
    }
    if ((mode === 1048 || mode === 1049) && !on) this.#restore();
  }

  /** Colours and attributes (SGR). `:` and `;` both divide a colour's parts. */
  #look(digits) {
    const numbers = digits.split(/[;:]/u).map((n) => Number.parseInt(n, 10) || 0);
    const pen = { ...this.pen };
    for (let i = 0; i < numbers.length; i++) {
      const n = numbers[i];
      if (n === 0) Object.assign(pen, PLAIN);
      else if (n === 1) pen.bold = true;
      else if (n === 2) pen.dim = true;
      else if (n === 3) pen.italic = true;
      else if (n === 4) pen.underline = true;
      else if (n === 7) pen.inverse = true;
      else if (n === 8) pen.hidden = true;
      else if (n === 9) pen.strike = true;
      else if (n === 22) pen.bold = pen.dim = false;
      else if (n === 23) pen.italic = false;
      else if (n === 24) pen.underline = false;
      else if (n === 27) pen.inverse = false;
      else if (n === 28) pen.hidden = false;
      else if (n === 29) pen.strike = false;
      else if (n >= 30 && n <= 37) pen.fg = n - 30;
      else if (n >= 40 && n <= 47) pen.bg = n - 40;
      else if (n >= 90 && n <= 97) pen.fg = n - 82;
      else if (n >= 100 && n <= 107) pen.bg = n - 92;
      else if (n === 39) pen.fg = null;
      else if (n === 49) pen.bg = null;
      else if (n === 38 || n === 48) {
        let colour = null;
        if (numbers[i + 1] === 5) {
          colour = Math.min(numbers[i + 2] ?? 0, 255);
          i += 2;
        } else if (numbers[i + 1] === 2) {
          const part = (value) => Math.min(value ?? 0, 255).toString(16).padStart(2, "0");
          colour = `#${part(numbers[i + 2])}${part(numbers[i + 3])}${part(numbers[i + 4])}`;
          i += 4;
        }
        pen[n === 38 ? "fg" : "bg"] = colour;
      }
    }
    this.pen = Object.freeze(pen);
  }
}
