//! A real browser, driven over its DevTools protocol: Debian's Chromium, without a window, with a profile of its own.
//!
//! The protocol is JSON over a WebSocket, of which a test needs a dozen calls: fewer than a crate that knows all of it has modules.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use crate::host;
use crate::vmm::Error;

const PROGRAM: &str = "/usr/bin/chromium";
/// For an answer, and for a condition to hold: the machine may be busy.
const PATIENCE: Duration = Duration::from_mins(3);
const LOOK: Duration = Duration::from_millis(50);
/// A bit of `modifiers` in key events.
pub const SHIFT: u8 = 8;

/// Why there is no browser; `None` when there is one.
pub fn lacking() -> Option<String> {
    host::missing(Path::new(PROGRAM), "make browser installs it, on Debian")
}

/// A browser with one page. It ends when this is dropped.
pub struct Browser {
    process: Child,
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    session: String,
    calls: u64,
    /// What the page complained of: exceptions, errors on the console, refusals by its own policy.
    pub problems: Vec<String>,
    /// URLs of all requests that it made.
    pub requests: Vec<String>,
    _profile: tempfile::TempDir,
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Browser {
    /// Starts one, with an empty page.
    #[expect(clippy::disallowed_methods, reason = "the browser is a program")]
    pub async fn start() -> Result<Self, Error> {
        let profile = host::scratch()?;
        // Tests run as root, for whom Chromium has no sandbox.
        let process = std::process::Command::new(PROGRAM)
            .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
            .args(["--disable-background-networking", "--disable-extensions", "--remote-debugging-port=0"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let port = profile.path().join("DevToolsActivePort");
        let begun = Instant::now();
        let place = loop {
            let text = std::fs::read_to_string(&port).unwrap_or_default();
            if let Some((port, path)) = text.split_once('\n') {
                break format!("ws://127.0.0.1:{port}{}", path.trim());
            }
            if begun.elapsed() > PATIENCE {
                return Err("the browser does not start".into());
            }
            tokio::time::sleep(LOOK).await;
        };
        let (socket, _) = connect_async(place).await?;
        let mut browser = Self {
            process,
            socket,
            session: String::new(),
            calls: 0,
            problems: Vec::new(),
            requests: Vec::new(),
            _profile: profile,
        };
        let page = browser.call("Target.createTarget", json!({ "url": "about:blank" })).await?;
        let attached =
            browser.call("Target.attachToTarget", json!({ "targetId": page["targetId"], "flatten": true })).await?;
        attached["sessionId"].as_str().unwrap_or_default().clone_into(&mut browser.session);
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), json!({})).await?;
        }
        Ok(browser)
    }

    /// A call of the protocol; what the browser tells meanwhile is noted.
    pub async fn call(&mut self, method: &str, params: Value) -> Result<Value, Error> {
        self.calls += 1;
        let id = self.calls;
        let mut request = json!({ "id": id, "method": method, "params": params });
        if !self.session.is_empty() {
            request["sessionId"] = self.session.clone().into();
        }
        self.socket.send(Message::text(request.to_string())).await?;
        loop {
            let message = tokio::time::timeout(PATIENCE, self.socket.next()).await?;
            let Message::Text(text) = message.ok_or("the browser is gone")?? else { continue };
            let message: Value = serde_json::from_str(&text)?;
            if message["id"] == id {
                return match message.get("error") {
                    Some(error) => Err(format!("{method}: {error}").into()),
                    None => Ok(message["result"].clone()),
                };
            }
            self.note(&message);
        }
    }

    fn note(&mut self, event: &Value) {
        let params = &event["params"];
        match event["method"].as_str() {
            Some("Runtime.exceptionThrown") => self.problems.push(params["exceptionDetails"].to_string()),
            // What a request is refused with is the page's to show.
            Some("Log.entryAdded") if params["entry"]["level"] == "error" && params["entry"]["source"] != "network" => {
                self.problems.push(params["entry"].to_string());
            }
            Some("Network.requestWillBeSent") => {
                self.requests.extend(params["request"]["url"].as_str().map(str::to_owned));
            }
            _ => {}
        }
    }

