//! Printing. A reader that goes away (`stasis ls | head -1`) is no error. Colour only on a terminal, and not under `NO_COLOR` or `TERM=dumb`.

use serde_json::Value;
use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::AsFd as _;

/// How answers are printed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Output {
    /// As JSON.
    pub(super) json: bool,
    colour: bool,
}

impl Output {
    pub(super) fn new(json: bool) -> Self {
        Self { json, colour: colour_on(io::stdout().is_terminal()) }
    }

    /// One JSON value on one line.
    pub(super) fn value(value: &Value) {
        line(&value.to_string());
    }

    /// A table: the first row is the head.
    pub(super) fn table(self, rows: &[Vec<String>]) {
        self.rendered(rows).iter().for_each(|text| line(text));
    }

    /// Its lines.
    pub(super) fn rendered(self, rows: &[Vec<String>]) -> Vec<String> {
        let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
        let widths = (0..columns)
            .map(|i| rows.iter().filter_map(|row| row.get(i)).map(|cell| cell.chars().count()).max().unwrap_or(0))
            .collect::<Vec<_>>();
        let mut lines = Vec::with_capacity(rows.len());
        for (n, row) in rows.iter().enumerate() {
            let mut text = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                let pad = width - cell.chars().count();
                text.push_str(cell);
                text.push_str(&" ".repeat(pad + 2));
            }
            let text = text.trim_end();
            lines.push(if n == 0 { self.bold(text) } else { text.to_owned() });
        }
        lines
    }

    pub(super) fn bold(self, text: &str) -> String {
        if self.colour { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// A line of the answer.
pub(super) fn line(text: &str) {
    raw(format!("{text}\n").as_bytes(), false);
}

/// Octets of the answer, or of the narration.
pub(super) fn raw(bytes: &[u8], narration: bool) {
    let written = if narration {
        io::stderr().write_all(bytes)
    } else {
        io::stdout().write_all(bytes).and_then(|()| io::stdout().flush())
    };
    match written {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe && !narration => std::process::exit(0),
        // There is nobody left to tell.
        _ => {}
    }
}

/// Standard input, read by a thread that may wait for ever: whoever uses it ends the process itself.
pub(super) fn input() -> Result<tokio::fs::File, super::Failure> {
    let stdin = io::stdin().as_fd().try_clone_to_owned();
    let stdin = stdin.map_err(|e| super::Failure::other(format!("cannot read standard input: {e}")))?;
    Ok(std::fs::File::from(stdin).into())
}

/// A line of narration.
pub(super) fn tell(text: &str) {
    raw(format!("{text}\n").as_bytes(), true);
}

/// What an operation cost, as the `server-timing` header says it.
pub(super) fn timing(header: Option<&str>) {
    if let Some(timing) = header {
        tell(&format!("timing (ms): {}", timing.replace(";dur=", " ").replace(";desc=", " ").replace('"', "")));
    }
}

/// That a page is not the last one.
pub(super) fn more(shown: usize, total: &Value, page: u32) {
    let total = total.as_u64().unwrap_or(0);
    if total > shown as u64 {
        tell(&format!("{shown} of {total}; --page {} shows more", page + 1));
    }
}

/// An error.
pub(super) fn complain(text: &str) {
    let (on, off) = if colour_on(io::stderr().is_terminal()) { ("\x1b[31m", "\x1b[0m") } else { ("", "") };
    tell(&format!("{on}stasis: {off}{text}"));
}

/// Something may move on standard error.
pub(super) fn moves() -> bool {
    colour_on(io::stderr().is_terminal())
}

fn colour_on(terminal: bool) -> bool {
    terminal
        && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
        && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Bytes for people.
pub(super) fn bytes(n: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let n_f = n as f64;
    match n {
        0..1024 => format!("{n} B"),
        1024..1_048_576 => format!("{:.1} KiB", n_f / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", n_f / 1_048_576.0),
        _ => format!("{:.2} GiB", n_f / 1_073_741_824.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_rounded_for_people() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(5 << 20), "5.0 MiB");
        assert_eq!(bytes(3 << 30), "3.00 GiB");
    }
}
