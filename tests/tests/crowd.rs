//! Many sandboxes at once, and many requests at once to sleeping ones, with pulse guests on this machine's own `/dev/kvm`.

use std::future::Future;

use futures::future::try_join_all;
use serde_json::json;
use stasis_tests::invariants::{legal_moves, nothing_is_left, one_vmm_each, progress};
use stasis_tests::service::{Options, Reply, Service};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::{Error, no_pulse};

/// Sandboxes.
const CROWD: usize = 50;
/// Requests at once to one.
const STORM: usize = 100;

fn main() {
    Suite::default()
        .test("fifty_sandboxes_are_made_paused_and_woken_at_once", no_pulse(), fifty)
        .test("storms_on_several_sandboxes_wake_each_once", no_pulse(), storms)
        .main();
}

/// All must succeed with this status.
async fn all(
    replies: impl Iterator<Item = impl Future<Output = Result<Reply, Error>>>,
    status: u16,
) -> Result<Vec<Reply>, Error> {
    try_join_all(replies).await?.into_iter().map(|reply| reply.expect(status)).collect()
}

async fn counted(service: &Service, kind: &str) -> Result<(u64, u64), Error> {
    Ok((service.operations(kind, "ok").await?, service.operations(kind, "error").await?))
}

async fn fifty() -> Outcome {
    let mut options = Options::default();
    // Fifty guests that are never idle share two processors with everything else here.
    options.environment.extend(
        ["BOOT", "CONTROL", "CAPTURE", "RESTORE", "STORE", "COMMIT", "SETTLE"]
            .map(|name| (format!("STASIS_DEADLINES_{name}_MS"), "240000".to_owned())),
    );
    let service = Service::start(options).await?;
    let create = || {
        let body = json!({"template_name": "test/pulse", "memory": 32, "timeout": 3600});
        service.call("POST", "/v1/sandbox", Some(body))
    };
    let made = all((0..CROWD).map(|_| create()), 201).await?;
    let ids: Vec<String> = made.iter().map(|reply| reply.text("id")).collect();
    assert_eq!(service.vmm_pids().len(), CROWD);
    let mut done = Vec::new();
    for id in &ids {
        done.push(progress(&service, id).await?);
    }
    all(ids.iter().map(|id| service.pause(id)), 201).await?;
    service.await_no_vmm().await?;
    all(ids.iter().map(|id| service.resume(id)), 200).await?;
    one_vmm_each(&service, &ids)?;
    assert_eq!(service.vmm_pids().len(), CROWD);
    for (id, before) in ids.iter().zip(done) {
        service.pulse_is_well(id).await?;
        assert!(progress(&service, id).await? > before, "{id} has lost something");
    }
    let crowd = CROWD as u64;
    assert_eq!(counted(&service, "create").await?, (crowd, 0));
    assert_eq!(counted(&service, "pause").await?, (crowd, 0));
    assert_eq!(counted(&service, "resume").await?, (crowd, 0));
    for id in &ids {
        legal_moves(&service, id)?;
    }
    let delete = async |id: &String| service.call("DELETE", &format!("/v1/sandbox/{id}"), None).await;
    all(ids.iter().map(delete), 204).await?;
    nothing_is_left(&service, &ids).await
}

async fn storms() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let ids = try_join_all((0..4).map(|_| service.create_pulse())).await?;
    for round in 1..=3 {
        all(ids.iter().map(|id| service.pause(id)), 201).await?;
        let requests = (0..STORM).flat_map(|_| &ids).map(|id| service.resume(id));
        let replies = try_join_all(requests).await?;
        // Who asks when it is over is told that it runs.
        for reply in &replies {
            assert!(reply.status == 200 || reply.text("message").contains("is running"), "{reply:?}");
        }
        assert_eq!(counted(&service, "resume").await?, (round * ids.len() as u64, 0), "one wake each");
        one_vmm_each(&service, &ids)?;
        for id in &ids {
            service.pulse_is_well(id).await?;
        }
    }
    nothing_is_left(&service, &ids).await
}
