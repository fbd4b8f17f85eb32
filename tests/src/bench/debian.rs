//! A Debian guest with its agent, where the CPU has VT-x or AMD-V. Memory is filled and changed by commands; a wake ends with the agent's answer.

use std::time::Instant;

use serde_json::json;

use super::bare::Bare;
use super::case::{Case, Wake};
use super::samples::Samples;
use super::stasis::{CONNECTIONS, Home, Setting};
use crate::host;
use crate::vmm::Error;

/// Why it cannot be measured here.
pub fn lacking() -> Option<String> {
    let image = host::built("images/templates/debian-bookworm/template.json");
    host::no_linux_guest().or_else(|| host::missing(&image, "guest-images/linux/build makes it"))
}

async fn run(home: &Home, id: &str, command: &str) -> Result<(), Error> {
    let body = json!({"command": command, "timeout": 120});
    let done =
        home.service.call("POST", &format!("/v1/sandbox/{id}/process/execute"), Some(body)).await?.expect(200)?;
    if done.json["exit_code"] == json!(0) { Ok(()) } else { Err(format!("{command}: {:?}", done.json).into()) }
}

/// Pauses and wakes as of pulse, without what only pulse shows.
pub async fn measure(case: &Case, samples: &mut Samples) -> Result<(), Error> {
    let bare = Bare::new(CONNECTIONS)?;
    for wake in [Wake::Hot, Wake::Warm, Wake::Cold] {
        let home = Home::start(case, Setting::Wakes(wake)).await?;
        for _ in 0..case.runs {
            let body = json!({"template_name": "system/debian:bookworm", "memory": case.memory_mib});
            let id = home.service.call("POST", "/v1/sandbox", Some(body)).await?.expect(201)?.text("id");
            run(&home, &id, &format!("head -c {}M /dev/urandom > /dev/shm/used", case.used_mib)).await?;
            let first = home.pause(&id).await?;
            samples.time("first_pause", first.took);
            samples.bytes("bytes_sent.first", first.sent);
            samples.time("bare_upload.first", bare.upload(home.store.as_ref(), "bare", &first.packs).await?);
            home.service.resume(&id).await?.expect_success()?;
            let change = format!("dd if=/dev/urandom of=/dev/shm/used bs=1M count={} conv=notrunc", case.changed_mib);
            run(&home, &id, &change).await?;
            let repeat = home.pause(&id).await?;
            samples.time("repeat_pause", repeat.took);
            samples.time("repeat_pause.cpu", repeat.cpu);
            samples.add("cpu", "s", repeat.cpu.as_secs_f64());
            samples.bytes("bytes_sent", repeat.sent);
            if let Some(requests) = repeat.requests {
                samples.add("requests", "count", requests as f64);
            }
            samples.time("bare_upload", bare.upload(home.store.as_ref(), "bare", &repeat.packs).await?);
            samples.time("bare_download", bare.download(home.store.as_ref(), "bare", repeat.packs.len()).await?);
            let begun = Instant::now();
            run(&home, &id, "true").await?;
            // The request wakes the sandbox: its answer is the agent's first.
            samples.time(format!("resume_{}", wake.word()), begun.elapsed());
            home.overhead(&id)?.note(samples);
            home.delete(&id).await?;
        }
    }
    Ok(())
}
