//! Does steps to a real service with real guests, and looks at everything after each.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stasis_api::dev::Fault;
use stasis_api::states::{Event, State};

use super::steps::{Ask, Life, Step};
use super::{Count, Expected, expected, last_commit};
use crate::invariants::{come_to_rest, is_usable, legal_moves, nothing_is_left, one_vmm_each, progress};
use crate::service::{Options, Reply, Service};
use crate::vmm::{Error, until};

/// Seconds that a short life lasts.
const SHORT_S: u32 = 2;
/// Sandboxes at once: their guests are busy all the time.
const SANDBOXES: usize = 3;
/// Domain of the apps that nobody serves.
const DOMAIN: &str = "box.test";

/// A sandbox as the model knows it.
struct Known {
    id: String,
    life: Life,
    count: Count,
    /// Its guest has done at least this, since the boot that it remembers.
    floor: u64,
    /// Moves at the last look.
    seen: usize,
    /// State at the last look.
    state: State,
    /// Its VMM was killed, or may have died of a fault, since it was created.
    hurt: bool,
    /// It was made of a snapshot, whose manifest its head names.
    restored: bool,
}

/// A run of steps over one service.
pub struct Run {
    service: Service,
    http: reqwest::Client,
    all: Vec<Known>,
    /// Names of snapshots that were answered.
    named: Vec<String>,
    /// Rules of the proxy may be in force.
    broken: bool,
    /// Something may still come late.
    late: bool,
}

impl Run {
    /// A fresh service.
    pub async fn start() -> Result<Self, Error> {
        let mut options = Options::default();
        let ours = [
            ("STASIS_DEADLINES_STORE_MS", "4000"),
            ("STASIS_DEADLINES_COMMIT_MS", "4000"),
            ("STASIS_DEADLINES_SETTLE_MS", "8000"),
            ("STASIS_DEADLINES_CONNECT_MS", "200"),
            ("STASIS_DEADLINES_PAUSE_RETRY_MS", "300"),
            ("STASIS_DOMAIN", DOMAIN),
        ];
        options.environment.extend(ours.map(|(name, value)| (name.to_owned(), value.to_owned())));
        let service = Service::start(options).await?;
        let http = reqwest::Client::builder().timeout(Duration::from_mins(2)).build()?;
        Ok(Self { service, http, all: Vec::new(), named: Vec::new(), broken: false, late: false })
    }

    /// All steps, a look after each, and the end.
    pub async fn run(&mut self, steps: &[Step]) -> Result<(), Error> {
        for (number, step) in steps.iter().enumerate() {
            let begun = Instant::now();
            let mut outcome = self.step(step).await;
            if outcome.is_ok() {
                outcome = self.look().await;
            }
            outcome.map_err(|e| format!("step {number}, {step:?}: {e}; log: {}", self.service.log()))?;
            tracing(number, step, begun.elapsed());
        }
        self.end().await.map_err(|e| format!("at the end: {e}; log: {}", self.service.log()).into())
    }

    async fn step(&mut self, step: &Step) -> Result<(), Error> {
        match step {
            Step::Create(life) => self.create(*life).await,
            Step::Restore => self.restore().await,
            Step::Ask(number, ask) => self.together(*number, &[*ask]).await,
            Step::Together(number, asks) => self.together(*number, asks).await,
            Step::KillVmm(number) => self.kill_vmm(*number).await,
            Step::KillSupervisor => self.kill_supervisor().await,
            Step::KillDuring(number, ask, ms) => self.kill_during(*number, *ask, Duration::from_millis(*ms)).await,
            Step::Break(broken) => {
                self.service.proxy.add(broken.rule());
                self.broken = true;
                self.late |= broken.comes_late() || broken.fault == Fault::LoseReply;
                Ok(())
            }
            Step::Mend => self.mend().await,
            Step::Wait(ms) => {
                tokio::time::sleep(Duration::from_millis(*ms)).await;
                Ok(())
            }
        }
    }

    async fn mend(&mut self) -> Result<(), Error> {
        let proxy = &self.service.proxy;
        proxy.clear();
        until("requests that hang or come late", || Ok(proxy.is_quiet().then_some(()))).await?;
        (self.broken, self.late) = (false, false);
        Ok(())
    }

    /// Nothing but the request decides what comes of it.
    fn is_calm(&self) -> bool {
        !self.broken && !self.late
    }

