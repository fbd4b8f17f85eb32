//! What a VMM that a guest has taken over completely can reach: nothing. A program in the VMM's place, started by the real warden behind the
//! same walls, tries; each attempt fails. And what a thread of the VMM may not ask of the kernel ends it, in each of its roles.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use stasis_tests::host;
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::{Error, until};
use stasis_vmm::control::types::{EXIT_SECCOMP, ExitNote};
use stasis_vmm::seccomp::Role;
use stasis_warden::client::Client;
use stasis_warden::jail::Users;
use stasis_warden::jail::limits::Size;
use stasis_warden::jail::start::{End, ProcessNote, start};
use stasis_warden::protocol::{Program, Reply, Request, StartRequest};

fn main() {
    Suite::default()
        .test("nothing_is_in_reach_of_a_jailed_program", not_root(), nothing_in_reach)
        .test("nothing_is_in_reach_of_a_jailed_unpacker", not_root(), nothing_in_reach_of_an_unpacker)
        .test("two_jailed_programs_are_two_users", not_root(), two_users)
        .test("memory_beyond_the_limit_ends_the_process", not_root(), memory_limit)
        .test("processor_time_beyond_the_limit_is_not_had", not_root(), processor_limit)
        .test("the_warden_kills_its_own_and_nobody_else", not_root(), kills_its_own)
        .test("a_call_that_a_role_does_not_have_ends_the_process", None, roles)
        .test("what_a_jail_costs", not_root(), cost)
        .main();
}

fn not_root() -> Option<String> {
    (!rustix::process::geteuid().is_root()).then(|| "a warden needs root".to_owned())
}

/// A warden of our own, with the intruder in the VMM's place, and in the dialler's. It ends by itself when the test has.
struct Warden {
    client: Client,
    process: stasis_warden::jail::start::Process,
    dir: tempfile::TempDir,
}

impl Drop for Warden {
    fn drop(&mut self) {
        let _ = rustix::process::pidfd_send_signal(&self.process.pidfd, rustix::process::Signal::KILL);
        let _ = rustix::process::waitid(
            rustix::process::WaitId::PidFd(self.process.pidfd.as_fd()),
            rustix::process::WaitIdOptions::EXITED,
        );
    }
}

fn c(text: impl Into<Vec<u8>>) -> Result<std::ffi::CString, Error> {
    Ok(std::ffi::CString::new(text)?)
}

impl Warden {
    async fn start() -> Result<Self, Error> {
        let dir = host::scratch()?;
        let at = |name: &str| dir.path().join(name).display().to_string();
        let program = |name: &str| host::program(name).display().to_string();
        let mut arguments = Vec::new();
        for (flag, value) in [
            ("--socket", at("w.sock")),
            ("--vmm", program("stasis-intruder")),
            ("--dialler", program("stasis-intruder")),
            ("--unpacker", program("stasis-intruder")),
            ("--trees", at("trees")),
        ] {
            arguments.extend([c(flag)?, c(value)?]);
        }
        let command = stasis_warden::jail::Command {
            program: c(program("stasis-warden"))?,
            arguments,
            environment: Vec::new(),
            log: File::create(dir.path().join("warden.log"))?.into(),
            descriptors: Vec::new(),
            note: File::create(dir.path().join("warden.json"))?,
        };
        let process = start(&command, None)?;
        let client = Client::new(&dir.path().join("w.sock"));
        let warden = Self { client, process, dir };
        let answers = until("the warden", || Ok(warden.client.hello().ok())).await;
        if answers.is_err() {
            return Err(std::fs::read_to_string(warden.dir.path().join("warden.log"))?.into());
        }
        Ok(warden)
    }

    /// Starts the intruder with these arguments; its output goes to a file.
    fn intrude(&self, name: &str, arguments: &[String], size: Size) -> Result<Intruder, Error> {
        self.intrude_as(Program::Vmm, name, arguments, Some(size))
    }

