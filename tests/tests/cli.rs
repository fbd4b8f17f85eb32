//! The verbs of the command line, as programs: with pulse guests, with an agent of this machine for a guest, and in a Debian guest.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use http::Method;
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use serde_json::{Value, json};
use stasis_api::dev::{Fault, Rule};
use stasis_tests::guest::{self, LocalGuest, SANDBOX};
use stasis_tests::host;
use stasis_tests::service::{Options, Service};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::{Error, no_pulse};

/// For a program to say something: the machine may be busy.
const PATIENCE: Duration = Duration::from_mins(3);

fn no_debian() -> Option<String> {
    let images = host::built("images/templates/debian-bookworm/template.json");
    host::no_linux_guest().or_else(|| host::missing(&images, "guest-images/linux/build makes it"))
}

fn main() {
    Suite::default()
        .test("the_console_is_read_and_followed", no_pulse(), logs)
        .test("each_log_line_of_a_request_has_its_id_and_its_sandbox", no_pulse(), log_lines)
        .test("snapshots_urls_and_costs_have_verbs", no_pulse(), verbs)
        .test("colours_and_bars_are_for_those_who_watch", no_pulse(), watched)
        .test("completions_know_every_verb", None, completions)
        .test("commands_have_users_limits_and_exit_codes", guest::lacking(), commands)
        .test("a_command_on_a_terminal_has_keys_a_size_and_an_exit_code", guest::lacking(), on_a_terminal)
        .test("files_and_directories_are_copied_both_ways", guest::lacking(), copies)
        .test("files_git_and_terminals_of_a_sandbox_have_verbs", guest::lacking(), in_a_guest)
        .test("a_debian_guest_is_used_from_the_command_line", no_debian(), debian)
        .main();
}

/// `stasis` for this supervisor.
#[expect(clippy::disallowed_methods, reason = "a program run as a user runs it")]
fn program(url: &str, key: &str) -> Command {
    let mut command = Command::new(host::program("stasis"));
    command.env("STASIS_URL", url).env("STASIS_API_KEY", key).stdin(Stdio::null());
    command
}

async fn run<A: AsRef<OsStr>>(url: &str, key: &str, arguments: &[A]) -> Result<Output, Error> {
    let mut command = program(url, key);
    command.args(arguments);
    Ok(tokio::task::spawn_blocking(move || command.output()).await??)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or(-1)
}

fn json_of(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
}

async fn logs() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let id = service.create_pulse().await?;
    let stasis = async |arguments: &[&str]| run(&service.url, &service.key, arguments).await;
    let once = stasis(&["logs", &id]).await?;
    assert_eq!(code(&once), 0, "{}", text(&once.stderr));
    assert!(text(&once.stdout).contains('R'), "{}", text(&once.stdout));

    let mut command = program(&service.url, &service.key);
    let mut following = command.args(["logs", "-f", &id]).stdout(Stdio::piped()).spawn()?;
    let mut stdout = following.stdout.take().ok_or("no output")?;
    let more = once.stdout.len() + 4;
    let (mut stdout, seen) = tokio::task::spawn_blocking(move || {
        let mut seen = vec![0; more];
        stdout.read_exact(&mut seen).map(|()| (stdout, seen))
    })
    .await??;
    assert!(seen.starts_with(&once.stdout), "what was there comes first");
    // The end of the VM is the end.
    service.pause(&id).await?.expect(201)?;
    let status = tokio::task::spawn_blocking(move || {
        std::io::copy(&mut stdout, &mut std::io::sink())?;
        following.wait()
    });
    assert!(tokio::time::timeout(PATIENCE, status).await???.success());

    let asleep = stasis(&["logs", &id]).await?;
    assert_eq!(code(&asleep), 4);
    assert!(text(&asleep.stderr).contains("paused"), "{}", text(&asleep.stderr));
    assert_eq!(code(&stasis(&["logs", "sbx-none00000000000000000"]).await?), 3);
    service.call("GET", &format!("/v1/sandbox/{id}/console?follow=x"), None).await?.expect(400)?;
    Ok(())
}