    fn pick(&self, number: usize) -> Option<usize> {
        number.checked_rem(self.all.len())
    }

    fn alive(&self) -> usize {
        self.all.iter().filter(|known| known.state != State::Deleted).count()
    }

    async fn create(&mut self, life: Life) -> Result<(), Error> {
        let short = life != Life::Long;
        let body = json!({
            "template_name": "test/pulse", "memory": 32, "auto_pause": life == Life::Pauses,
            "timeout": if short { SHORT_S } else { 3600 },
        });
        self.make("/v1/sandbox", body, life).await
    }

    async fn restore(&mut self) -> Result<(), Error> {
        match self.named.last() {
            Some(name) => {
                let body = json!({"snapshot_name": name, "timeout": 3600});
                self.make("/v1/snapshot/restore", body, Life::Long).await
            }
            None => Ok(()),
        }
    }

    async fn make(&mut self, path: &str, body: Value, life: Life) -> Result<(), Error> {
        if self.alive() >= SANDBOXES {
            return Ok(());
        }
        let reply = self.service.call("POST", path, Some(body)).await?;
        if reply.status != 201 {
            if self.is_calm() || reply.status < 500 {
                return Err(format!("not made: {reply:?}").into());
            }
            return Ok(());
        }
        self.all.push(Known {
            id: reply.text("id"),
            life,
            count: Count::default(),
            floor: 0,
            seen: 0,
            state: State::Running,
            hurt: self.broken,
            restored: path.ends_with("restore"),
        });
        Ok(())
    }

    /// Sends all at once.
    async fn together(&mut self, number: usize, asks: &[Ask]) -> Result<(), Error> {
        let Some(number) = self.pick(number) else { return Ok(()) };
        let before = self.before(number).await?;
        let requests: Vec<_> = asks.iter().map(|ask| self.ask(number, *ask)).collect();
        let replies = futures::future::join_all(requests).await;
        let mut answered = Vec::new();
        for (ask, reply) in asks.iter().zip(replies) {
            answered.push((*ask, Some(reply?)));
        }
        self.answered(number, &before, &answered).await
    }

    /// Facts that what comes is measured by.
    async fn before(&self, number: usize) -> Result<Before, Error> {
        let known = &self.all[number];
        let running = known.state == State::Running;
        // It may have been paused or deleted by itself since it was looked at.
        let told = if running { progress(&self.service, &known.id).await } else { Ok(0) };
        let progress = match told {
            Err(error) if known.life == Life::Long && !known.hurt => return Err(error),
            told => told.unwrap_or(0),
        };
        let moves = legal_moves(&self.service, &known.id)?;
        let commit = last_commit(&moves).or(known.restored.then_some(State::Paused));
        Ok(Before { state: known.state, commit, progress, moves: moves.len() })
    }

    /// Counts what was asked and answered, and compares it with the model.
    async fn answered(
        &mut self,
        number: usize,
        before: &Before,
        replies: &[(Ask, Option<Reply>)],
    ) -> Result<(), Error> {
        let calm = self.is_calm();
        let known = &mut self.all[number];
        for (ask, reply) in replies {
            known.count.asked(*ask);
            let Some(reply) = reply else { continue };
            // What a request to an app is answered is the app's.
            if (200..300).contains(&reply.status) && *ask != Ask::Invoke {
                known.count.succeeded(*ask);
            }
            if *ask == Ask::Snapshot && reply.status == 201 {
                self.named.push(reply.text("name"));
            }
            if calm && !known.hurt && reply.status >= 500 && *ask != Ask::Invoke {
                return Err(format!("{ask:?} failed though nothing is broken: {reply:?}").into());
            }
        }
        let id = known.id.clone();
        come_to_rest(&self.service, &id).await?;
        let moves = legal_moves(&self.service, &id)?;
        let new = moves.get(before.moves..).unwrap_or_default();
        let made = |event: Event| new.iter().filter(|(made, _)| *made == event).count();
        let succeeded = |ask: Ask, status: u16| {
            replies.iter().any(|(asked, reply)| *asked == ask && reply.as_ref().is_some_and(|r| r.status == status))
        };
        if succeeded(Ask::Resume, 200) && made(Event::Resume) == 0 {
            return Err(format!("a resume was answered, and there was none: {new:?}").into());
        }
        let only = |wanted: &[Ask]| replies.iter().all(|(ask, _)| wanted.contains(ask));
        let steady = calm && self.all[number].life == Life::Long && !self.all[number].hurt;
        if steady && before.state == State::Paused && only(&[Ask::Resume, Ask::Invoke]) && made(Event::Resume) != 1 {
            return Err(
                format!("{} requests to a paused one caused {} wakes", replies.len(), made(Event::Resume)).into()
            );
        }
        let known = &mut self.all[number];
        if succeeded(Ask::Pause, 201) && made(Event::Committed) > 0 && !new.iter().any(|(_, to)| *to == State::Starting)
        {
            known.floor = known.floor.max(before.progress);
        }
        if new.iter().any(|(event, to)| *event == Event::Stored || *to == State::Starting || *to == State::Stopped) {
            known.floor = 0;
        }
        if let [(ask, Some(reply))] = replies
            && steady
        {
            let Expected { status, state } = expected(before.state, before.commit, *ask);
            let now = moves.last().map(|(_, state)| *state);
            if status.is_some_and(|status| status != reply.status) || now != Some(state) {
                return Err(format!(
                    "{ask:?} of one that was {}: the model says {status:?} and {state}, it is {now:?} after {reply:?}",
                    before.state
                )
                .into());
            }
        }
        Ok(())
    }

