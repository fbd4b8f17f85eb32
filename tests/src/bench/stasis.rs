//! One pulse sandbox at a time in our own service: pauses, wakes and named snapshots, measured as a client and the guest see them.
//!
//! How a wake is hot, warm or cold is a matter of configuration: memory kept or not, packs cached or not. So each kind has a service of its
//! own, all of them up at once, and a run goes through each in turn.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;
use stasis_snapshot::seal::OperatorKey;
use stasis_snapshot::store::ObjectStore;
use stasis_warden::jail::start::ProcessNote;

use super::bare::Bare;
use super::case::{Case, Guest, Store, Wake};
use super::console::{Watch, longest_silence, passes};
use super::process;
use super::samples::Samples;
use super::scan;
use crate::host;
use crate::service::{Options, Reply, Service, Sleep};
use crate::vmm::{Error, pulse, until};

/// Connections of the product and of the bare transfers.
pub const CONNECTIONS: usize = 32;
/// How long a guest may take to show itself.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long memory may take to become resident before the row is left out.
const RESIDENT: Duration = Duration::from_secs(20);
/// Passes that a guest runs undisturbed before something is measured.
const SETTLED: usize = 8;
/// Bytes that run-ahead may leave to a pause for it to be measured.
const RESIDUE: u64 = 1 << 20;
/// Dirty pages at most once run-ahead has sent what it can. Writes are tracked by granules of 2 MiB, and a guest that stands still goes on writing
/// a word or two of its stack: how much differs shows only when the pause has looked.
const SENT_AHEAD: u64 = 4 * 512;
/// How long a sandbox is left alone before the memory of its VMM is looked at, which is that of an idle one in the reference measurement, too.
const IDLE: Duration = Duration::from_secs(2);
/// How long after its end a snapshot's first pass may come.
const AFTER: Duration = Duration::from_secs(2);
/// Scratch of the embedded S3 server: memory, so that no disk writes back while something is measured.
const SHARED_MEMORY: &str = "/dev/shm";

/// What a service is configured for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setting {
    /// Wakes of this kind.
    Wakes(Wake),
    /// Run-ahead.
    Ahead,
}

impl Setting {
    fn environment(self) -> Vec<(String, String)> {
        let (keep, packs, ahead) = match self {
            Self::Wakes(Wake::Hot) => ("8192", "4096", "off"),
            Self::Wakes(Wake::Warm) => ("0", "4096", "off"),
            Self::Wakes(Wake::Cold) => ("0", "0", "off"),
            Self::Ahead => ("0", "0", "on"),
        };
        let connections = CONNECTIONS.to_string();
        [
            ("STASIS_KEEP_MEMORY_MIB", keep),
            ("STASIS_PACK_CACHE_MIB", packs),
            ("STASIS_RUN_AHEAD", ahead),
            // Soon, and without regard to what it costs: what is measured is the pause after it.
            ("STASIS_RUN_AHEAD_IDLE_MS", "100"),
            ("STASIS_RUN_AHEAD_INTERVAL_MS", "100"),
            ("STASIS_RUN_AHEAD_LEAST_KIB", "64"),
            ("STASIS_RUN_AHEAD_MIB_PER_MINUTE", "1000000"),
            ("STASIS_RUN_AHEAD_CORE_PERCENT", "100"),
            // A sandbox that begins as a clone has no first pause worth the name.
            ("STASIS_GOLDEN", if self == Self::Ahead { "on" } else { "off" }),
            ("STASIS_LIMITS_SANDBOXES", "256"),
            ("STASIS_LIMITS_CONNECTIONS", &connections),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
    }
}

/// A service that was started for a case.
pub struct Home {
    /// It.
    pub service: Service,
    /// Its store, reached as the supervisor reaches it.
    pub store: std::sync::Arc<dyn ObjectStore>,
    memory_mib: u32,
    _objects: tempfile::TempDir,
}

/// What a pause cost.
pub struct Paused {
    /// From the request to the answer.
    pub took: Duration,
    /// The answer.
    pub reply: Reply,
    /// Sizes of the packs that it stored.
    pub packs: Vec<u64>,
    /// Bytes that it stored, the manifest included.
    pub sent: u64,
    /// Requests to the store; `None` where nobody counts them.
    pub requests: Option<usize>,
    /// CPU time of supervisor and VMM.
    pub cpu: Duration,
}

/// Phases and byte counts of a `Server-Timing` header.
pub fn server_timing(header: &str) -> (BTreeMap<String, Duration>, BTreeMap<String, u64>) {
    let (mut phases, mut bytes) = (BTreeMap::new(), BTreeMap::new());
    for entry in header.split(", ") {
        let Some((name, value)) = entry.split_once(';') else { continue };
        if let Some(ms) = value.strip_prefix("dur=").and_then(|ms| ms.parse::<f64>().ok()) {
            phases.insert(name.to_owned(), Duration::from_secs_f64(ms.max(0.0) / 1000.0));
        } else if let Some(n) = value.strip_prefix("desc=\"").and_then(|text| text.split(' ').next()?.parse().ok()) {
            bytes.insert(name.to_owned(), n);
        }
    }
    (phases, bytes)
}

/// Writes the template that the case's sandboxes boot from.
fn images(dir: &Path, case: &Case) -> Result<PathBuf, Error> {
    let template = dir.join("images/templates/pulse");
    std::fs::create_dir_all(&template)?;
    let json = json!({
        "name": "bench/pulse", "kernel": pulse(), "disk_mib": 0, "min_memory_mib": 16,
        "cmdline": case.pulse_command_line(), "ready": {"serial": "R\n"},
    });
    std::fs::write(template.join("template.json"), json.to_string())?;
    Ok(dir.join("images"))
}

/// Where a big scratch of this kind can be.
fn objects_dir() -> std::io::Result<tempfile::TempDir> {
    let shared = Path::new(SHARED_MEMORY);
    if std::env::var_os("STASIS_SCRATCH").is_none() && shared.is_dir() {
        tempfile::tempdir_in(shared)
    } else {
        host::scratch()
    }
}

impl Home {
    /// Starts a service for this case.
    pub async fn start(case: &Case, setting: Setting) -> Result<Self, Error> {
        Self::start_with(case, setting.environment()).await
    }