async fn log_lines() -> Outcome {
    let mut options = Options::default();
    options.environment.push(("STASIS_LOG_JSON".to_owned(), "1".to_owned()));
    let service = Service::start(options).await?;
    let id = service.create_pulse().await?;
    let url = format!("{}/v1/sandbox/{id}/pause", service.url);
    let answer = reqwest::Client::new().post(url).bearer_auth(&service.key).send().await?;
    assert_eq!(answer.status(), 201);
    let request = answer.headers()["x-request-id"].to_str()?.to_owned();
    let lines: Vec<Value> = service.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let of_request: Vec<_> = lines.iter().filter(|line| line["span"]["request"] == request.as_str()).collect();
    assert!(of_request.iter().all(|line| line["span"]["sandbox"] == id.as_str()), "{of_request:?}");
    // What the operation did, in a task of its own, and the request itself.
    for message in ["state", "request"] {
        assert!(of_request.iter().any(|line| line["fields"]["message"] == message), "{message}: {of_request:?}");
    }
    let paused = lines.iter().filter(|line| line["fields"]["after"] == "paused").collect::<Vec<_>>();
    assert!(paused.iter().all(|line| line["span"]["request"] == request.as_str()) && paused.len() == 1, "{paused:?}");
    Ok(())
}

async fn verbs() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let id = service.create_pulse().await?;
    let stasis = async |arguments: &[&str]| run(&service.url, &service.key, arguments).await;
    let ok = async |arguments: &[&str]| {
        let done = stasis(arguments).await?;
        if code(&done) == 0 { Ok(done) } else { Err(Error::from(format!("{arguments:?}: {}", text(&done.stderr)))) }
    };
    let made = ok(&["snapshot", "create", &id, "--name", "first"]).await?;
    assert!(text(&made.stdout).contains("first") && text(&made.stderr).contains("upload"), "{}", text(&made.stderr));
    assert_eq!(code(&stasis(&["snapshot", "create", &id, "--name", "first"]).await?), 4, "the name is taken");
    let sorted = json_of(&ok(&["--json", "ls", "--sort", "state", "--order-by", "asc", "--state", "running"]).await?);
    assert_eq!((&sorted["total_items"], &sorted["items"][0]["id"]), (&json!(1), &json!(id)));
    assert_eq!(code(&stasis(&["ls", "--sort", "colour"]).await?), 2);
    let list = json_of(&ok(&["--json", "snapshot", "ls", "--name", "fir"]).await?);
    assert_eq!((list["total_items"].as_u64(), &list["items"][0]["name"]), (Some(1), &json!("first")));
    assert!(text(&ok(&["snapshot", "ls"]).await?.stdout).contains("first"));
    let copy = json_of(&ok(&["--json", "snapshot", "restore", "first", "--timeout", "900"]).await?);
    let copied = copy["id"].as_str().unwrap_or_default().to_owned();
    assert_eq!((&copy["state"], &copy["timeout"]), (&json!("running"), &json!(900)));
    let snapshot = list["items"][0]["id"].as_str().unwrap_or_default();
    assert_eq!(code(&stasis(&["snapshot", "rm", snapshot]).await?), 4, "it is in use");
    ok(&["rm", &copied]).await?;
    ok(&["snapshot", "rm", snapshot]).await?;
    assert_eq!(code(&stasis(&["snapshot", "restore", "first"]).await?), 3);

    let url = json_of(&ok(&["--json", "url", "create", &id, "8080", "--expires-in", "5m"]).await?);
    assert!(url["url"].as_str().is_some_and(|u| u.starts_with("http")) && url["port"] == 8080, "{url}");
    let name = url["id"].as_str().unwrap_or_default();
    ok(&["url", "rm", &id, name]).await?;
    assert_eq!(code(&stasis(&["url", "rm", &id, name]).await?), 3);
    let shown = ok(&["url", "create", &id, "80"]).await?;
    assert_eq!(text(&shown.stdout).lines().count(), 1, "the answer is the URL alone");
    assert_eq!(code(&stasis(&["url", "create", &id, "0"]).await?), 2);

    // Nobody watches: no bar, no colour.
    let paused = ok(&["pause", &id]).await?;
    assert!(!text(&paused.stdout).contains('\x1b') && !text(&paused.stderr).contains('\x1b'));
    ok(&["resume", &id]).await?;
    let top = text(&ok(&["top", "--once"]).await?.stdout);
    let row = top.lines().find(|line| line.contains(&id)).ok_or("it is not in the table")?;
    assert!(row.contains("running") && row.contains("32 MiB") && row.matches(" ms").count() == 2, "{top}");
    let live = json_of(&ok(&["--json", "top"]).await?);
    let kinds: Vec<_> = live["items"][0]["operations"].as_array().into_iter().flatten().collect();
    let kinds: Vec<_> = kinds.iter().filter_map(|o| o["operation"].as_str()).collect();
    assert_eq!(kinds, ["create", "snapshot", "pause", "resume"]);
    Ok(())
}

