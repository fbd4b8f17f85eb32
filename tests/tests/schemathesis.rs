//! The server against its own description: requests that the description allows, and requests that it forbids, made from it by schemathesis.
//! Guests are pulse's, which have no agent: what a fuzzer writes and deletes must reach nobody's files.

use std::path::PathBuf;

use serde_json::json;
use stasis_api::dev::layout::{Entry, Layout, Packing, archive};
use stasis_tests::host;
use stasis_tests::service::{Options, Service, boots_images};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::{no_pulse, pulse};

/// The template of requests that name none.
const TEMPLATE: &str = "system/debian:bookworm";

fn main() {
    Suite::default()
        .test("the_server_does_what_its_description_says", no_pulse().or_else(no_schemathesis), conforms)
        .main();
}

fn no_schemathesis() -> Option<String> {
    host::missing(&host::built("sdk/schemathesis/installed"), "tests/sdk/venvs makes it")
}

#[expect(clippy::disallowed_methods, reason = "schemathesis is a program")]
async fn conforms() -> Outcome {
    let images = host::scratch()?;
    let template = images.path().join("templates/pulse");
    std::fs::create_dir_all(&template)?;
    // As much memory as the description says a sandbox has at least; little of it is ever touched.
    let description = json!({
        "name": TEMPLATE, "kernel": pulse(), "disk_mib": 0, "min_memory_mib": 512,
        "cmdline": "fill=1 hot=1 mix=real count=1", "ready": {"serial": "R\n"},
    });
    std::fs::write(template.join("template.json"), description.to_string())?;
    let layer = archive(&[Entry::file("etc/motd", "hello")]);
    Layout::new(&json!({}), &[(Packing::Plain, layer)])?.write(&images.path().join("image"), "v1")?;
    let local_dir = images.path().display().to_string();
    let boot = boots_images(images.path())?;
    let mut options = Options { images: Some(images.path().to_owned()), ..Options::default() };
    let ours = [
        // Few guests at once, so that most creates are refused at once; as many requests as it likes.
        ("STASIS_LIMITS_SANDBOXES", "4"),
        ("STASIS_LIMITS_REQUESTS_PER_MINUTE", "0"),
        ("STASIS_TEMPLATES_LOCAL_DIR", local_dir.as_str()),
        ("STASIS_TEMPLATES_BOOT", boot),
        ("STASIS_TEMPLATES_DISK_MIB", "64"),
        ("STASIS_TEMPLATES_IMAGE_MIB", "16"),
    ];
    options.environment.extend(ours.map(|(name, value)| (name.to_owned(), value.to_owned())));
    let service = Service::start(options).await?;

    let run = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("schemathesis/run");
    let mut command = std::process::Command::new(run);
    command.args([&service.url, &service.key, TEMPLATE, "oci:image:v1"]);
    command.env("STASIS_SCHEMATHESIS_DIR", service.dir.path());
    // A longer run: `STASIS_SCHEMATHESIS="--max-examples 200 --seed 7"`.
    command.args(std::env::var("STASIS_SCHEMATHESIS").unwrap_or_default().split_whitespace());
    // Beside the runtime: the S3 server is one of its tasks.
    let ran = tokio::task::spawn_blocking(move || command.output()).await??;
    let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
    if let Some(summary) = said.rfind("= SUMMARY =") {
        eprintln!("{}", &said[summary..]);
    }
    if !ran.status.success() {
        return Err(format!("schemathesis: {}\n{said}", ran.status).into());
    }
    // Nothing that it did has hurt the supervisor.
    service.call("GET", "/healthz", None).await?.expect(200)?;
    assert!(!service.log().contains("panicked"), "the supervisor panicked: {}", service.log());
    Ok(())
}