    /// The same with VMMs that are not behind walls.
    pub async fn start_unjailed(case: &Case, setting: Setting) -> Result<Self, Error> {
        let mut environment = setting.environment();
        environment.push(("STASIS_ISOLATION".to_owned(), "off".to_owned()));
        Self::start_with(case, environment).await
    }

    async fn start_with(case: &Case, mut environment: Vec<(String, String)>) -> Result<Self, Error> {
        let dir = host::scratch()?;
        let objects = objects_dir()?;
        let images = match case.guest {
            Guest::Pulse => images(dir.path(), case)?,
            Guest::Debian => host::built("images"),
        };
        if case.encrypt {
            let key = dir.path().join("operator.key");
            let mut file = File::options().write(true).create_new(true).mode(0o600).open(&key)?;
            file.write_all(OperatorKey::file_text(&rand::random()).as_bytes())?;
            environment.push(("STASIS_SEAL_KEY_FILE".to_owned(), key.display().to_string()));
        }
        let options = Options { images: Some(images), environment };
        let sleep = match (&case.store, case.link) {
            (Store::Directory, _) => Sleep::Directory,
            (Store::Embedded, None) => Sleep::Direct,
            (Store::Embedded, Some(_)) => Sleep::Proxied,
            (Store::Bucket(settings), _) => Sleep::Bucket(settings.clone()),
        };
        let service = Service::start_with(options, sleep, dir, objects.path()).await?;
        service.proxy.shape(case.link);
        let store = service.store()?;
        Ok(Self { service, store, memory_mib: case.memory_mib, _objects: objects })
    }

    /// Creates a pulse sandbox and lets it settle. Also answers how long its creation took.
    pub async fn create(&self) -> Result<(String, Duration), Error> {
        let body = json!({"template_name": "bench/pulse", "memory": self.memory_mib});
        let begun = Instant::now();
        let id = self.service.call("POST", "/v1/sandbox", Some(body)).await?.expect(201)?.text("id");
        let took = begun.elapsed();
        until("passes of a new guest", || Ok(self.settled(&id, 0))).await?;
        Ok((id, took))
    }

    fn settled(&self, id: &str, before: usize) -> Option<()> {
        let passes = self.service.console(id).matches('.').count();
        (passes >= before + SETTLED).then_some(())
    }