async fn watched() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let id = service.create_pulse().await?;
    let start = |arguments: &[&str], colourless: bool| {
        let mut command = program(&service.url, &service.key);
        command.args(arguments).env("TERM", "xterm").env_remove("NO_COLOR");
        if colourless {
            command.env("NO_COLOR", "1");
        }
        OnTerminal::start(command, size(120, 24))
    };
    let shown = async |arguments: &[&str], colourless: bool| start(arguments, colourless)?.exit_code().await;
    for (arguments, what) in
        [(["ls", "--page", "1"], "a head in bold"), (["get", "sbx-none", "--json"], "an error in red")]
    {
        let (_, said) = shown(&arguments, false).await?;
        assert!(said.contains("\x1b["), "{what}: {said:?}");
        let (_, said) = shown(&arguments, true).await?;
        assert!(!said.contains('\x1b'), "{what}: {said:?}");
    }
    // The bar of a pause that takes its time.
    for colourless in [false, true] {
        service.proxy.add(Rule::once(Method::PUT, "/head", Fault::Hold));
        let mut pause = start(&["pause", &id], colourless)?;
        if colourless {
            service.await_held().await?;
        } else {
            tokio::task::block_in_place(|| pause.shows("committing"))?;
        }
        service.proxy.release();
        let (code, said) = pause.exit_code().await?;
        assert!(code == 0 && (!colourless || !said.contains("commit")), "{code} {said:?}");
        service.resume(&id).await?.expect(200)?;
    }
    Ok(())
}

async fn completions() -> Outcome {
    let help = run("http://127.0.0.1:1", "k", &["--help"]).await?;
    let listing = text(&help.stdout);
    let (_, commands) = listing.split_once("Commands:\n").ok_or("no commands in the help")?;
    let verbs: Vec<_> =
        commands.lines().take_while(|l| !l.is_empty()).filter_map(|l| l.split_whitespace().next()).collect();
    assert!(verbs.len() > 20 && verbs.contains(&"cp"), "{verbs:?}");
    for shell in ["bash", "zsh", "fish"] {
        let script = run("http://127.0.0.1:1", "k", &["completion", shell]).await?;
        let script = text(&script.stdout);
        let missing: Vec<_> = verbs.iter().filter(|verb| !script.contains(**verb)).collect();
        assert!(missing.is_empty(), "{shell}: {missing:?}");
    }
    assert_eq!(code(&run("http://127.0.0.1:1", "k", &["completion", "tcl"]).await?), 2);
    Ok(())
}

async fn commands() -> Outcome {
    let guest = LocalGuest::start().await?;
    let stasis = async |arguments: &[&str]| run(&guest.url, &guest.key, arguments).await;
    let done =
        stasis(&["exec", "--user", "1234", "--cwd", "/usr", "-e", "A=b c", SANDBOX, "id -u; pwd; echo $A; exit 7"])
            .await?;
    assert_eq!((code(&done), text(&done.stdout).as_str()), (7, "1234\n/usr\nb c\n"), "{}", text(&done.stderr));
    let late = stasis(&["exec", "--timeout", "1", SANDBOX, "sleep 60"]).await?;
    assert_eq!(code(&late), 124);
    assert!(text(&late.stderr).contains("time limit"));
    assert_eq!(code(&stasis(&["exec", "--user", "no-such-user", SANDBOX, "true"]).await?), 2);
    for arguments in [&["exec", "-it", SANDBOX][..], &["exec", "-i", SANDBOX, "cat"], &["exec", SANDBOX]] {
        assert_eq!(code(&stasis(arguments).await?), 2, "{arguments:?}");
    }
    Ok(())
}