    /// The same in the place of another program of the warden's.
    fn intrude_as(
        &self,
        program: Program,
        name: &str,
        arguments: &[String],
        size: Option<Size>,
    ) -> Result<Intruder, Error> {
        let path = self.dir.path().join(name);
        let (log, note) = (File::create(&path)?, File::create(path.with_extension("json"))?);
        let request = Request::Start(StartRequest { program, arguments: arguments.to_vec(), names: Vec::new(), size });
        let given: [BorrowedFd<'_>; 2] = [log.as_fd(), note.as_fd()];
        match self.client.call(&request, &given)? {
            (Reply::Started(note), mut received) if received.len() == 1 => {
                let pidfd = received.pop().ok_or("no descriptor")?;
                Ok(Intruder { note, pidfd, path })
            }
            (reply, _) => Err(format!("{reply:?}").into()),
        }
    }
}

struct Intruder {
    note: ProcessNote,
    pidfd: OwnedFd,
    path: std::path::PathBuf,
}

impl Intruder {
    /// What it wrote, and how it ended.
    async fn ended(&self) -> Result<(BTreeMap<String, String>, Option<End>), Error> {
        let noted = self.path.with_extension("json");
        let end = until("the intruder's end", || {
            Ok(serde_json::from_slice::<ProcessNote>(&std::fs::read(&noted)?).ok().and_then(|note| note.end))
        })
        .await?;
        let text = std::fs::read_to_string(&self.path)?;
        let lines = text.lines().filter_map(|line| line.split_once(": "));
        Ok((lines.map(|(name, got)| (name.to_owned(), got.to_owned())).collect(), Some(end)))
    }
}

const SMALL: Size = Size { vcpus: 1, memory_mib: 64, capture_mib: 16 };

/// What may be read, with what it has to say; every other attempt has to be refused.
fn readable(users: Users, pid: i32) -> BTreeMap<&'static str, String> {
    let uid = users.of(pid).to_string();
    let limit = stasis_warden::jail::limits::Limits::of_vmm(SMALL);
    [
        ("own-pid", "1"),
        ("list-processes", "1"),
        ("uid", uid.as_str()),
        ("effective-capabilities", "0000000000000000"),
        ("permitted-capabilities", "0000000000000000"),
        ("bounding-capabilities", "0000000000000000"),
        ("ambient-capabilities", "0000000000000000"),
        ("no-new-privileges", "1"),
        ("seccomp", "2"),
        ("environment", "0"),
        ("core-limit", "0"),
        // Standard ones, two devices, and the one that lists.
        ("descriptors", "6"),
        // Itself is one of as many as it may have.
        ("fork-bomb-size", &(limit.threads - 1).to_string()),
        // NOROOT, NO_SETUID_FIXUP, NO_CAP_AMBIENT_RAISE, all locked; KEEP_CAPS locked.
        ("securebits", &0b1110_1111.to_string()),
    ]
    .map(|(name, text)| (name, format!("got {text}")))
    .into()
}

async fn nothing_in_reach() -> Outcome {
    in_reach_of(Program::Vmm, Some(SMALL), &["lib", "lib64", "usr", "proc", "stasis-intruder"], readable).await
}

/// The same of one that has no `/proc` of its own to read anything from, and may have no second process.
async fn nothing_in_reach_of_an_unpacker() -> Outcome {
    let readable = |_, _| {
        ["own-pid", "environment", "core-limit", "fork-bomb-size", "securebits"]
            .map(|name| {
                let text = match name {
                    "own-pid" => "got 1",
                    "securebits" => "got 239",
                    _ => "got 0",
                };
                (name, text.to_owned())
            })
            .into()
    };
    in_reach_of(Program::Unpacker, None, &["lib", "lib64", "usr", "stasis-intruder"], readable).await
}

async fn in_reach_of(
    program: Program,
    size: Option<Size>,
    tree: &[&str],
    readable: impl Fn(Users, i32) -> BTreeMap<&'static str, String>,
) -> Outcome {
    let warden = Warden::start().await?;
    let tcp = std::net::TcpListener::bind("127.0.0.1:0")?;
    let name = format!("stasis-test-{}-{program:?}", std::process::id());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name.as_bytes())?;
    let _abstract = std::os::unix::net::UnixListener::bind_addr(&address)?;
    let other = warden.dir.path().join("other");
    std::fs::create_dir(&other)?;
    std::fs::set_permissions(warden.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    std::fs::write(other.join("console.log"), "another sandbox's")?;
    let _control = std::os::unix::net::UnixListener::bind(other.join("control.sock"))?;
    let arguments = [
        "--pid".to_owned(),
        std::process::id().to_string(),
        "--port".to_owned(),
        tcp.local_addr()?.port().to_string(),
        "--run-dir".to_owned(),
        other.display().to_string(),
        "--name".to_owned(),
        name,
    ];
    let intruder = warden.intrude_as(program, "all", &arguments, size)?;
    let (mut said, end) = intruder.ended().await?;
    let whole = std::fs::read_to_string(&intruder.path)?;
    assert!(whole.ends_with("done\n"), "it did not come to its end ({end:?}):\n{whole}");
    let root = said.remove("list-root").unwrap_or_default();
    assert!(root.trim_start_matches("got ").split(',').all(|name| tree.contains(&name)), "{root}");
    for (name, expected) in readable(Users::default(), intruder.note.pid) {
        assert_eq!(said.remove(name).as_ref(), Some(&expected), "{name} in\n{whole}");
    }
    let open: Vec<_> = said.iter().filter(|(_, outcome)| !outcome.starts_with("refused ")).collect();
    assert!(open.is_empty(), "not refused: {open:?}");
    assert!(said.len() > 50, "{} attempts", said.len());
    Ok(())
}

async fn two_users() -> Outcome {
    let warden = Warden::start().await?;
    let eat = ["--eat".to_owned(), "1".to_owned()];
    let (one, two) = (warden.intrude("one", &eat, SMALL)?, warden.intrude("two", &eat, SMALL)?);
    assert_ne!(Users::default().of(one.note.pid), Users::default().of(two.note.pid));
    for intruder in [one, two] {
        assert_eq!(intruder.ended().await?.1, Some(End::Code(0)));
    }
    Ok(())
}