    /// Waits until the guest has run undisturbed for a while.
    pub async fn settle(&self, id: &str) -> Result<(), Error> {
        let before = self.service.console(id).matches('.').count();
        until("passes of the guest", || Ok(self.settled(id, before))).await
    }

    /// Deletes it.
    pub async fn delete(&self, id: &str) -> Result<(), Error> {
        let reply = self.service.call("DELETE", &format!("/v1/sandbox/{id}"), None).await?;
        if (200..300).contains(&reply.status) { Ok(()) } else { Err(format!("cannot delete {id}: {reply:?}").into()) }
    }

    /// Keys and sizes of what the store holds of a sandbox.
    pub async fn objects(&self, id: &str) -> Result<BTreeMap<String, u64>, Error> {
        let (mut found, mut next) = (BTreeMap::new(), None);
        loop {
            let page = self.store.list(&format!("v1/test/sandbox/{id}/"), next.as_deref()).await?;
            found.extend(page.objects.into_iter().map(|object| (object.key, object.size)));
            match page.next {
                Some(token) => next = Some(token),
                None => return Ok(found),
            }
        }
    }

    /// CPU time of the supervisor and its warden, of what they have waited for, and of the VMMs that live, idle ones too.
    pub fn cpu(&self) -> Duration {
        let service = &self.service;
        let note = std::fs::read(service.dir.path().join("d/warden.json")).ok();
        let warden = note.and_then(|note| serde_json::from_slice::<ProcessNote>(&note).ok());
        let warden = warden.and_then(|note| u32::try_from(note.pid).ok());
        let helpers = std::iter::once(service.supervisor_pid()).chain(warden);
        helpers.chain(service.vmm_pids()).chain(service.idle_vmm_pids()).filter_map(process::cpu).sum()
    }

    /// Memory of a sandbox's VMM beyond guest memory.
    pub fn overhead(&self, id: &str) -> Result<process::Overhead, Error> {
        // Not what the VMM says: it is 1 in its own namespace.
        let pid = self.service.vmms_of(id).first().copied().ok_or_else(|| format!("{id} has no VMM"))?;
        process::overhead(pid, u64::MAX).ok_or_else(|| format!("the VMM of {id} is gone").into())
    }

    /// Waits for the end of paused VMMs. They are taken apart after the answer; their time counts once they were waited for.
    pub async fn ended(&self, vmms: &[u32]) -> Result<(), Error> {
        let gone = || vmms.iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists());
        until("the end of a paused VMM", || Ok(gone().then_some(()))).await
    }

    /// Pauses and looks at everything that this cost.
    pub async fn pause(&self, id: &str) -> Result<Paused, Error> {
        let before = self.objects(id).await?;
        self.service.s3.take_exchanges();
        let vmms = self.service.vmm_pids();
        let cpu = self.cpu();
        let begun = Instant::now();
        let reply = self.service.pause(id).await?;
        let took = begun.elapsed();
        let requests = self.service.s3.take_exchanges().len();
        let reply = reply.expect(201)?;
        self.ended(&vmms).await?;
        let cpu = self.cpu().saturating_sub(cpu);
        let after = self.objects(id).await?;
        let (packs, sent) = stored(&before, &after);
        Ok(Paused { took, reply, packs, sent, requests: (requests > 0).then_some(requests), cpu })
    }
}

