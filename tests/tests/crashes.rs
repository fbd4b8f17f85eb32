//! `kill -9` of the supervisor at every fail point of every operation, and at every one of the restart after it: what was answered is true
//! afterwards, and nothing is stuck, doubled or left over.
//!
//! Nothing here names a point. A step is done once to see which points it reaches, and then once for each of them; what the restart reaches
//! is crashed too. `every_fail_point_is_reached` sees that no point is left out.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use http::Method;
use serde_json::json;
use stasis_api::dev::{Fault, Rule};
use stasis_api::fail_points::{KILL, Point, REACHED, VARIABLE};
use stasis_tests::host;
use stasis_tests::invariants::{come_to_rest, is_usable, legal_moves, nothing_is_left, one_vmm_each, progress};
use stasis_tests::service::{Options, Reply, Service, Sleep};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::{Error, no_pulse, until};

fn main() {
    let mut suite = Suite::default().test("every_fail_point_is_reached", no_pulse(), every_point);
    for step in Step::ALL {
        let name = format!("a_supervisor_killed_anywhere_in_{}_loses_nothing", step.name());
        suite = suite.test(&name, no_pulse(), move || crash(step));
    }
    suite.main();
}

/// How long a step may take until it is over or the supervisor is dead.
const PATIENCE: Duration = Duration::from_mins(2);

/// The fail points' files, in the service's directory.
const POINTS: &str = "points";

/// Something that the supervisor does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Create,
    Golden,
    CreateFromGolden,
    Pause,
    PauseRefused,
    Resume,
    ResumeFails,
    Snapshot,
    SnapshotFails,
    Restore,
    Stop,
    StopRefused,
    Start,
    StartFails,
    Lose,
    LoseForEver,
    Delete,
    DeletePaused,
    Undelete,
}

/// A sandbox before a step.
#[derive(Default)]
struct Subject {
    id: String,
    /// Its guest's progress, where it has one.
    progress: u64,
    /// A name of this round.
    name: String,
    memory: u32,
}