    /// One request.
    async fn ask(&self, number: usize, ask: Ask) -> Result<Reply, Error> {
        let id = &self.all[number].id;
        let path = |verb: &str| format!("/v1/sandbox/{id}/{verb}");
        let (method, path, body) = match ask {
            Ask::Get => ("GET", format!("/v1/sandbox/{id}"), None),
            Ask::Delete => ("DELETE", format!("/v1/sandbox/{id}"), None),
            Ask::Pause => ("POST", path("pause"), None),
            Ask::Resume => ("POST", path("resume"), None),
            Ask::Stop => ("POST", path("stop"), None),
            Ask::Start => ("POST", path("start"), None),
            Ask::Undelete => ("POST", path("undelete"), None),
            Ask::Snapshot => ("POST", path("snapshot/create"), Some(json!({}))),
            Ask::Invoke => return self.invoke(id).await,
        };
        self.service.call(method, &path, body).await
    }

    async fn invoke(&self, id: &str) -> Result<Reply, Error> {
        let request = self.http.get(&self.service.url).header("host", format!("{id}-80.{DOMAIN}"));
        let answer = request.bearer_auth(&self.service.key).send().await?;
        let status = answer.status().as_u16();
        let json = serde_json::from_slice(&answer.bytes().await?).unwrap_or(Value::Null);
        Ok(Reply { status, json, timing: String::new(), retry_after: None })
    }

    async fn kill_vmm(&mut self, number: usize) -> Result<(), Error> {
        let Some(number) = self.pick(number) else { return Ok(()) };
        let (id, pids) = (self.all[number].id.clone(), self.service.vmms_of(&self.all[number].id));
        if pids.is_empty() {
            return Ok(());
        }
        self.all[number].hurt = true;
        let moves = legal_moves(&self.service, &id)?.len();
        for pid in pids {
            kill(pid);
        }
        // It is noticed: the sandbox goes back to where it was last, or its pause by itself has just won.
        let noticed = || legal_moves(&self.service, &id).is_ok_and(|now| now.len() > moves);
        until("a killed VMM that is noticed", || Ok(noticed().then_some(()))).await
    }

    async fn kill_supervisor(&mut self) -> Result<(), Error> {
        self.service.kill_supervisor()?;
        // It does not start on a store that it cannot probe.
        self.mend().await?;
        self.service.start_supervisor().await
    }

    async fn kill_during(&mut self, number: usize, ask: Ask, after: Duration) -> Result<(), Error> {
        let Some(number) = self.pick(number) else { return self.kill_supervisor().await };
        let before = self.before(number).await?;
        let pid = self.service.supervisor_pid();
        let killing = async {
            tokio::time::sleep(after).await;
            kill(pid);
        };
        let (reply, ()) = tokio::join!(self.ask(number, ask), killing);
        self.kill_supervisor().await?;
        // A request that is cut off may have begun or not. What had to be done and was not is said with a reason.
        self.late = true;
        let outcome = self.answered(number, &before, &[(ask, reply.ok())]).await;
        self.late = false;
        outcome
    }

