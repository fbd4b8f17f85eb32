//! `stasis serve` and `stasis dev`: start a supervisor and wait for the end.

use super::args::{Dev, Serve};
use super::output::{self, tell};
use super::profile::{self, Profile};
use super::{ExitStatus, Failure};
use crate::config::{Config, Setting, from_environment};
use crate::dev::EmbeddedS3;
use crate::error::Error;
use crate::fail_points;
use crate::front::authority::Authority;
use crate::invoke::Domain;
use crate::journal::{Journal, JournalError};
use crate::sources::Sources;
use crate::supervisor::{JOURNAL, Supervisor};
use std::io::IsTerminal as _;
use std::path::PathBuf;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Tenant of the key that `stasis dev` makes.
const DEV_TENANT: &str = "dev";
const DEV_BUCKET: &str = "stasis";
/// Below `localhost`, so that its names lead to this machine.
const DEV_DOMAIN: &str = "sandbox.localhost";

fn log_to_stderr(default: &str) {
    let filter = EnvFilter::try_from_env("STASIS_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let plain = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty()) || !std::io::stderr().is_terminal();
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(!plain);
    // A second start in one process (a test) keeps the first subscriber.
    let _ = if std::env::var_os("STASIS_LOG_JSON").is_some() {
        subscriber.json().try_init()
    } else {
        subscriber.try_init()
    };
}

fn started(error: &Error) -> Failure {
    let status = if error.status().as_u16() == 503 || error.status().as_u16() == 502 {
        ExitStatus::Unavailable
    } else {
        ExitStatus::Other
    };
    Failure::new(status, format!("cannot start: {}", error.chain()))
}

/// Until it is told to end.
async fn ended() -> Result<(), Failure> {
    let mut terminated =
        signal(SignalKind::terminate()).map_err(|e| Failure::other(format!("cannot wait for signals: {e}")))?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result.map_err(|e| Failure::other(format!("cannot wait for signals: {e}"))),
        _ = terminated.recv() => Ok(()),
    }
}

pub(super) async fn serve(serve: Serve) -> Result<ExitStatus, Failure> {
    log_to_stderr("info");
    if let Some(dir) = std::env::var_os(fail_points::VARIABLE) {
        tracing::warn!(?dir, "fail points are on: this is a test");
        fail_points::switch_on(dir.into());
    }
    let mut settings = from_environment(|name| std::env::var(name).ok());
    let flags = [
        ("listen", "--listen", serve.listen),
        ("data_dir", "--data-dir", serve.data_dir),
        ("images_dir", "--images-dir", serve.images_dir),
        ("vmm", "--vmm", serve.vmm),
        ("invoke.domain", "--domain", serve.domain),
        ("tls.cert", "--tls-cert", serve.tls_cert),
        ("tls.key", "--tls-key", serve.tls_key),
    ];
    settings.extend(
        flags
            .into_iter()
            .filter_map(|(field, flag, text)| Some(Setting { field, origin: flag.to_owned(), text: text? })),
    );
    let config = Config::load(serve.config.as_deref(), &settings)
        .map_err(|e| Failure::new(ExitStatus::Usage, crate::error::chain(&e)))?;
    let mut supervisor = Supervisor::start(config).await.map_err(|e| started(&e))?;
    let scheme = if supervisor.core().config.tls.cert.is_some() { "https" } else { "http" };
    tell(&format!("stasis serves on {scheme}://{}", supervisor.addr()));
    ended().await?;
    if serve.pause_all {
        tell("stasis stops serving and pauses all sandboxes");
        match supervisor.pause_all().await {
            0 => {}
            left => tell(&format!(
                "{left} sandboxes could not be paused; they keep running and are adopted by the next start"
            )),
        }
    } else {
        tell("stasis stops serving; sandboxes keep running and are adopted by the next start");
    }
    supervisor.shutdown().await;
    Ok(ExitStatus::Ok)
}

