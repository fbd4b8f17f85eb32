//! The page for people, in a browser: with pulse guests, which sleep and have no agent, and with an agent of this machine for the terminal.

use serde_json::{Value, json};
use stasis_tests::browser::{self, Browser, SHIFT};
use stasis_tests::guest::{self, LocalGuest, SANDBOX};
use stasis_tests::service::{Options, Service};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::{Error, no_pulse};

fn main() {
    Suite::default()
        .test("a_person_pauses_and_resumes_and_sees_what_it_cost", no_pulse().or_else(browser::lacking), sandboxes)
        .test("the_terminal_runs_a_shell", guest::lacking().or_else(browser::lacking), terminal)
        .test("the_screen_shows_what_programs_draw", guest::lacking().or_else(browser::lacking), screens)
        .main();
}

async fn signed_in(url: &str, key: &str) -> Result<Browser, Error> {
    let mut browser = Browser::start().await?;
    browser.look(1280, 900, "light").await?;
    browser.open(&format!("{url}/ui")).await?;
    browser.until("!document.getElementById('sign-in').hidden").await?;
    browser.fill("#key", "sk_wrong").await?;
    browser.click("#sign-in button").await?;
    browser.until("document.getElementById('sign-in-problem').textContent.includes('no such key')").await?;
    browser.picture("sign-in").await?;
    browser.fill("#key", key).await?;
    browser.press("Enter", "\r", 0).await?;
    browser.until("document.getElementById('connection').textContent === 'Live'").await?;
    Ok(browser)
}

/// Nothing went wrong in the page, and it asked nobody but us.
fn well(browser: &Browser, url: &str) {
    assert!(browser.problems.is_empty(), "{:?}", browser.problems);
    let strange: Vec<_> = browser.requests.iter().filter(|request| !request.starts_with(url)).collect();
    assert!(strange.iter().all(|request| *request == "about:blank"), "{strange:?}");
}

async fn sandboxes() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let mut page = signed_in(&service.url, &service.key).await?;
    page.until("!document.getElementById('empty').hidden").await?;
    page.picture("empty").await?;
    assert_eq!(page.value("document.cookie").await?, "", "the session is nothing that a script can read");
    page.value("window.loadedOnce = true").await?;

    page.click("#new summary").await?;
    page.fill("#template", "no/such").await?;
    page.click("#create").await?;
    page.until("document.getElementById('create-problem').textContent.includes('no/such')").await?;
    page.fill("#template", "test/pulse").await?;
    page.fill("#memory", "32").await?;
    page.click("#create").await?;
    page.until("document.querySelectorAll('.sandbox[data-state=running]').length === 1").await?;
    page.picture("create").await?;
    page.click("#new summary").await?;
    let id = page.value("document.querySelector('.sandbox').id").await?.as_str().unwrap_or_default().to_owned();
    let row = format!("#{id}");

    // No agent, and it says so where one looks for the shell.
    page.click(&format!("{row} [data-verb=terminal]")).await?;
    page.until("document.getElementById('terminal-problem').textContent.includes('no agent')").await?;
    page.picture("no-agent").await?;
    page.click("#terminal-close").await?;
    page.until("!document.getElementById('terminal').open").await?;

    page.click(&format!("{row} [data-verb=pause]")).await?;
    page.until(&format!("document.querySelector('{row}').dataset.state === 'paused'")).await?;
    assert_eq!(service.state(&id).await?, "paused");
    let cost = |kind: &str| format!("document.querySelector('{row} > .costs [data-operation={kind}]')");
    page.until(&format!("!!{0} && {0}.querySelectorAll('.part').length > 1", cost("pause"))).await?;
    let said = page.value(&format!("{}.innerText", cost("pause"))).await?.to_string();
    for part in ["Pause", "ms", "sent", "upload", "head"] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    let drawn = page.value(&format!("{}.querySelector('.bar').getBoundingClientRect().width", cost("pause"))).await?;
    assert!(drawn.as_f64().is_some_and(|width| width > 100.0), "{drawn}");
    let announced = page.value("document.getElementById('announcer').textContent").await?;
    assert_eq!(announced, format!("{id} is paused"));
    // The same figures as the API has.
    let live = service.call("GET", "/v1/live", None).await?.expect(200)?.json;
    let operations = live["items"][0]["operations"].as_array().cloned().unwrap_or_default();
    let pause = operations.iter().find(|o| o["operation"] == "pause").ok_or("no pause is remembered")?;
    assert!(
        pause["ms"].as_f64().is_some_and(|ms| ms > 0.0) && pause["bytes"][0]["bytes"].as_u64() > Some(0),
        "{pause}"
    );

    page.click(&format!("{row} [data-verb=resume]")).await?;
    page.until(&format!("document.querySelector('{row}').dataset.state === 'running'")).await?;
    page.until(&format!("!!{}", cost("resume"))).await?;
    service.pulse_is_well(&id).await?;

    // What others do is seen, too.
    let other = service.create_pulse().await?;
    page.until("document.querySelectorAll('.sandbox').length === 2").await?;
    service.pause(&other).await?.expect(201)?;
    page.until(&format!("document.querySelector('#{other}').dataset.state === 'paused'")).await?;
    for (name, width, height, scheme) in [
        ("wide-light", 1280, 900, "light"),
        ("wide-dark", 1280, 900, "dark"),
        ("narrow-light", 390, 844, "light"),
        ("narrow-dark", 390, 844, "dark"),
    ] {
        page.look(width, height, scheme).await?;
        let wide = page.value("document.documentElement.scrollWidth <= innerWidth").await?;
        assert_eq!(wide, true, "{name}: one must scroll sideways");
        page.picture(name).await?;
    }
    page.look(1280, 900, "light").await?;

    page.click(&format!("{row} [data-verb=delete]")).await?;
    page.until("document.getElementById('delete').open").await?;
    page.picture("delete").await?;
    page.click("#delete [value=delete]").await?;
    page.until(&format!("!document.querySelector('{row}')")).await?;
    assert_eq!(page.value("window.loadedOnce").await?, true, "the page was loaded again");

    page.click("#sign-out").await?;
    page.until("!document.getElementById('sign-in').hidden && !document.querySelector('.sandbox')").await?;
    well(&page, &service.url);
    Ok(())
}

