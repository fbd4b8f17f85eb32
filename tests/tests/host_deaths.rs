//! A host dies between any two store operations, and with any of them under way: supervisor and VMMs are killed at once, and the next supervisor
//! finds the last committed epoch.
//!
//! The proxy cuts the host off at its n-th request, for each n until the operation gets by with fewer: once before the request is applied, and
//! once after it, with the reply lost.

use std::time::Duration;

use serde_json::json;
use stasis_api::dev::{Fault, Rule};
use stasis_snapshot::commit::Head;
use stasis_tests::invariants::{come_to_rest, is_usable, legal_moves, nothing_is_left, one_vmm_each};
use stasis_tests::service::{Options, Service};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::{Error, no_pulse, until};

fn main() {
    let mut suite = Suite::default();
    for act in [Act::Pause, Act::Resume, Act::Snapshot, Act::Stop] {
        let name = format!("a_host_that_dies_at_any_store_operation_of_a_{}_loses_no_commit", act.name());
        suite = suite.test(&name, no_pulse(), move || deaths(act));
    }
    suite.main();
}

/// What the host is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Pause,
    Resume,
    Snapshot,
    Stop,
}

impl Act {
    fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Snapshot => "snapshot",
            Self::Stop => "stop",
        }
    }

    async fn ask(self, service: &Service, id: &str) -> Result<u16, Error> {
        let (path, body) = match self {
            Self::Snapshot => ("snapshot/create", Some(json!({}))),
            _ => (self.name(), None),
        };
        Ok(service.call("POST", &format!("/v1/sandbox/{id}/{path}"), body).await?.status)
    }
}

/// The head in the bucket, as it is.
fn head(service: &Service, id: &str) -> Result<Head, Error> {
    let found = service.objects(&format!("v1/test/sandbox/{id}/head"));
    Ok(Head::decode(&std::fs::read(found.first().ok_or("there is no head")?)?)?)
}

/// Everything of this host that has to do with the sandbox ends at once.
async fn die(service: &mut Service, id: &str) -> Result<(), Error> {
    service.kill_supervisor()?;
    for pid in service.vmms_of(id) {
        let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).ok_or("no pid")?;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    }
    until("the end of its VMM", || Ok(service.vmms_of(id).is_empty().then_some(()))).await
}

/// Cuts the host off at request `n`. `false`: it was done with fewer.
async fn cut_off(service: &Service, id: &str, act: Act, n: usize, applied: bool) -> Result<bool, Error> {
    service.proxy.take_seen();
    let everything = |fault| Rule { method: None, path: String::new(), skip: n, times: usize::MAX, fault };
    if applied {
        service.proxy.add(Rule { times: 1, ..everything(Fault::LoseReply) });
    }
    service.proxy.add(everything(Fault::Hang));
    let treated = async {
        let mut seen = Vec::new();
        let first = until("the request", || {
            seen.extend(service.proxy.take_seen().into_iter().filter(|seen| seen.fault.is_some()));
            Ok((!seen.is_empty()).then_some(()))
        });
        // Without an answer it waits for as long as the operation does.
        let _ = first.await;
        // What is passed on is applied within this time, and who waits for its reply may send it again.
        tokio::time::sleep(Duration::from_millis(if applied { 100 } else { 0 })).await;
    };
    Ok(tokio::select! {
        biased;
        () = treated => true,
        _ = act.ask(service, id) => {
            // It may be answered before what it leaves to the background.
            !service.proxy.take_seen().iter().all(|seen| seen.fault.is_none())
        }
    })
}

async fn deaths(act: Act) -> Outcome {
    let mut options = Options::default();
    // Memory that is kept needs no store.
    options.environment.push(("STASIS_KEEP_MEMORY_MIB".to_owned(), "0".to_owned()));
    let mut service = Service::start(options).await?;
    let id = service.create_pulse().await?;
    service.pause(&id).await?.expect(201)?;
    let mut deaths = 0;
    // What the last commit is, and what the guest had done at least when it was made.
    let (mut rest, mut safe) = ("paused", 0);
    for applied in [false, true] {
        for n in 0.. {
            let done = is_usable(&service, &id).await?;
            if act == Act::Resume {
                service.pause(&id).await?.expect(201)?;
                safe = done;
            }
            let before = head(&service, &id)?;
            if !cut_off(&service, &id, act, n, applied).await? {
                service.proxy.clear();
                come_to_rest(&service, &id).await?;
                (rest, safe) = match act {
                    Act::Pause => ("paused", done),
                    Act::Stop => ("stopped", 0),
                    Act::Resume | Act::Snapshot => (rest, safe),
                };
                break;
            }
            let here = format!("{act:?} at request {n}, applied: {applied}");
            die(&mut service, &id).await?;
            service.proxy.clear();
            let committed = head(&service, &id)?;
            service.start_supervisor().await?;
            let told = come_to_rest(&service, &id).await.map_err(|e| format!("{here}: {e}"))?;
            let found = head(&service, &id)?;
            assert!(found.epoch >= committed.epoch && found.seq >= committed.seq, "{here}: {found:?}");
            if committed.manifest != before.manifest {
                assert_eq!(found.manifest, committed.manifest, "{here}: another commit than the last one");
            }
            // A head that was journaled and had not reached the store is sent again: then that commit is the last one.
            if found.manifest != before.manifest {
                // A guest that was stopped boots, and begins to count anew.
                (rest, safe) = if act == Act::Stop { ("stopped", 0) } else { ("paused", done) };
            }
            assert_eq!(told["state"], rest, "{here}: {told}");
            let verified = service.stasis(&["verify", &id]).await?;
            assert_eq!(verified.code, 0, "{here}: {verified:?}");
            let back = is_usable(&service, &id).await.map_err(|e| format!("{here}: {e}"))?;
            assert!(back >= safe, "{here}: {safe} was committed, and it is back at {back}");
            one_vmm_each(&service, [&id])?;
            legal_moves(&service, &id)?;
            deaths += 1;
        }
    }
    println!("{act:?}: {deaths} deaths");
    // A stop of a guest without disks stores no pack.
    let least = if act == Act::Stop { 3 } else { 4 };
    assert!(deaths >= least, "only {deaths} deaths");
    nothing_is_left(&service, [&id]).await
}
