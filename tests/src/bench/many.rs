//! Many sandboxes paused at once: all durable, none much later than the others, as fast as the bottleneck lets their bytes through.

use std::time::{Duration, Instant};

use super::bare::Bare;
use super::case::{Case, Wake};
use super::samples::Samples;
use super::stasis::{CONNECTIONS, Home, Setting};
use crate::vmm::Error;

/// Each run creates the case's sandboxes, pauses all of them in the same moment, and moves the same bytes bare.
pub async fn measure(case: &Case) -> Result<Samples, Error> {
    let mut samples = Samples::default();
    let bare = Bare::new(CONNECTIONS)?;
    let home = Home::start(case, Setting::Wakes(Wake::Cold)).await?;
    for _ in 0..case.runs {
        let mut ids = Vec::new();
        for _ in 0..case.sandboxes {
            ids.push(home.create().await?.0);
        }
        let begun = Instant::now();
        let cpu = home.cpu();
        let pauses = futures::future::join_all(ids.iter().map(|id| home.pause(id))).await;
        let (total, cpu) = (begun.elapsed(), home.cpu().saturating_sub(cpu));
        let (mut sizes, mut sent, mut slowest, mut latencies) = (Vec::new(), 0, Duration::ZERO, Vec::new());
        for (id, paused) in ids.iter().zip(pauses) {
            let paused = paused.map_err(|e| format!("{id}: {e}; {}", home.service.log()))?;
            samples.time("first_pause", paused.took);
            latencies.push(paused.took);
            slowest = slowest.max(paused.took);
            sent += paused.sent;
            sizes.extend(paused.packs);
        }
        latencies.sort();
        if let Some(median) = latencies.get(latencies.len().saturating_sub(1) / 2) {
            samples.add("first_pause.slowest_to_median", "ratio", slowest.as_secs_f64() / median.as_secs_f64());
        }
        samples.time("first_pause.all", total);
        samples.bytes("bytes_sent.all", sent);
        samples.add("cpu", "s", cpu.as_secs_f64());
        let alone = bare.upload(home.store.as_ref(), "bare", &sizes).await?;
        samples.time("bare_upload.all", alone);
        bare.clear(home.store.as_ref(), "bare", sizes.len()).await?;
        for id in ids {
            if home.service.state(&id).await? != "paused" {
                return Err(format!("{id} is not paused").into());
            }
            // Durable: it comes back, with what it held.
            home.service.resume(&id).await?.expect_success()?;
            home.settle(&id).await?;
            if home.service.console(&id).contains('!') {
                return Err(format!("{id} has lost memory").into());
            }
            home.delete(&id).await?;
        }
    }
    Ok(samples)
}