const SHOWN: &str = "document.getElementById('lines').innerText";

async fn terminal() -> Outcome {
    let guest = LocalGuest::start().await?;
    let mut page = signed_in(&guest.url, &guest.key).await?;
    page.click(&format!("#{SANDBOX} [data-verb=terminal]")).await?;
    page.until("document.getElementById('terminal-status').textContent === 'Connected'").await?;
    page.until("document.activeElement.id === 'keys'").await?;
    page.type_text("echo $((40 + 2))-$FROM_SANDBOX").await?;
    page.press("Enter", "\r", 0).await?;
    page.until(&format!("{SHOWN}.includes('42-yes')")).await?;
    page.type_text("printf '\\033[31mred\\033[0m \\033[1;44mbold\\033[0m \\342\\234\\223\\n'").await?;
    page.press("Enter", "\r", 0).await?;
    page.until("[...document.querySelectorAll('#lines .fg1')].some((e) => e.textContent === 'red')").await?;
    page.until("[...document.querySelectorAll('#lines .bold.bg4')].some((e) => e.textContent === 'bold')").await?;
    page.until(&format!("{SHOWN}.includes('✓')")).await?;
    page.picture("terminal-wide").await?;

    // The shell knows the size, and learns of another.
    let size = "(async () => { const { rows } = { rows: document.getElementById('lines').childElementCount }; return rows; })()";
    let rows = page.value(size).await?;
    page.type_text("clear; stty size").await?;
    page.press("Enter", "\r", 0).await?;
    page.until(&format!("{SHOWN}.includes('\\n{rows} ') || {SHOWN}.includes('{rows} ')")).await?;
    page.look(390, 600, "dark").await?;
    page.until(&format!("document.getElementById('lines').childElementCount !== {rows}")).await?;
    let fewer = page.value(size).await?;
    page.type_text("until stty size | grep '^FEW '; do sleep 0.1; done".replace("FEW", &fewer.to_string()).as_str())
        .await?;
    page.press("Enter", "\r", 0).await?;
    page.until(&format!("{SHOWN}.split('\\n').some((line) => line.startsWith('{fewer} '))")).await?;
    page.picture("terminal-narrow").await?;

    // The keyboard gets out without the mouse, and the shell is there when one comes back.
    page.type_text("left=behind").await?;
    page.press("Enter", "\r", 0).await?;
    page.press("F6", "", SHIFT).await?;
    page.until("document.activeElement.id === 'terminal-close'").await?;
    page.press("Enter", "\r", 0).await?;
    page.until("!document.getElementById('terminal').open").await?;
    page.look(1280, 900, "light").await?;
    page.click(&format!("#{SANDBOX} [data-verb=terminal]")).await?;
    page.until("document.getElementById('terminal-status').textContent === 'Connected'").await?;
    page.until(&format!("{SHOWN}.includes('left=behind')")).await?;
    page.type_text("echo \"[$left]\"").await?;
    page.press("Enter", "\r", 0).await?;
    page.until(&format!("{SHOWN}.includes('[behind]')")).await?;
    page.type_text("exit").await?;
    page.press("Enter", "\r", 0).await?;
    page.until("document.getElementById('terminal-status').textContent === 'The shell has ended'").await?;
    page.click("#terminal-again").await?;
    page.until("document.getElementById('terminal-status').textContent === 'Connected'").await?;
    well(&page, &guest.url);
    Ok(())
}

