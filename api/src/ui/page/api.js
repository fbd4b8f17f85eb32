// Requests to the API, and its stream of events. The session is a cookie that this script cannot read; the header says that a request
// comes from this page (see ui/session.rs).

const FROM_PAGE = { "stasis-page": "1" };
/** The stream says every 15 s that it is alive; one that is silent for longer is taken for dead. */
const SILENCE_MS = 40_000;
const RETRY_MS = [500, 1000, 2000, 5000];

/** A request that was refused, with the server's word for why; or not answered: `status` is 0 then. */
export class Refused extends Error {
  constructor(status, message, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Sends a request; answers its JSON, null when there is none. */
export async function call(method, path, body) {
  const init = { method, headers: { ...FROM_PAGE }, credentials: "same-origin" };
  if (body !== undefined) {
    init.body = JSON.stringify(body);
    init.headers["content-type"] = "application/json";
  }
  let answer;
  try {
    answer = await fetch(path, init);
  } catch {
    throw new Refused(0, "The supervisor does not answer.");
  }
  const text = await answer.text();
  let json = null;
  try {
    json = text ? JSON.parse(text) : null;
  } catch { /* Said below, by its status. */ }
  if (!answer.ok) {
    throw new Refused(answer.status, json?.message ?? `The supervisor answered ${answer.status}.`, answer.headers.get("stasis-error") ?? "");
  }
  return json;
}

/** URL of a WebSocket of this server. */
export function socket(path) {
  return `${location.protocol === "https:" ? "wss:" : "ws:"}//${location.host}${path}`;
}

/**
 * Follows `/v1/events` until `stop`: `on.event(name, data)`, `on.state("live" | "waiting")`, `on.refused()` when there is no session.
 * A page that nobody looks at has no stream: browsers allow few connections.
 */
export class Events {
  #on;
  #abort = null;
  #tries = 0;
  #timer = 0;
  #stopped = false;

  constructor(on) {
    this.#on = on;
    this.visible = () => {
      clearTimeout(this.#timer);
      if (document.hidden) this.#abort?.abort();
      else if (!this.#abort) this.#follow();
    };
    document.addEventListener("visibilitychange", this.visible);
    this.visible();
  }

  stop() {
    this.#stopped = true;
    document.removeEventListener("visibilitychange", this.visible);
    clearTimeout(this.#timer);
    this.#abort?.abort();
  }

  async #follow() {
    const abort = (this.#abort = new AbortController());
    let silence = 0;
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(() => abort.abort(), SILENCE_MS);
    };
    try {
      heard();
      const answer = await fetch("/v1/events", { headers: FROM_PAGE, signal: abort.signal, cache: "no-store" });
      if (answer.status === 401) {
        if (!this.#stopped) this.#on.refused();
        return;
      }
      if (!answer.ok) throw new Error(String(answer.status));
      this.#tries = 0;
      this.#on.state("live");
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        heard();
        const blocks = (rest + value).split("\n\n");
        rest = blocks.pop();
        for (const block of blocks) this.#tell(block);
      }
    } catch { /* Tried again below. */ } finally {
      clearTimeout(silence);
      this.#abort = null;
    }
    if (this.#stopped || document.hidden) return;
    this.#on.state("waiting");
    this.#timer = setTimeout(this.visible, RETRY_MS[Math.min(this.#tries++, RETRY_MS.length - 1)]);
  }

  #tell(block) {
    let [name, data] = ["", ""];
    for (const line of block.split("\n")) {
      if (line.startsWith("event:")) name = line.slice(6).trim();
      if (line.startsWith("data:")) data += line.slice(5).trim();
    }
    if (name) this.#on.event(name, JSON.parse(data));
  }
}