    /// Opens a page and waits until its scripts have run.
    pub async fn open(&mut self, url: &str) -> Result<(), Error> {
        self.call("Page.navigate", json!({ "url": url })).await?;
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'").await
    }

    /// The value of an expression, or of its promise.
    pub async fn value(&mut self, expression: &str) -> Result<Value, Error> {
        let params = json!({ "expression": expression, "awaitPromise": true, "returnByValue": true });
        let answer = self.call("Runtime.evaluate", params).await?;
        match answer.get("exceptionDetails") {
            Some(details) => Err(format!("{expression}: {details}").into()),
            None => Ok(answer["result"]["value"].clone()),
        }
    }

    /// Waits until an expression is true.
    pub async fn until(&mut self, expression: &str) -> Result<(), Error> {
        let begun = Instant::now();
        loop {
            // While a page is being opened there may be nothing to ask.
            let answer = self.value(expression).await;
            if answer.as_ref().is_ok_and(|value| *value == true) {
                return Ok(());
            }
            if begun.elapsed() > PATIENCE {
                let page = self.value("document.body.innerText").await.unwrap_or_default();
                return Err(format!("not in time: {expression} ({answer:?}); the page says {page}").into());
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Clicks with the mouse in the middle of what a selector finds, once it can be seen.
    pub async fn click(&mut self, selector: &str) -> Result<(), Error> {
        let found = format!("document.querySelector({})", json!(selector));
        self.until(&format!("!!{found} && {found}.getClientRects().length > 0")).await?;
        let middle = format!(
            "(() => {{ const e = {found}; e.scrollIntoView({{ block: 'center' }}); const r = e.getBoundingClientRect(); \
             return [r.x + r.width / 2, r.y + r.height / 2]; }})()"
        );
        let at = self.value(&middle).await?;
        for kind in ["mousePressed", "mouseReleased"] {
            let event = json!({ "type": kind, "x": at[0], "y": at[1], "button": "left", "clickCount": 1 });
            self.call("Input.dispatchMouseEvent", event).await?;
        }
        Ok(())
    }

    /// Types into what has the focus, key by key.
    pub async fn type_text(&mut self, text: &str) -> Result<(), Error> {
        for c in text.chars() {
            self.press(&c.to_string(), &c.to_string(), 0).await?;
        }
        Ok(())
    }

    /// Presses a key: its name, what it types, and [`SHIFT`] or none.
    pub async fn press(&mut self, key: &str, text: &str, modifiers: u8) -> Result<(), Error> {
        let down = if text.is_empty() { "rawKeyDown" } else { "keyDown" };
        for kind in [down, "keyUp"] {
            let mut event = json!({ "type": kind, "key": key, "modifiers": modifiers });
            if kind == "keyDown" {
                event["text"] = text.into();
            }
            self.call("Input.dispatchKeyEvent", event).await?;
        }
        Ok(())
    }

    /// Puts `text` into a field in place of what is there.
    pub async fn fill(&mut self, selector: &str, text: &str) -> Result<(), Error> {
        let field = json!(selector);
        let select = format!("(() => {{ const e = document.querySelector({field}); e.focus(); e.value = ''; }})()");
        self.value(&select).await?;
        self.call("Input.insertText", json!({ "text": text })).await.map(drop)
    }

    /// Gives the page a size, and the person a liking for `light` or `dark`.
    pub async fn look(&mut self, width: u32, height: u32, scheme: &str) -> Result<(), Error> {
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", size).await?;
        let scheme = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.call("Emulation.setEmulatedMedia", scheme).await.map(drop)
    }

    /// Saves a picture of the page under `$STASIS_SCREENSHOTS`, where somebody asks for pictures.
    pub async fn picture(&mut self, name: &str) -> Result<(), Error> {
        let Some(dir) = std::env::var_os("STASIS_SCREENSHOTS") else { return Ok(()) };
        let picture = self.call("Page.captureScreenshot", json!({ "format": "png" })).await?;
        let png = STANDARD.decode(picture["data"].as_str().unwrap_or_default())?;
        std::fs::write(Path::new(&dir).join(format!("{name}.png")), png)?;
        Ok(())
    }
}