async fn memory_limit() -> Outcome {
    let warden = Warden::start().await?;
    if let Some(missing) = warden.client.hello()?.missing.first() {
        eprintln!("left out: {missing}");
        return Ok(());
    }
    let within = warden.intrude("within", &["--eat".to_owned(), "100".to_owned()], SMALL)?;
    assert_eq!(within.ended().await?.1, Some(End::Code(0)), "100 MiB are within its limit");
    let beyond = warden.intrude("beyond", &["--eat".to_owned(), "600".to_owned()], SMALL)?;
    assert_eq!(beyond.ended().await?.1, Some(End::Signal(9)));
    Ok(())
}

/// The dialler may use one processor, a VMM some.
async fn processor_limit() -> Outcome {
    const SECONDS: u32 = 3;
    let warden = Warden::start().await?;
    if let Some(missing) = warden.client.hello()?.missing.first() {
        eprintln!("left out: {missing}");
        return Ok(());
    }
    let spin = ["--spin".to_owned(), SECONDS.to_string()];
    let mut used = Vec::new();
    for (program, size) in [(Program::Vmm, Some(SMALL)), (Program::Dialler, None)] {
        let intruder = warden.intrude_as(program, &format!("{program:?}"), &spin, size)?;
        let (said, end) = intruder.ended().await?;
        let text = said.get("spun-ms").and_then(|text| text.strip_prefix("got ")).ok_or("it did not say")?;
        used.push(text.parse::<u32>()?);
        assert_eq!(end, Some(End::Code(0)));
    }
    let (vmm, dialler) = (used[0], used[1]);
    assert!(dialler <= SECONDS * 1100, "{dialler} ms of {SECONDS} s");
    assert!(vmm > dialler * 5 / 4, "two threads that may have two processors had {vmm} ms, not more than {dialler}");
    Ok(())
}

async fn kills_its_own() -> Outcome {
    let warden = Warden::start().await?;
    let us = rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty())?;
    assert!(warden.client.call(&Request::Kill, &[us.as_fd()]).is_err(), "we are not one of its");
    // Memory that takes a while to eat.
    let intruder = warden.intrude("eats", &["--eat".to_owned(), "100000".to_owned()], SMALL)?;
    // The host has no limits where it has no control groups: it is killed before that matters.
    warden.client.call(&Request::Kill, &[intruder.pidfd.as_fd()])?;
    assert_eq!(intruder.ended().await?.1, Some(End::Signal(9)));
    Ok(())
}

async fn roles() -> Outcome {
    let dir = host::scratch()?;
    for role in Role::ALL {
        let (path, note) = (dir.path().join(role.name()), dir.path().join(format!("{}.json", role.name())));
        let command = stasis_warden::jail::Command {
            program: c(host::program("stasis-intruder").display().to_string())?,
            arguments: vec![c("--role")?, c(role.name())?],
            environment: Vec::new(),
            log: File::create(&path)?.into(),
            descriptors: Vec::new(),
            note: File::create(note)?,
        };
        let process = start(&command, None)?;
        let status = until("its end", || {
            let options = rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOHANG;
            Ok(rustix::process::waitid(rustix::process::WaitId::PidFd(process.pidfd.as_fd()), options)?)
        })
        .await?;
        let text = std::fs::read_to_string(&path)?;
        assert_eq!(status.exit_status(), Some(EXIT_SECCOMP), "{role:?}: {text}");
        let line = text.split_inclusive('}').next().unwrap_or_default();
        let note: ExitNote = serde_json::from_str(line)?;
        let expected = format!("system call {} is not one of a {} thread", libc::SYS_socket, role.name());
        assert!(note.reason.contains(&expected), "{note:?}");
    }
    Ok(())
}

/// No bound: what it takes is said, for who reads the log.
async fn cost() -> Outcome {
    const TIMES: u32 = 20;
    let warden = Warden::start().await?;
    let eat = ["--eat".to_owned(), "0".to_owned()];
    let began = Instant::now();
    for n in 0..TIMES {
        drop(warden.intrude(&format!("cost{n}"), &eat, SMALL)?);
    }
    let jailed = began.elapsed() / TIMES;
    let bare = time_bare(warden.dir.path(), TIMES)?;
    eprintln!("from the request to a program that runs: jailed {jailed:?}, bare {bare:?}");
    Ok(())
}

fn time_bare(dir: &Path, times: u32) -> Result<Duration, Error> {
    let began = Instant::now();
    for n in 0..times {
        let command = stasis_warden::jail::Command {
            program: c(host::program("stasis-intruder").display().to_string())?,
            arguments: vec![c("--eat")?, c("0")?],
            environment: Vec::new(),
            log: File::create(dir.join(format!("bare{n}")))?.into(),
            descriptors: Vec::new(),
            note: File::create(dir.join(format!("bare{n}.json")))?,
        };
        let process = start(&command, None)?;
        rustix::process::waitid(
            rustix::process::WaitId::PidFd(process.pidfd.as_fd()),
            rustix::process::WaitIdOptions::EXITED,
        )?;
    }
    Ok(began.elapsed() / times)
}