impl Step {
    const ALL: [Self; 19] = [
        Self::Create,
        Self::Golden,
        Self::CreateFromGolden,
        Self::Pause,
        Self::PauseRefused,
        Self::Resume,
        Self::ResumeFails,
        Self::Snapshot,
        Self::SnapshotFails,
        Self::Restore,
        Self::Stop,
        Self::StopRefused,
        Self::Start,
        Self::StartFails,
        Self::Lose,
        Self::LoseForEver,
        Self::Delete,
        Self::DeletePaused,
        Self::Undelete,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Create => "a_create",
            Self::Golden => "the_making_of_a_booted_template",
            Self::CreateFromGolden => "a_create_from_a_booted_template",
            Self::Pause => "a_pause",
            Self::PauseRefused => "a_pause_that_fails",
            Self::Resume => "a_resume",
            Self::ResumeFails => "a_resume_that_fails",
            Self::Snapshot => "a_snapshot",
            Self::SnapshotFails => "a_snapshot_that_fails",
            Self::Restore => "a_restore",
            Self::Stop => "a_stop",
            Self::StopRefused => "a_stop_that_fails",
            Self::Start => "a_start",
            Self::StartFails => "a_start_that_fails",
            Self::Lose => "the_loss_of_a_vmm",
            Self::LoseForEver => "the_loss_of_a_vmm_without_a_commit",
            Self::Delete => "a_delete",
            Self::DeletePaused => "a_delete_of_a_paused_one",
            Self::Undelete => "an_undelete",
        }
    }

    /// It makes a sandbox, whose id is known when it is answered.
    fn makes_one(self) -> bool {
        matches!(self, Self::Create | Self::Golden | Self::CreateFromGolden | Self::Restore)
    }

    /// The states in which it may leave a sandbox when nobody was answered. The first is the one after success.
    fn ends(self) -> &'static [&'static str] {
        match self {
            Self::Create | Self::Golden | Self::CreateFromGolden | Self::Restore => &["running", "deleted"],
            Self::Pause | Self::PauseRefused => &["paused", "running"],
            Self::Resume | Self::ResumeFails => &["running", "paused"],
            Self::Snapshot | Self::SnapshotFails => &["running"],
            Self::Stop | Self::StopRefused => &["stopped", "running"],
            Self::Start | Self::StartFails => &["running", "stopped"],
            Self::Lose => &["paused"],
            Self::LoseForEver => &["deleted"],
            Self::Delete => &["deleted", "running"],
            Self::DeletePaused => &["deleted", "paused"],
            Self::Undelete => &["paused", "deleted"],
        }
    }

    /// A guest that runs or stands still when the supervisor dies has lost nothing afterwards. It may where it was not handed over yet, where
    /// it boots anew, and where it is to go.
    fn keeps_the_guest(self) -> bool {
        matches!(self, Self::Pause | Self::PauseRefused | Self::Snapshot | Self::SnapshotFails | Self::StopRefused)
    }

    async fn prepare(self, service: &Service, round: u32) -> Result<Subject, Error> {
        let mut subject = Subject { name: format!("s{round}"), memory: 32, ..Subject::default() };
        match self {
            Self::Create => {}
            // Another size of machine has another booted template.
            Self::Golden => subject.memory = 32 + 2 * round,
            Self::CreateFromGolden => {
                if booted_templates(service) == 0 {
                    let first = create(service, &subject).await?.expect(201)?.text("id");
                    await_booted_template(service, 1).await?;
                    service.call("DELETE", &format!("/v1/sandbox/{first}"), None).await?.expect(204)?;
                }
            }
            _ => {
                subject.id = create(service, &subject).await?.expect(201)?.text("id");
                service.pulse_is_well(&subject.id).await?;
                subject.progress = progress(service, &subject.id).await?;
            }
        }
        let id = &subject.id;
        match self {
            Self::Resume | Self::ResumeFails | Self::DeletePaused | Self::Undelete => {
                service.pause(id).await?.expect(201)?;
            }
            Self::Lose => {
                service.pause(id).await?.expect(201)?;
                service.resume(id).await?.expect(200)?;
            }
            Self::Start | Self::StartFails => drop(verb(service, id, "stop").await?.expect(200)?),
            Self::Restore => drop(snapshot(service, &subject).await?.expect(201)?),
            _ => {}
        }
        if self == Self::Undelete {
            service.call("DELETE", &format!("/v1/sandbox/{id}"), None).await?.expect(204)?;
        }
        let (method, path) = match self {
            Self::PauseRefused | Self::StopRefused => (Method::PUT, "/head"),
            Self::SnapshotFails => (Method::PUT, "/manifest"),
            Self::ResumeFails | Self::StartFails => (Method::GET, "/manifest"),
            _ => return Ok(subject),
        };
        service.proxy.add(Rule::every(method, path, Fault::Refuse(403)));
        Ok(subject)
    }

    async fn act(self, service: &Service, subject: &Subject) -> Result<Reply, Error> {
        let id = &subject.id;
        match self {
            Self::Create | Self::CreateFromGolden => create(service, subject).await,
            Self::Golden => {
                let ready = booted_templates(service);
                let made = create(service, subject).await?;
                await_booted_template(service, ready + 1).await?;
                Ok(made)
            }
            Self::Pause | Self::PauseRefused => service.pause(id).await,
            Self::Resume | Self::ResumeFails => service.resume(id).await,
            Self::Snapshot | Self::SnapshotFails => snapshot(service, subject).await,
            Self::Restore => {
                let body = json!({"snapshot_name": subject.name});
                service.call("POST", "/v1/snapshot/restore", Some(body)).await
            }
            Self::Stop | Self::StopRefused => verb(service, id, "stop").await,
            Self::Start | Self::StartFails => verb(service, id, "start").await,
            Self::Lose | Self::LoseForEver => {
                for pid in service.vmms_of(id) {
                    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).ok_or("no pid")?;
                    rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
                }
                service.await_state(id, self.ends()[0]).await?;
                // The head follows.
                let reached = service.dir.path().join(POINTS).join(REACHED);
                let reached = || std::fs::read_to_string(&reached).unwrap_or_default();
                let settled = || Ok(reached().contains(Point::HeadSettled.name()).then_some(()));
                until("the head of what was lost", settled).await?;
                service.call("GET", &format!("/v1/sandbox/{id}"), None).await
            }
            Self::Delete | Self::DeletePaused => service.call("DELETE", &format!("/v1/sandbox/{id}"), None).await,
            Self::Undelete => verb(service, id, "undelete").await,
        }
    }
}

