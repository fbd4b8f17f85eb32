use super::settings::NUMBERS;
use super::*;
use std::time::Duration;

const DIRECTORY: &str = "listen = '127.0.0.1:1'\ndata_dir = '/tmp/d'\nimages_dir = '/tmp/i'\n[store]\nkind = 'directory'\npath = '/tmp/s'\n";

fn load(text: &str, settings: &[(&'static str, &str)]) -> Result<Config, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stasis.toml");
    std::fs::write(&path, text).unwrap();
    let settings = settings
        .iter()
        .map(|(field, text)| Setting { field, origin: "test".to_owned(), text: (*text).to_owned() })
        .collect::<Vec<_>>();
    Config::load(Some(&path), &settings).map_err(|e| e.to_string())
}

#[test]
fn a_file_loads_and_settings_win() {
    let config = load(DIRECTORY, &[("limits.sandboxes", "3"), ("listen", "127.0.0.1:9")]).unwrap();
    assert_eq!((config.limits.sandboxes, config.listen.port()), (3, 9));
    assert_eq!(config.deadlines.commit(), Duration::from_secs(10));
}

#[test]
fn every_error_names_its_field() {
    let long = format!("/{}", "x".repeat(200));
    for (settings, field) in [
        (vec![("listen", "nowhere")], "listen"),
        (vec![("limits.sandboxes", "0")], "limits.sandboxes"),
        (vec![("limits.sandboxes", "many")], "limits.sandboxes"),
        (vec![("limits.host_sandboxes", "0")], "limits.host_sandboxes"),
        (vec![("limits.requests_per_minute", "-1")], "requests_per_minute"),
        (vec![("deadlines.commit_ms", "1")], "deadlines.commit_ms"),
        (vec![("store.kind", "tape")], "kind"),
        (vec![("warm.golden", "perhaps")], "warm.golden"),
        (vec![("warm.vmm_pool", "1000")], "warm.vmm_pool"),
        (vec![("run_ahead.core_percent", "0")], "run_ahead.core_percent"),
        (vec![("templates.image_mib", "10240")], "templates.image_mib"),
        (vec![("templates.local_dir", "here")], "templates.local_dir"),
        (vec![("seal.encrypt", "perhaps")], "seal.encrypt"),
        (vec![("seal.old_key_files", "/a:/b")], "seal.key_file"),
        (vec![("templates.per_host", "0")], "templates.per_host"),
        (vec![("templates.ecr_endpoint", "api.ecr")], "templates.ecr_endpoint"),
        (vec![("telemetry.otlp_endpoint", "collector:4318")], "telemetry.otlp_endpoint"),
        (vec![("telemetry.otlp_endpoint", "http://a b")], "telemetry.otlp_endpoint"),
        (vec![("data_dir", long.as_str())], "data_dir"),
    ] {
        let error = load(DIRECTORY, &settings).unwrap_err();
        assert!(error.contains(field), "{error}");
    }
    for (wrong, field) in
        [("[limits]\nsandboxes = 'x'", "sandboxes"), ("[tls]\ncert = 1", "cert"), ("[warm]\ncold = 1", "cold")]
    {
        let error = load(&format!("{DIRECTORY}{wrong}"), &[]).unwrap_err();
        assert!(error.contains(field), "{error}");
    }
    assert!(load("", &[]).unwrap_err().contains("listen"));
    assert!(load(&format!("colour = 'red'\n{DIRECTORY}"), &[]).unwrap_err().contains("colour"));
    assert!(load("listen = [", &[]).unwrap_err().contains("stasis.toml"));
    let s3 = DIRECTORY.replace(
        "'directory'\npath = '/tmp/s'",
        "'s3'\nendpoint='ftp://x'\nbucket='b'\naccess_key='a'\nsecret_key='hush'",
    );
    assert!(load(&s3, &[]).unwrap_err().contains("store.endpoint"));
    assert!(load(&s3, &[("store.endpoint", "http://x"), ("store.bucket", "")]).unwrap_err().contains("store.bucket"));
    let config = load(&s3, &[("store.endpoint", "http://x")]).unwrap();
    assert!(!format!("{config:?}").contains("hush"));
}

#[test]
fn each_variable_sets_its_field() {
    let settings = from_environment(|name| (name == "STASIS_LISTEN").then(|| "1.2.3.4:5".to_owned()));
    assert_eq!((settings.len(), settings[0].field), (1, "listen"));
    let listed = load(DIRECTORY, &[("templates.registries", "ghcr.io, *.example.com")]).unwrap();
    assert_eq!(listed.templates.registries, ["ghcr.io", "*.example.com"]);
    // What a value may be is the field's own affair: that there is such a field is what counts here.
    for (name, field) in VARIABLES {
        let text = if NUMBERS.iter().any(|part| field.starts_with(part)) { "1" } else { "on" };
        let base = if field.starts_with("store.") { "" } else { DIRECTORY };
        let error = load(base, &[(field, text)]).err().unwrap_or_default();
        assert!(!error.contains("unknown field"), "{name}: {error}");
    }
}