/// A program on a terminal of ours.
struct OnTerminal {
    ours: File,
    child: std::process::Child,
    seen: std::sync::mpsc::Receiver<Vec<u8>>,
    text: String,
}

impl OnTerminal {
    fn start(mut command: Command, size: Winsize) -> Result<Self, Error> {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&ours)?;
        unlockpt(&ours)?;
        tcsetwinsize(&ours, size)?;
        let theirs = ioctl_tiocgptpeer(&ours, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        let copy = || theirs.try_clone().map(Stdio::from);
        let child = command.stdin(copy()?).stdout(copy()?).stderr(copy()?).spawn()?;
        let ours = File::from(ours);
        let mut reader = ours.try_clone()?;
        let (tell, seen) = std::sync::mpsc::sync_channel(1024);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len) = reader.read(&mut buffer) {
                if len == 0 || tell.send(buffer[..len].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { ours, child, seen, text: String::new() })
    }

    fn keys(&mut self, text: &str) -> Result<(), Error> {
        Ok(self.ours.write_all(text.as_bytes())?)
    }

    /// Waits until it has shown `text` after what was waited for before.
    fn shows(&mut self, text: &str) -> Result<(), Error> {
        let begun = Instant::now();
        loop {
            if let Some(at) = self.text.find(text) {
                self.text.drain(..at + text.len());
                return Ok(());
            }
            let left = PATIENCE.saturating_sub(begun.elapsed());
            // The supervisor's store is served by this runtime: it must not stand still meanwhile.
            match tokio::task::block_in_place(|| self.seen.recv_timeout(left)) {
                Ok(bytes) => self.text.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => return Err(format!("{text:?} is not shown, but {:?}", self.text).into()),
            }
        }
    }

    fn resize(&self, size: Winsize) -> Result<(), Error> {
        tcsetwinsize(&self.ours, size)?;
        // It is nobody's controlling terminal, so the kernel tells nobody.
        let pid = Pid::from_raw(i32::try_from(self.child.id())?).ok_or("no process id")?;
        Ok(kill_process(pid, Signal::WINCH)?)
    }

    fn is_raw(&self) -> Result<bool, Error> {
        Ok(!tcgetattr(&self.ours)?.local_modes.contains(LocalModes::ICANON))
    }

    async fn exit_code(mut self) -> Result<(i32, String), Error> {
        let ended = tokio::task::spawn_blocking(move || {
            let status = self.child.wait()?;
            while let Ok(bytes) = self.seen.recv_timeout(Duration::from_millis(200)) {
                self.text.push_str(&String::from_utf8_lossy(&bytes));
            }
            let raw = self.is_raw();
            Ok::<_, Error>((status.code().unwrap_or(-1), raw?, self.text))
        });
        let (code, raw, text) = tokio::time::timeout(PATIENCE, ended).await???;
        if raw { Err("the terminal is left raw".into()) } else { Ok((code, text)) }
    }
}

fn size(cols: u16, rows: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 }
}

async fn on_a_terminal() -> Outcome {
    let guest = LocalGuest::start().await?;
    interactive(&guest.url, &guest.key, SANDBOX).await?;
    // Nothing of it is left in the sandbox.
    let (status, left) = guest.call(&guest.key, "GET", &format!("/v1/sandbox/{SANDBOX}/pty"), "").await?;
    assert_eq!((status, left), (200, json!({ "items": [] })));
    Ok(())
}