/// Of what a store holds now and did not before: sizes of packs, and bytes of packs and manifests.
pub fn stored(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> (Vec<u64>, u64) {
    let new = after.iter().filter(|(key, _)| !before.contains_key(*key) && !key.ends_with("/head"));
    let (packs, rest): (Vec<_>, Vec<_>) = new.partition(|(key, _)| key.contains("/pack/"));
    let packs: Vec<u64> = packs.into_iter().map(|(_, size)| *size).collect();
    let sent = packs.iter().sum::<u64>() + rest.iter().map(|(_, size)| *size).sum::<u64>();
    (packs, sent)
}

/// Everything of a case that one service after the other shows; and of a case that is sealed, the same without seals. What was sampled before a
/// failure stays.
pub async fn measure(case: &Case, shown: &mut Sampled, notes: &mut Vec<String>) -> Result<(), Error> {
    let Sampled { ours: samples, unsealed } = shown;
    let plain = case.encrypt.then(|| Case { encrypt: false, ..case.clone() });
    let bare = Bare::new(CONNECTIONS)?;
    let wakes = if case.measures.wakes.is_empty() { vec![Wake::Cold] } else { case.measures.wakes.clone() };
    let mut homes = Vec::new();
    for wake in wakes {
        let other = match &plain {
            Some(plain) => Some(Home::start(plain, Setting::Wakes(wake)).await?),
            None => None,
        };
        homes.push((wake, Home::start(case, Setting::Wakes(wake)).await?, other));
    }
    let ahead = if case.measures.residue { Some(Home::start(case, Setting::Ahead).await?) } else { None };
    for run in 0..case.runs {
        for (wake, home, other) in &homes {
            if let (Some(home), Some(case)) = (other, &plain) {
                let samples = unsealed.get_or_insert_default();
                let mut cycle = Cycle { case, home, bare: &bare, samples, notes };
                cycle.run(*wake, run).await.map_err(|e| context(home, *wake, &e))?;
            }
            let mut cycle = Cycle { case, home, bare: &bare, samples, notes };
            cycle.run(*wake, run).await.map_err(|e| context(home, *wake, &e))?;
        }
        if let Some(home) = &ahead {
            let mut cycle = Cycle { case, home, bare: &bare, samples, notes };
            cycle.residue(run).await.map_err(|e| context(home, Wake::Cold, &e))?;
        }
    }
    drop((homes, ahead));
    if case.measures.residue {
        scan::measure(case, samples).await?;
    }
    Ok(())
}

fn context(home: &Home, wake: Wake, error: &Error) -> Error {
    let log = home.service.log();
    let tail: Vec<_> = log.lines().rev().take(5).collect();
    format!("in the {} service: {error}; its log ends, newest first: {}", wake.word(), tail.join(" | ")).into()
}

/// What a case shows of us.
#[derive(Debug, Default)]
pub struct Sampled {
    /// As the case says.
    pub ours: Samples,
    /// Of a case that is sealed, without seals.
    pub unsealed: Option<Samples>,
}

/// The life of one sandbox in one service.
struct Cycle<'a> {
    case: &'a Case,
    home: &'a Home,
    bare: &'a Bare,
    samples: &'a mut Samples,
    notes: &'a mut Vec<String>,
}