pub(super) async fn dev(dev: Dev) -> Result<ExitStatus, Failure> {
    log_to_stderr("warn,stasis_api=info");
    let usage = |text: &str| Failure::new(ExitStatus::Usage, text.to_owned());
    let data_dir =
        dev.data_dir.or_else(profile::data_dir).ok_or_else(|| usage("no home directory: give --data-dir"))?;
    std::fs::create_dir_all(&data_dir)
        .map_err(|e| Failure::other(format!("cannot create {}: {e}", data_dir.display())))?;
    let profile_path = dev.profile.or_else(profile::path).ok_or_else(|| usage("no home directory: give --profile"))?;
    let failed = |e: JournalError| Failure::other(crate::error::chain(&e));
    let sources = Sources::system();
    let journal = Journal::open(&data_dir.join(JOURNAL)).map_err(failed)?;
    // The same from start to start, so that other S3 clients need to be told once.
    let access_key = journal.meta("dev-access-key", || format!("stasis{}", sources.word(14))).map_err(failed)?;
    let secret_key = journal.meta("dev-secret-key", || sources.word(40)).map_err(failed)?;
    let root = data_dir.join("s3");
    let s3 = EmbeddedS3::start(&root, dev.s3_listen, DEV_BUCKET, &access_key, &secret_key)
        .await
        .map_err(|e| Failure::other(format!("cannot start: {}", crate::error::chain(&e))))?;
    // How much and how long may still be set by the environment; where things are is ours to say.
    let mut settings = from_environment(|name| std::env::var(name).ok());
    settings.retain(|setting| {
        ["limits.", "deadlines.", "warm.", "run_ahead.", "invoke.default_port", "templates.", "telemetry."]
            .iter()
            .any(|part| setting.field.starts_with(part))
    });
    let images_dir = dev.images_dir.unwrap_or_else(images_dir);
    let named = dev.domain.unwrap_or_else(|| match dev.listen.port() {
        0 => DEV_DOMAIN.to_owned(),
        port => format!("{DEV_DOMAIN}:{port}"),
    });
    let domain = Domain::parse(&named).ok_or_else(|| usage(&format!("{named:?} is no host name (--domain)")))?;
    let certificates = Authority::prepare(&data_dir.join("tls"), &domain, &sources)
        .map_err(|e| Failure::other(format!("cannot start: {}", e.chain())))?;
    let ours = [
        ("listen", dev.listen.to_string()),
        ("data_dir", data_dir.display().to_string()),
        ("images_dir", images_dir.display().to_string()),
        ("store.kind", "s3".to_owned()),
        ("store.endpoint", s3.endpoint()),
        ("store.bucket", DEV_BUCKET.to_owned()),
        ("store.access_key", access_key.clone()),
        ("store.secret_key", secret_key.clone()),
        ("invoke.domain", named.clone()),
        ("tls.cert", certificates.cert.display().to_string()),
        ("tls.key", certificates.key.display().to_string()),
        // Of the loopback: the API is as easy to call as before, and clients that insist on TLS have it on the same port.
        ("tls.plain", "true".to_owned()),
    ];
    let vmm = dev.vmm.map(|path| ("vmm", path.display().to_string()));
    settings.extend(ours.into_iter().chain(vmm).map(|(field, text)| Setting {
        field,
        origin: "stasis dev".to_owned(),
        text,
    }));
    let config = Config::load(None, &settings).map_err(|e| Failure::new(ExitStatus::Usage, crate::error::chain(&e)))?;
    let images = config.images_dir.clone();
    let supervisor = Supervisor::start(config).await.map_err(|e| started(&e))?;
    let kept = Profile::read(&profile_path)?.map(|p| p.api_key);
    let valid = match &kept {
        Some(key) => journal.tenant_of_key(key).map_err(failed)?.is_some(),
        None => false,
    };
    let api_key = match kept {
        Some(key) if valid => key,
        _ => journal.create_key(DEV_TENANT, "stasis dev", &sources).map_err(failed)?.1,
    };
    let url = format!("http://{}", supervisor.addr());
    Profile { url: url.clone(), api_key: api_key.clone() }.write(&profile_path)?;
    output::line(&format!(
        "stasis is ready.

  API        {url}
  API key    {api_key}
  page       {url}/ui
  sandboxes  https://<id>-<port>.{named}/  (http:// works, too), signed by {ca}
  S3         {s3}  bucket {DEV_BUCKET}, access key {access_key}, secret key {secret_key}
  data       {data}
  templates  {images}

Address and key are in {profile}, so in another terminal just type:

  stasis create
  stasis exec <id> 'uname -a'
  stasis pause <id>
  stasis inspect <id>
  stasis resume <id>

Ctrl-C stops the servers; running sandboxes go on and are adopted by the next `stasis dev`.",
        s3 = s3.endpoint(),
        data = data_dir.display(),
        images = images.display(),
        ca = certificates.ca.display(),
        profile = profile_path.display(),
    ));
    ended().await?;
    let running = supervisor.core().registry.all().iter().filter(|s| s.vm().is_some()).count();
    supervisor.shutdown().await;
    if running > 0 {
        tell(&format!(
            "{running} sandboxes keep running; the next `stasis dev` adopts them (pause or rm them first to leave nothing behind)"
        ));
    }
    Ok(ExitStatus::Ok)
}

/// `target/images` of the build tree that this program lies in, else the installed place: below the prefix that it is installed in.
pub(super) fn images_dir() -> PathBuf {
    let own = std::env::current_exe().ok();
    let near = own.as_deref().and_then(|own| own.parent()?.parent());
    let mut places = near.into_iter().flat_map(|dir| [dir.join("images"), dir.join("share/stasis/images")]);
    places.find(|dir| dir.join("templates").is_dir()).unwrap_or_else(|| PathBuf::from("/usr/share/stasis/images"))
}
