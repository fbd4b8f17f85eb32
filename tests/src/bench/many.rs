//! Many sandboxes paused at once: all durable, none much later than the others, as fast as the bottleneck lets their bytes through.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::bare::Bare;
use super::case::{Case, Wake};
use super::process::own_cpu;
use super::samples::{Samples, percentile};
use super::stasis::{CONNECTIONS, Home, Setting, stored};
use crate::vmm::Error;

/// Each run pauses one sandbox alone, then creates the case's sandboxes, pauses all of them in the same moment, and moves the same bytes bare.
pub async fn measure(case: &Case, samples: &mut Samples) -> Result<(), Error> {
    let bare = Bare::new(CONNECTIONS)?;
    let home = Home::start(case, Setting::Wakes(Wake::Cold)).await?;
    for _ in 0..case.runs {
        let (one, _) = home.create().await?;
        let alone = home.pause(&one).await?;
        samples.time("first_pause.alone", alone.took);
        home.delete(&one).await?;

        let mut ids = Vec::new();
        for _ in 0..case.sandboxes {
            ids.push(home.create().await?.0);
        }
        let (total, sizes, sent) = all_at_once(&home, &ids, samples).await?;
        let at_that_rate = alone.took.as_secs_f64() * sent as f64 / alone.sent.max(1) as f64;
        samples.time("first_pause.all", total);
        samples.time("first_pause.all_at_the_rate_of_one", Duration::from_secs_f64(at_that_rate));
        samples.bytes("bytes_sent.all", sent);
        samples.bytes("bytes_changed.all", (u64::from(case.used_mib) * u64::from(case.sandboxes)) << 20);
        let cpu = own_cpu();
        samples.time("bare_upload.all", bare.upload(home.store.as_ref(), "bare", &sizes).await?);
        samples.time("bare_upload.all.cpu", own_cpu().saturating_sub(cpu));
        bare.clear(home.store.as_ref(), "bare", sizes.len()).await?;
        for id in ids {
            come_back(&home, &id).await?;
        }
    }
    Ok(())
}

/// How long it took, sizes of all packs, bytes sent.
async fn all_at_once(home: &Home, ids: &[String], samples: &mut Samples) -> Result<(Duration, Vec<u64>, u64), Error> {
    let (cpu, vmms) = (home.cpu(), home.service.vmm_pids());
    let begun = Instant::now();
    let pauses = ids.iter().map(|id| async move {
        let reply = home.service.pause(id).await;
        (reply, begun.elapsed())
    });
    let pauses = futures::future::join_all(pauses).await;
    let total = begun.elapsed();
    home.ended(&vmms).await?;
    samples.add("cpu", "s", home.cpu().saturating_sub(cpu).as_secs_f64());
    let (mut all_sizes, mut all_sent, mut latencies) = (Vec::new(), 0, Vec::new());
    for (id, (reply, took)) in ids.iter().zip(pauses) {
        reply.and_then(|reply| reply.expect(201)).map_err(|e| format!("{id}: {e}; {}", home.service.log()))?;
        samples.time("first_pause", took);
        latencies.push(took.as_secs_f64());
        // It was never paused before: all that the store has of it is of this pause.
        let (sizes, sent) = stored(&BTreeMap::new(), &home.objects(id).await?);
        all_sizes.extend(sizes);
        all_sent += sent;
    }
    if let (Some(median), Some(slowest)) = (percentile(&mut latencies, 50), percentile(&mut latencies, 100)) {
        samples.add("first_pause.slowest_to_median", "ratio", slowest / median);
    }
    Ok((total, all_sizes, all_sent))
}

/// Durable: it wakes from the store, with what it held, since pulse looks at every page of its hot set.
async fn come_back(home: &Home, id: &str) -> Result<(), Error> {
    let state = home.service.state(id).await?;
    if state != "paused" {
        return Err(format!("{id} is {state}, not paused").into());
    }
    home.service.resume(id).await?.expect_success()?;
    home.settle(id).await?;
    if home.service.console(id).contains('!') {
        return Err(format!("{id} has lost memory").into());
    }
    home.delete(id).await
}