async fn interactive(url: &str, key: &str, id: &str) -> Result<(), Error> {
    let start = |arguments: &[&str]| {
        let mut command = program(url, key);
        command.args(arguments).env("TERM", "vt100");
        OnTerminal::start(command, size(91, 17))
    };
    let mut command = start(&[
        "exec",
        "-it",
        "-e",
        "A=b",
        "--cwd",
        "/usr",
        id,
        "stty size; echo $TERM:$A:$PWD; read -r line; echo \"got $line\"; until stty size | grep '^30 100'; do sleep 0.1; done; exit 7",
    ])?;
    command.shows("17 91")?;
    command.shows("vt100:b:/usr")?;
    assert!(command.is_raw()?);
    command.keys("a key\r")?;
    command.shows("got a key")?;
    command.resize(size(100, 30))?;
    command.shows("30 100")?;
    assert_eq!(command.exit_code().await?.0, 7);

    // A shell, in which Ctrl-C ends what runs in front and not us.
    let mut shell = start(&["exec", "-it", id])?;
    // What is typed before it listens may be lost with the Ctrl-C.
    shell.keys("echo rea''dy\r")?;
    shell.shows("ready")?;
    // Said by what the Ctrl-C is for: while the shell starts it, the shell itself would get it.
    shell.keys("sh -c 'echo sle\"\"eping; exec sleep 600'\r")?;
    shell.shows("sleeping")?;
    shell.keys("\x03")?;
    shell.keys("echo ba''ck\r")?;
    shell.shows("back")?;
    shell.keys("kill -TERM $$; exit 3\r")?;
    assert_eq!(shell.exit_code().await?.0, 3);

    let mut killed = start(&["exec", "-t", id, "echo be''gun; sleep 600"])?;
    killed.shows("begun")?;
    let pid = Pid::from_raw(i32::try_from(killed.child.id())?).ok_or("no process id")?;
    kill_process(pid, Signal::TERM)?;
    assert_eq!(killed.exit_code().await?.0, 130);

    let wrong = start(&["exec", "-it", "--user", "no-such-user", id])?;
    let (code, said) = wrong.exit_code().await?;
    assert!(code == 2 && said.contains("no-such-user"), "{code} {said}");
    Ok(())
}