impl Cycle<'_> {
    async fn run(&mut self, wake: Wake, run: u32) -> Result<(), Error> {
        let (id, created) = self.home.create().await?;
        self.samples.time("create", created);
        let changed = u64::from(self.case.used_mib) << 20;
        let first = self.pause("first_pause", &id, changed).await?;
        self.bare_transfer("bare_upload.first", None, &first.packs).await?;

        // The first wake finds no recorded working set: it is not what is measured.
        self.home.service.resume(&id).await?.expect_success()?;
        self.resident(&id, Instant::now()).await?;
        self.home.settle(&id).await?;
        let changed = u64::from(self.case.changed_mib) << 20;
        let repeat = self.pause("repeat_pause", &id, changed).await?;
        self.bare_transfer("bare_upload", Some("bare_download"), &repeat.packs).await?;
        self.samples.time("bare_small_put", self.bare.small_put(self.home.store.as_ref()).await?);

        self.resume(wake, &id).await?;
        self.home.settle(&id).await?;
        tokio::time::sleep(IDLE).await;
        self.home.overhead(&id)?.note(self.samples);
        if self.case.measures.snapshot {
            self.snapshot(&id, run).await?;
        }
        self.home.delete(&id).await
    }

    /// A pause under this name, with its phases, traffic and CPU time.
    async fn pause(&mut self, name: &str, id: &str, changed: u64) -> Result<Paused, Error> {
        let paused = self.home.pause(id).await?;
        let (phases, bytes) = server_timing(&paused.reply.timing);
        self.samples.time(name, paused.took);
        for (phase, took) in &phases {
            self.samples.time(format!("{name}.{phase}"), *took);
        }
        self.samples.time(format!("{name}.cpu"), paused.cpu);
        let repeat = name == "repeat_pause";
        let detail = |metric: &str| if repeat { metric.to_owned() } else { format!("{metric}.first") };
        // Pulse rewrites exactly its hot set, and a supervisor that counts what differs knows better still.
        self.samples.bytes(detail("bytes_changed"), bytes.get("changed").copied().unwrap_or(changed));
        self.samples.bytes(detail("bytes_sent"), paused.sent);
        if let Some(requests) = paused.requests {
            self.samples.add(detail("requests"), "count", requests as f64);
        }
        if repeat {
            self.samples.add("cpu", "s", paused.cpu.as_secs_f64());
        }
        Ok(paused)
    }

    async fn bare_transfer(&mut self, up: &str, down: Option<&str>, sizes: &[u64]) -> Result<(), Error> {
        let store = self.home.store.as_ref();
        let cpu = process::own_cpu();
        self.samples.time(up, self.bare.upload(store, "bare", sizes).await?);
        // Client and embedded server are in this process.
        self.samples.time(format!("{up}.cpu"), process::own_cpu().saturating_sub(cpu));
        if let Some(down) = down {
            let cpu = process::own_cpu();
            self.samples.time(down, self.bare.download(store, "bare", sizes.len()).await?);
            self.samples.time(format!("{down}.cpu"), process::own_cpu().saturating_sub(cpu));
        }
        self.bare.clear(store, "bare", sizes.len()).await
    }

    async fn resume(&mut self, wake: Wake, id: &str) -> Result<(), Error> {
        let word = wake.word();
        let watch = Watch::start(self.home.service.run_dir(id).join(stasis_vmm::control::CONSOLE_LOG));
        self.home.service.s3.take_exchanges();
        let cpu = self.home.cpu();
        let begun = Instant::now();
        let reply = self.home.service.resume(id).await?;
        let answered = begun.elapsed();
        let cpu = self.home.cpu().saturating_sub(cpu);
        let reply = reply.expect_success()?;
        let (phases, _) = server_timing(&reply.timing);
        if wake == Wake::Hot && !phases.contains_key("kept") {
            self.note("resume_hot: the memory was not kept".to_owned());
            return Ok(());
        }
        let first =
            watch.until("the first output after a wake", PATIENCE, |beats| beats.first().map(|beat| beat.at)).await?;
        let pass = watch.until("the first pass after a wake", PATIENCE, |beats| passes(beats).next()).await?;
        self.samples.time(format!("resume_{word}"), first - begun);
        self.samples.time(format!("resume_{word}.answered"), answered);
        self.samples.time(format!("resume_{word}.hot_set"), pass.ended - begun);
        self.samples.time(format!("resume_{word}.cpu"), cpu);
        for (phase, took) in phases.iter().filter(|(phase, _)| *phase != "kept") {
            self.samples.time(format!("resume_{word}.{phase}"), *took);
        }
        let detail = |metric: &str, plain: Wake| {
            if wake == plain { metric.to_owned() } else { format!("{metric}.{word}") }
        };
        self.samples.time(detail("first_pass_after_resume", Wake::Hot), pass.took());
        if let Some(at) = self.resident(id, begun).await? {
            self.samples.time(detail("resident", Wake::Cold), at);
        } else {
            self.note(format!("resident ({word}): not all memory was in place after {} s", RESIDENT.as_secs()));
        }
        let traffic = self.home.service.s3.take_exchanges();
        if wake != Wake::Cold && traffic.iter().any(|x| x.method == http::Method::GET && x.path.contains("/pack/")) {
            self.note(format!("resume_{word}: packs were read from the store all the same"));
        }
        if !traffic.is_empty() {
            let fetched = traffic.iter().map(|exchange| exchange.answered).sum();
            self.samples.bytes(format!("resume_{word}.fetched"), fetched);
            self.samples.add(format!("resume_{word}.requests"), "count", traffic.len() as f64);
        }
        Ok(())
    }

    /// Waits until no page is absent, and answers how long after `since` that was. `None` when it does not come about.
    async fn resident(&self, id: &str, since: Instant) -> Result<Option<Duration>, Error> {
        let deadline = Instant::now() + RESIDENT;
        let answered = since.elapsed();
        loop {
            let metrics = self.home.service.vmm(id).metrics().await?;
            match metrics.paging {
                // A VMM that pages nothing in had everything when it answered.
                None => return Ok(Some(answered)),
                Some(paging) if paging.absent_pages == 0 => return Ok(Some(since.elapsed())),
                Some(_) if Instant::now() > deadline => return Ok(None),
                Some(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    }

    /// A named snapshot of the running sandbox: how long its guest stood still, and its first pass after that.
    async fn snapshot(&mut self, id: &str, run: u32) -> Result<(), Error> {
        let watch = Watch::start(self.home.service.run_dir(id).join(stasis_vmm::control::CONSOLE_LOG));
        watch.until("a pass before the snapshot", PATIENCE, |beats| passes(beats).nth(1)).await?;
        let undisturbed: Vec<_> = passes(&watch.beats()).map(|pass| pass.took()).collect();
        let body = json!({"name": format!("bench-{id}-{run}").to_lowercase()});
        let begun = Instant::now();
        let reply = self.home.service.call("POST", &format!("/v1/sandbox/{id}/snapshot/create"), Some(body)).await?;
        let ended = Instant::now();
        if [404, 405, 501].contains(&reply.status) {
            self.note("guest_stop, first_pass_after_snapshot: this service has no named snapshots".to_owned());
            return Ok(());
        }
        let reply = reply.expect(201)?;
        let (phases, _) = server_timing(&reply.timing);
        for took in undisturbed {
            self.samples.time("undisturbed_pass", took);
        }
        self.samples.time("snapshot", ended - begun);
        if let Some(stop) = phases.get("stop") {
            self.samples.time("guest_stop", *stop);
        }
        // Everything the guest did until a while after, so that the pass after the stop is among it.
        let beats = watch
            .until("passes after the snapshot", PATIENCE, |beats| {
                let last = passes(beats).last()?;
                (last.began > ended + AFTER / 20).then(|| beats.to_vec())
            })
            .await?;
        if let Some((silence, resumed)) = longest_silence(&beats, begun, ended) {
            self.samples.time("guest_stop.seen", silence);
            if let Some(pass) = passes(&beats).find(|pass| pass.began >= resumed) {
                self.samples.time("first_pass_after_snapshot", pass.took());
            }
        }
        if let Some(worst) = passes(&beats).filter(|pass| pass.ended >= begun).map(|pass| pass.took()).max() {
            self.samples.time("first_pass_after_snapshot.worst", worst);
        }
        Ok(())
    }

    /// A pause of a guest that dirties nothing any more and has been sent ahead.
    async fn residue(&mut self, run: u32) -> Result<(), Error> {
        let (id, created) = self.home.create().await?;
        // The first one is booted, and the template captured from it.
        if run > 0 {
            self.samples.time("create.clone", created);
        }
        self.home.pause(&id).await?;
        self.home.service.resume(&id).await?.expect_success()?;
        self.home.settle(&id).await?;
        self.home.service.vmm(&id).console(bytes::Bytes::from_static(b"s")).await?;
        until("the guest to stand still", || Ok(self.home.service.console(&id).contains("S\n").then_some(()))).await?;
        let deadline = Instant::now() + RESIDENT;
        let ahead = loop {
            // Refused while a round runs.
            let dirty = self.home.service.vmm(&id).dirty().await;
            if dirty.is_ok_and(|dirty| dirty.memory_pages <= SENT_AHEAD) {
                break true;
            }
            if Instant::now() > deadline {
                break false;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        if ahead {
            let paused = self.home.pause(&id).await?;
            let left: u64 = paused.packs.iter().sum();
            if left > RESIDUE {
                self.note(format!("repeat_pause.after_run_ahead: {} KiB were left once", left >> 10));
                return self.home.delete(&id).await;
            }
            self.samples.time("repeat_pause.after_run_ahead", paused.took);
            for (phase, took) in server_timing(&paused.reply.timing).0 {
                self.samples.time(format!("repeat_pause.after_run_ahead.{phase}"), took);
            }
            self.samples.bytes("bytes_sent.after_run_ahead", paused.sent);
        } else {
            self.note("repeat_pause.after_run_ahead: nothing was sent ahead".to_owned());
        }
        self.home.delete(&id).await
    }

    fn note(&mut self, note: String) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_timing_header_is_read() {
        let (phases, bytes) = server_timing("stop;dur=1.500, upload;dur=20.000, sent;desc=\"123 bytes\", odd");
        assert_eq!(phases["stop"], Duration::from_micros(1500));
        assert_eq!(phases["upload"], Duration::from_millis(20));
        assert_eq!(bytes["sent"], 123);
        assert_eq!(server_timing("").0.len(), 0);
    }
}