    /// Everything that must hold now.
    async fn look(&mut self) -> Result<(), Error> {
        self.find_unanswered()?;
        for known in &mut self.all {
            let (told, moves) = seen_at_rest(&self.service, &known.id).await?;
            let (_, state) = *moves.last().ok_or("a sandbox without a move")?;
            let new = &moves[known.seen.min(moves.len())..];
            let lost =
                new.iter().find(|(event, _)| matches!(event, Event::Lost | Event::LostCommitted | Event::LostStored));
            if let Some((event, _)) = lost
                && !known.hurt
                && !self.broken
                && !self.late
            {
                return Err(format!("{} was lost ({event:?}) though nobody hurt it: {told}", known.id).into());
            }
            known.hurt |= lost.is_some();
            let by_itself = known.life != Life::Long;
            if let Some(why) = known.count.contradiction(&moves, by_itself) {
                return Err(format!("{}: {why}; its moves: {moves:?}", known.id).into());
            }
            let gone_unasked = state == State::Deleted && !moves.iter().any(|(event, _)| *event == Event::Gone);
            if gone_unasked && told["reason"].as_str().is_none_or(str::is_empty) {
                return Err(format!("{} is lost without a reason: {told}", known.id).into());
            }
            if new.iter().any(|(_, to)| matches!(to, State::Stopped | State::Starting)) {
                known.floor = 0;
            }
            (known.seen, known.state) = (moves.len(), state);
            known.hurt &= self.broken || self.late;
        }
        one_vmm_each(&self.service, self.all.iter().map(|known| &known.id))?;
        for known in &self.all {
            if known.state == State::Running && known.life == Life::Long && !known.hurt {
                let done = progress(&self.service, &known.id).await?;
                if done < known.floor {
                    return Err(format!("{} had come to {} and is back at {done}", known.id, known.floor).into());
                }
            }
        }
        Ok(())
    }

    /// Sandboxes whose create was not answered: the journal knows them, and so does the model from now on.
    fn find_unanswered(&mut self) -> Result<(), Error> {
        let ids: Vec<String> =
            self.service.journal()?.records()?.into_iter().map(|record| record.id.to_string()).collect();
        for id in ids {
            if !self.all.iter().any(|known| known.id == id) {
                self.all.push(Known {
                    id,
                    life: Life::Ends,
                    count: Count::default(),
                    floor: 0,
                    seen: 0,
                    state: State::Deleted,
                    hurt: true,
                    restored: false,
                });
            }
        }
        Ok(())
    }

    /// Nothing is broken any more: whatever is not deleted can be used, what snapshots hold is there, and in the end nothing is left.
    async fn end(&mut self) -> Result<(), Error> {
        self.mend().await?;
        self.look().await?;
        let mut floors = BTreeMap::new();
        for known in &self.all {
            if known.state != State::Deleted && known.life != Life::Ends {
                let done = is_usable(&self.service, &known.id).await;
                // A short life may end under the very look.
                let done = match done {
                    Err(_) if known.life != Life::Long => continue,
                    done => done?,
                };
                if done < known.floor {
                    return Err(format!("{} had come to {} and is back at {done}", known.id, known.floor).into());
                }
                floors.insert(known.id.clone(), done);
            }
        }
        legal(&self.service, &self.all)?;
        nothing_is_left(&self.service, self.all.iter().map(|known| &known.id)).await?;
        legal(&self.service, &self.all)
    }
}

/// What the API says and the moves that led there, at one time: a life may end between two looks.
async fn seen_at_rest(service: &Service, id: &str) -> Result<(Value, Vec<(Event, State)>), Error> {
    let begun = Instant::now();
    loop {
        let told = come_to_rest(service, id).await?;
        let moves = legal_moves(service, id)?;
        if moves.last().map(|(_, state)| state.as_str()) == told["state"].as_str() {
            return Ok((told, moves));
        }
        if begun.elapsed() > Duration::from_mins(1) {
            return Err(format!("{id} is {told} and its moves are {moves:?}").into());
        }
    }
}

struct Before {
    state: State,
    commit: Option<State>,
    progress: u64,
    moves: usize,
}

fn legal(service: &Service, all: &[Known]) -> Result<(), Error> {
    all.iter().try_for_each(|known| legal_moves(service, &known.id).map(drop))
}

fn kill(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// Where the time goes, for whoever watches a long run.
fn tracing(number: usize, step: &Step, took: Duration) {
    if std::env::var_os("STASIS_MODEL_SECONDS").is_some() {
        eprintln!("{:5} ms  {number} {step:?}", took.as_millis());
    }
}