async fn in_a_guest() -> Outcome {
    let guest = LocalGuest::start().await?;
    let there = guest.scratch().display().to_string();
    let at = |name: &str| format!("{there}/{name}");
    let stasis = async |arguments: &[&str]| run(&guest.url, &guest.key, arguments).await;
    let said = async |arguments: &[&str]| {
        let done = stasis(arguments).await?;
        if code(&done) == 0 {
            Ok(text(&done.stdout))
        } else {
            Err(Error::from(format!("{arguments:?}: {} {}", code(&done), text(&done.stderr))))
        }
    };
    assert_eq!(said(&["fs", "mkdir", "-p", SANDBOX, &at("a/b")]).await?, "");
    std::fs::write(at("a/one"), "first\nsecond\nthird\n")?;
    std::os::unix::fs::symlink("one", at("a/link"))?;
    let listed = said(&["fs", "ls", SANDBOX, &at("a")]).await?;
    assert!(listed.contains("a/b/") && listed.contains("link -> one"), "{listed}");
    assert_eq!(json_of(&stasis(&["--json", "fs", "stat", SANDBOX, &at("a/one")]).await?)["size"], 19);
    assert_eq!(said(&["fs", "cat", SANDBOX, &at("a/one"), "--tail", "1"]).await?, "third\n");
    assert_eq!(said(&["fs", "grep", SANDBOX, "cond", &at("a")]).await?, format!("{}:2:second\n", at("a/one")));
    assert!(said(&["fs", "glob", SANDBOX, &there, "**/one"]).await?.contains("a/one"));
    assert!(said(&["fs", "tree", SANDBOX, &there]).await?.contains("  one\n"));
    said(&["fs", "edit", SANDBOX, "second", "2nd", &at("a/one")]).await?;
    assert_eq!(code(&stasis(&["fs", "edit", SANDBOX, "second", "2nd", &at("a/one")]).await?), 2, "it is there no more");
    said(&["fs", "copy", SANDBOX, &at("a/one"), &at("two")]).await?;
    assert_eq!(code(&stasis(&["fs", "mv", SANDBOX, &at("a/one"), &at("two")]).await?), 4, "something is there");
    said(&["fs", "mv", SANDBOX, &at("a/one"), &at("two"), "--overwrite"]).await?;
    said(&["fs", "chmod", SANDBOX, &at("two"), "--mode", "600"]).await?;
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(at("two"))?.permissions());
    assert_eq!((std::fs::read_to_string(at("two"))?.as_str(), mode & 0o777), ("first\n2nd\nthird\n", 0o600));
    for (name, there, status) in [("two", "yes\n", 0), ("a/one", "no\n", 3)] {
        let asked = stasis(&["fs", "exists", SANDBOX, &at(name)]).await?;
        assert_eq!((text(&asked.stdout).as_str(), code(&asked)), (there, status), "{name}");
    }
    said(&["fs", "rm", "-r", SANDBOX, &at("a")]).await?;
    assert_eq!(code(&stasis(&["fs", "rm", SANDBOX, &at("a")]).await?), 3);
    assert!(said(&["fs", "home", SANDBOX]).await?.starts_with('/'));
    assert!(said(&["fs", "home", SANDBOX, "--working"]).await?.starts_with('/'));

    let repository = at("repository");
    said(&["exec", SANDBOX, &format!("git init -q {repository} && echo hello > {repository}/file")]).await?;
    assert!(said(&["git", "status", SANDBOX, &repository]).await?.contains("? file"));
    said(&["git", "add", SANDBOX, &repository, "file"]).await?;
    assert!(said(&["git", "diff", SANDBOX, &repository, "--staged"]).await?.contains("+hello"));
    let who = ["--author", "Ann", "--email", "ann@example.com"];
    said(&[&["git", "commit", SANDBOX, &repository, "-m", "why"][..], &who].concat()).await?;
    assert!(said(&["git", "log", SANDBOX, &repository]).await?.contains("why"));
    assert!(said(&["git", "branches", SANDBOX, &repository]).await?.lines().count() == 1);
    let failed = stasis(&["git", "show", SANDBOX, &repository, "no-such-revision"]).await?;
    assert_eq!(code(&failed), 128, "git's own: {}", text(&failed.stdout));

    let session = said(&["pty", "create", SANDBOX]).await?.trim().to_owned();
    assert!(said(&["pty", "ls", SANDBOX]).await?.contains(&session));
    assert_eq!(code(&stasis(&["pty", "attach", SANDBOX, &session]).await?), 2, "there is no terminal here");
    let mut command = program(&guest.url, &guest.key);
    command.args(["pty", "attach", SANDBOX, &session]);
    let mut shell = OnTerminal::start(command, size(80, 24))?;
    shell.keys("echo rea''dy; exit 5\r")?;
    shell.shows("ready")?;
    assert_eq!(shell.exit_code().await?.0, 5);
    let session = said(&["pty", "create", SANDBOX, "--cwd", "/usr"]).await?.trim().to_owned();
    said(&["pty", "rm", SANDBOX, &session]).await?;
    assert_eq!(code(&stasis(&["pty", "rm", SANDBOX, &session]).await?), 3);
    Ok(())
}

async fn copies() -> Outcome {
    let guest = LocalGuest::start().await?;
    let there = guest.scratch();
    copy_both_ways(&guest.url, &guest.key, SANDBOX, &there.to_string_lossy(), guest.dir.path()).await?;
    // The guest is this machine: what arrived is looked at itself.
    assert_eq!(std::fs::read(there.join("tree/sub/b"))?, [7; 3000]);
    assert_eq!(std::fs::read_link(there.join("tree/link"))?, Path::new("sub/b"));
    let mut left = std::fs::read_dir("/tmp")?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    assert!(!left.any(|name| name.starts_with(".stasis-cp-")), "an archive is left");
    Ok(())
}