/// What is written, on 10 columns and 4 rows; what is shown then, and where the cursor is.
const SCREENS: [(&str, &str, [u32; 2]); 19] = [
    ("ab\r\ncd", "ab\ncd", [1, 2]),
    ("0123456789x", "0123456789\nx", [1, 1]),
    ("0123456789\r\nx", "0123456789\nx", [1, 1]),
    ("1\r\n2\r\n3\r\n4\r\n5", "2\n3\n4\n5", [3, 1]),
    ("abc\x1b[2D\x1b[K", "a", [0, 1]),
    ("abc\x08\x08X", "aXc", [0, 2]),
    ("\x1b[3;4Hx\x1b[Hy", "y\n\n   x", [0, 1]),
    ("ab\x1b[?1049hcd\x1b[?1049le", "abe", [0, 3]),
    ("abcd\x1b[2G\x1b[2@xy", "axybcd", [0, 3]),
    ("abcd\x1b[2G\x1b[2P", "ad", [0, 1]),
    ("1\r\n2\r\n3\r\n4\x1b[2;3r\x1b[3;1H\n5", "1\n3\n5\n4", [2, 1]),
    ("1\r\n2\x1b[H\x1bM0", "0\n1\n2", [0, 1]),
    ("\x1b]0;title\x07a\x1b]2;b\x1b\\b\x1bPq#0\x1b\\c", "abc", [0, 3]),
    ("a\tb", "a       b", [0, 9]),
    ("\x1b(0qqx\x1b(Bq", "──│q", [0, 4]),
    ("a日b", "a日b", [0, 4]),
    ("123456789日", "123456789\n日", [1, 2]),
    ("e\u{301}x", "e\u{301}x", [0, 2]),
    ("x\x1b[99;99H\x1b[999Ay\x1b[?25l\x1b[?9999h\x1b[38;5;300mz\x1b[;;;m", "x        y\nz", [1, 1]),
];

async fn screens() -> Outcome {
    let guest = LocalGuest::start().await?;
    let mut page = Browser::start().await?;
    page.open(&format!("{}/ui", guest.url)).await?;
    let shown = "const shown = async (text, cut) => {
        const { Screen } = await import('/ui/screen.js');
        const screen = new Screen(10, 4);
        for (let i = 0; i < text.length; i += cut) screen.write(text.slice(i, i + cut));
        return [screen.text(), screen.cursor.row, screen.cursor.col];
    }; window.shown = shown;";
    page.value(shown).await?;
    for (written, text, cursor) in SCREENS {
        // In one piece, and in pieces that divide every sequence.
        for cut in [1000, 1] {
            let got = page.value(&format!("shown({}, {cut})", json!(written))).await?;
            assert_eq!(got, json!([text, cursor[0], cursor[1]]), "{written:?} in pieces of {cut}");
        }
    }
    // Whatever is written, nothing breaks, and the screen keeps its size.
    let noise = "(async () => {
        const { Screen } = await import('/ui/screen.js');
        let seed = 1;
        const random = (n) => { seed = (seed * 1103515245 + 12345) % 2147483648; return Math.floor(seed / 65536) % n; };
        const parts = ['\\x1b[', '\\x1b]', '\\x1b', '?', ';', ':', 'm', 'H', 'J', 'K', 'L', 'M', 'P', '@', 'X', 'r', 'h', 'l', '1049', '日', 'é', '\\u0301',
            'a', '\\r', '\\n', '\\t', '\\x08', '\\x07', '65535', '0', '2', '7', '8', '(0', 'b', 'S', 'T', 'c', '!p', '\\x18'];
        const screen = new Screen(13, 5);
        for (let i = 0; i < 60000; i++) {
            screen.write(parts[random(parts.length)]);
            if (i % 500 === 0) screen.resize(5 + random(40), 2 + random(20));
            const { row, col } = screen.cursor;
            const right = screen.lines.length === screen.rows && screen.lines.every((line) => line.length === screen.cols && line.every(Boolean))
                && row >= 0 && row < screen.rows && col >= 0 && col < screen.cols;
            if (!right) return [i, screen.cols, screen.rows, screen.lines.map((line) => line.length), row, col];
        }
        return true;
    })()";
    assert_eq!(page.value(noise).await?, Value::Bool(true));
    // Keys.
    let keys = "(async () => {
        const { typed } = await import('/ui/terminal.js');
        const key = (key, modifiers = {}) => typed({ key, ctrlKey: false, altKey: false, shiftKey: false, metaKey: false, ...modifiers }, false);
        return [key('a'), key('c', { ctrlKey: true }), key('ArrowUp'), key('ArrowUp', { ctrlKey: true }), key('Delete'), key('F1'), key('Tab', { shiftKey: true }),
            key('x', { altKey: true }), key('@', { ctrlKey: true, altKey: true }), key(' ', { ctrlKey: true }), key('Backspace'), key('Shift'), key('v', { metaKey: true })];
    })()";
    let typed = json!([
        "a",
        "\x03",
        "\x1b[A",
        "\x1b[1;5A",
        "\x1b[3~",
        "\x1bOP",
        "\x1b[Z",
        "\x1bx",
        "@",
        "\0",
        "\x7f",
        null,
        null
    ]);
    assert_eq!(page.value(keys).await?, typed);
    Ok(())
}