async fn verb(service: &Service, id: &str, verb: &str) -> Result<Reply, Error> {
    service.call("POST", &format!("/v1/sandbox/{id}/{verb}"), None).await
}

async fn create(service: &Service, subject: &Subject) -> Result<Reply, Error> {
    let body = json!({"template_name": "test/pulse", "memory": subject.memory});
    service.call("POST", "/v1/sandbox", Some(body)).await
}

async fn snapshot(service: &Service, subject: &Subject) -> Result<Reply, Error> {
    let body = json!({"name": subject.name});
    service.call("POST", &format!("/v1/sandbox/{}/snapshot/create", subject.id), Some(body)).await
}

fn booted_templates(service: &Service) -> usize {
    service.log().matches("the template was booted and captured").count()
}

async fn await_booted_template(service: &Service, number: usize) -> Result<(), Error> {
    let begun = Instant::now();
    while booted_templates(service) < number {
        if service.supervisor_is_dead() || begun.elapsed() > PATIENCE {
            return Err("no booted template".into());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// A service with its fail points on.
struct Bench {
    service: Service,
    points: PathBuf,
    round: u32,
    /// Every sandbox there ever was.
    known: BTreeSet<String>,
}

/// How often each point was reached.
type Reached = BTreeMap<String, u32>;

impl Bench {
    async fn start(step: Step) -> Result<Self, Error> {
        let dir = host::scratch()?;
        let (points, objects) = (dir.path().join(POINTS), dir.path().join("s3"));
        std::fs::create_dir(&points)?;
        let golden = if matches!(step, Step::Golden | Step::CreateFromGolden) { "on" } else { "off" };
        let mut options = Options::default();
        options.environment.extend([
            (VARIABLE.to_owned(), points.display().to_string()),
            ("STASIS_GOLDEN".to_owned(), golden.to_owned()),
            // Memory that is kept needs no manifest, and the resume that is to fail would succeed.
            ("STASIS_KEEP_MEMORY_MIB".to_owned(), "0".to_owned()),
        ]);
        let service = Service::start_with(options, Sleep::default(), dir, &objects).await?;
        Ok(Self { service, points, round: 0, known: BTreeSet::new() })
    }

    /// Points that were reached since the last [`take_reached`](Self::take_reached).
    fn reached(&self) -> Reached {
        let text = std::fs::read_to_string(self.points.join(REACHED)).unwrap_or_default();
        let mut reached = Reached::new();
        text.lines().for_each(|name| *reached.entry(name.to_owned()).or_default() += 1);
        reached
    }

    /// The same, to be counted anew.
    fn take_reached(&self) -> Reached {
        let reached = self.reached();
        let _ = std::fs::remove_file(self.points.join(REACHED));
        reached
    }

    async fn death(&self) {
        while !self.service.supervisor_is_dead() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Waits until nothing of this round is under way.
    async fn settle(&self, subject: &Subject) -> Result<(), Error> {
        for id in self.known.iter().chain([&subject.id]).filter(|id| !id.is_empty()) {
            come_to_rest(&self.service, id).await?;
        }
        Ok(())
    }

    /// The supervisor dies when it reaches this point for the n-th time from now on.
    fn arm(&self, at: Option<(&str, u32)>) -> Result<(), Error> {
        let path = self.points.join(KILL);
        let Some((name, number)) = at else {
            let _ = std::fs::remove_file(path);
            return Ok(());
        };
        // By a rename, since it is read meanwhile.
        let new = self.points.join("new");
        std::fs::write(&new, format!("{name} {number}"))?;
        Ok(std::fs::rename(new, path)?)
    }

    /// Sandboxes that came since the last call.
    fn newcomers(&mut self) -> Result<Vec<String>, Error> {
        let all = self.service.journal()?.records()?.into_iter().map(|record| record.id.to_string());
        Ok(all.filter(|id| self.known.insert(id.clone())).collect())
    }

    async fn prepare(&mut self, step: Step) -> Result<Subject, Error> {
        self.round += 1;
        let subject = step.prepare(&self.service, self.round).await?;
        self.newcomers()?;
        Ok(subject)
    }

    /// Does the step until it is answered or the supervisor is dead. `None` for no answer.
    async fn act(&self, step: Step, subject: &Subject) -> Result<Option<Reply>, Error> {
        let acting = async {
            tokio::select! {
                // An answer that was sent counts, whatever comes after it.
                biased;
                reply = step.act(&self.service, subject) => Some(reply),
                () = self.death() => None,
            }
        };
        match tokio::time::timeout(PATIENCE, acting).await? {
            Some(Ok(reply)) => Ok(Some(reply)),
            // Its connections break before it is dead for everybody to see.
            Some(Err(error)) => match tokio::time::timeout(PATIENCE, self.death()).await {
                Ok(()) => Ok(None),
                Err(_) => Err(error),
            },
            None => Ok(None),
        }
    }

    /// Looks at everything after a step, crashed or not, and clears it away.
    async fn check(&mut self, step: Step, subject: &Subject, reply: Option<&Reply>, floor: u64) -> Result<(), Error> {
        self.service.proxy.clear();
        let mut concerned = self.newcomers()?;
        let answered_id = reply.filter(|reply| reply.status == 201 && step.makes_one()).map(|reply| reply.text("id"));
        if !step.makes_one() {
            concerned.push(subject.id.clone());
        }
        for id in &concerned {
            let told = come_to_rest(&self.service, id).await?;
            let state = told["state"].as_str().unwrap_or_default().to_owned();
            legal_moves(&self.service, id)?;
            one_vmm_each(&self.service, [id])?;
            let success = reply.is_some_and(|reply| (200..300).contains(&reply.status));
            let refused = reply.is_some() && !success;
            let ends = step.ends();
            let ends = if success {
                &ends[..1]
            } else if refused {
                &ends[ends.len() - 1..]
            } else {
                ends
            };
            if !ends.contains(&state.as_str()) {
                return Err(format!("{id} is {state} after {reply:?}: {told}").into());
            }
            if state == "deleted" {
                let wanted = matches!(step, Step::Delete | Step::DeletePaused | Step::Undelete);
                if !wanted && told["reason"].as_str().is_none_or(str::is_empty) {
                    return Err(format!("{id} is lost without a reason: {told}").into());
                }
                if matches!(step, Step::Undelete | Step::DeletePaused) {
                    let back = verb(&self.service, id, "undelete").await?.expect(200)?;
                    assert_eq!(back.text("state"), "paused");
                } else {
                    continue;
                }
            }
            let done = is_usable(&self.service, id).await?;
            let booted = matches!(step, Step::Start | Step::StartFails) || state == "stopped";
            if done < floor && !booted {
                return Err(format!("{id} had come to {floor} and is back at {done}").into());
            }
            // And it is as good as new.
            self.service.pause(id).await?.expect(201)?;
            is_usable(&self.service, id).await?;
            one_vmm_each(&self.service, [id])?;
        }
        if let Some(id) = answered_id
            && !concerned.contains(&id)
        {
            return Err(format!("{id} was answered and is not there").into());
        }
        if step == Step::Restore {
            concerned.push(subject.id.clone());
        }
        nothing_is_left(&self.service, &concerned).await
    }

    /// What the guest has done when its supervisor is dead, if it lives. It may still run, so it is more afterwards.
    async fn progress_of_orphan(&self, step: Step, subject: &Subject) -> u64 {
        let known = progress(&self.service, &subject.id);
        let alive = step.keeps_the_guest() && !self.service.vmms_of(&subject.id).is_empty();
        let told = if alive { known.await.ok() } else { None };
        told.unwrap_or(0).max(subject.progress)
    }
}

/// The points that the step reaches when nothing is killed.
async fn trace(bench: &mut Bench, step: Step) -> Result<Reached, Error> {
    let subject = bench.prepare(step).await?;
    bench.take_reached();
    let reply = bench.act(step, &subject).await?;
    let reached = bench.take_reached();
    bench.check(step, &subject, reply.as_ref(), subject.progress).await?;
    Ok(reached)
}

async fn every_point() -> Outcome {
    let mut reached = BTreeSet::new();
    for step in Step::ALL {
        let mut bench = Bench::start(step).await?;
        reached.extend(trace(&mut bench, step).await.map_err(|e| format!("{step:?}: {e}"))?.into_keys());
        bench.service.kill_supervisor()?;
        bench.service.start_supervisor().await?;
        reached.extend(bench.take_reached().into_keys());
    }
    let all: BTreeSet<_> = Point::ALL.iter().map(|point| point.name().to_owned()).collect();
    let left_out: Vec<_> = all.difference(&reached).collect();
    assert!(left_out.is_empty(), "no step reaches {left_out:?}");
    Ok(())
}

async fn crash(step: Step) -> Outcome {
    let mut bench = Bench::start(step).await?;
    let trace = trace(&mut bench, step).await?;
    let mut crashed_restarts = BTreeSet::new();
    let (mut crashes, mut missed) = (0, Vec::new());
    for (name, times) in &trace {
        for number in 1..=*times {
            let here = format!("{step:?} at {name} {number}");
            let restart =
                one_crash(&mut bench, step, (name, number), None).await.map_err(|e| format!("{here}: {e}"))?;
            let Some(restart) = restart else {
                missed.push((name.clone(), number));
                continue;
            };
            crashes += 1;
            for again in restart.into_keys().filter(|again| crashed_restarts.insert(again.clone())).collect::<Vec<_>>()
            {
                let here = format!("{here}, again at {again} of the restart");
                one_crash(&mut bench, step, (name, number), Some(&again)).await.map_err(|e| format!("{here}: {e}"))?;
                crashes += 1;
            }
        }
    }
    println!("{crashes} crashes; not reached again: {missed:?}");
    // Which of two things comes first may change how often a record is amended; every point is reached.
    assert!(missed.iter().all(|(_, number)| *number > 1), "{missed:?}");
    Ok(())
}

/// Kills the supervisor at `at` of the step, and at the first `again` of the restart. What the restart reached; `None` when it was not killed.
async fn one_crash(
    bench: &mut Bench,
    step: Step,
    at: (&str, u32),
    again: Option<&str>,
) -> Result<Option<Reached>, Error> {
    let subject = bench.prepare(step).await?;
    bench.take_reached();
    bench.arm(Some(at))?;
    let reply = bench.act(step, &subject).await?;
    let died = bench.reached().get(at.0).is_some_and(|times| *times >= at.1);
    if died {
        // It may be answered and not quite dead yet.
        tokio::time::timeout(PATIENCE, bench.death()).await?;
    }
    bench.arm(None)?;
    if !died {
        bench.check(step, &subject, reply.as_ref(), subject.progress).await?;
        return Ok(None);
    }
    let floor = bench.progress_of_orphan(step, &subject).await;
    bench.service.proxy.clear();
    bench.service.kill_supervisor()?;
    bench.take_reached();
    if let Some(again) = again {
        bench.arm(Some((again, 1)))?;
        bench.service.try_start_supervisor().await?;
        // What it does in the background may be what kills it.
        tokio::select! {
            settled = bench.settle(&subject) => if let Err(error) = settled {
                // Its connections break before it is dead for everybody to see.
                tokio::time::timeout(PATIENCE, bench.death()).await.map_err(|_| error)?;
            },
            () = bench.death() => {}
        }
        bench.arm(None)?;
        bench.service.kill_supervisor()?;
    }
    bench.service.start_supervisor().await?;
    bench.settle(&subject).await?;
    let reached = bench.take_reached();
    bench.check(step, &subject, reply.as_ref(), floor).await?;
    Ok(Some(reached))
}