async fn copy_both_ways(url: &str, key: &str, id: &str, there: &str, dir: &Path) -> Result<(), Error> {
    let here = dir.join("here");
    std::fs::create_dir_all(here.join("tree/sub"))?;
    std::fs::write(here.join("tree/a"), "alpha")?;
    std::fs::write(here.join("tree/sub/b"), [7; 3000])?;
    std::os::unix::fs::symlink("sub/b", here.join("tree/link"))?;
    std::fs::set_permissions(here.join("tree/a"), std::os::unix::fs::PermissionsExt::from_mode(0o750))?;
    let local = |name: &str| here.join(name).display().to_string();
    let remote = |name: &str| format!("{id}:{there}/{name}");
    let copy = async |from: String, to: String| {
        let done = run(url, key, &["cp".to_owned(), from.clone(), to.clone()]).await?;
        if code(&done) == 0 { Ok(()) } else { Err(Error::from(format!("cp {from} {to}: {}", text(&done.stderr)))) }
    };
    copy(local("tree/a"), remote("file")).await?;
    copy(remote("file"), local("file")).await?;
    assert_eq!(std::fs::read(here.join("file"))?, b"alpha");
    let shown = run(url, key, &["cp", &remote("file"), "-"]).await?;
    assert_eq!((code(&shown), shown.stdout.as_slice()), (0, b"alpha".as_slice()));
    let mode = run(url, key, &["exec", id, &format!("stat -c %a {there}/file")]).await?;
    assert_eq!(text(&mode.stdout), "750\n");

    let mut piped = program(url, key);
    let mut piped = piped.args(["cp", "-", &remote("piped")]).stdin(Stdio::piped()).spawn()?;
    piped.stdin.take().ok_or("no input")?.write_all(b"through a pipe")?;
    assert!(tokio::task::spawn_blocking(move || piped.wait()).await??.success());
    copy(remote("piped"), local("")).await?;
    assert_eq!(std::fs::read(here.join("piped"))?, b"through a pipe");

    copy(local("tree"), remote("")).await?;
    copy(remote("tree"), local("back")).await?;
    assert_eq!(std::fs::read(here.join("back/a"))?, b"alpha");
    assert_eq!(std::fs::read(here.join("back/sub/b"))?, [7; 3000]);
    assert_eq!(std::fs::read_link(here.join("back/link"))?, Path::new("sub/b"));

    let failing =
        async |from: String, to: String| Ok::<_, Error>(code(&run(url, key, &["cp".to_owned(), from, to]).await?));
    assert_eq!(failing(remote("none"), local("none")).await?, 3);
    assert!(!here.join("none").exists() && !here.join("none.part").exists());
    assert_eq!(failing(local("none"), remote("none")).await?, 1);
    assert_eq!(failing(local("a"), local("b")).await?, 2);
    Ok(())
}

async fn debian() -> Outcome {
    let environment = [("STASIS_DEADLINES_BOOT_MS", "300000"), ("STASIS_DEADLINES_WAKE_MS", "60000")];
    let environment = environment.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec();
    let service = Service::start(Options { images: Some(host::built("images")), environment }).await?;
    let body = json!({ "template_name": "system/debian:bookworm", "memory": 512, "vcpu": 2, "timeout": 3600 });
    let id = service.call("POST", "/v1/sandbox", Some(body)).await?.expect(201)?.text("id");
    // Each wakes it.
    service.pause(&id).await?.expect(201)?;
    interactive(&service.url, &service.key, &id).await?;
    service.pause(&id).await?.expect(201)?;
    copy_both_ways(&service.url, &service.key, &id, "/root", service.dir.path()).await?;
    // A terminal is cut off by a pause, and says so.
    let mut command = program(&service.url, &service.key);
    command.args(["exec", "-it", &id, "echo be''gun; sleep 600"]);
    let mut terminal = OnTerminal::start(command, size(80, 24))?;
    terminal.shows("begun")?;
    service.pause(&id).await?.expect(201)?;
    let (code, said) = terminal.exit_code().await?;
    assert!(code == 4 && said.contains("does not run any more"), "{code} {said}");
    Ok(())
}
