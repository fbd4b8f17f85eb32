//! Other people's sandboxes, snapshots and URLs are as if they were not there. The table is the API's own description: every operation with a
//! parameter in its path is asked for what belongs to somebody else and for what does not exist, and the two must not be told apart: not by the
//! answer, not by what is done for it, not by how long it takes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stasis_api::dev::layout::{Entry, Layout, Packing, archive};
use stasis_tests::host;
use stasis_tests::service::{Options, Service, boots_images, small_images};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::{Error, no_pulse};

/// A name that is as long as a real one.
const NOBODY: &str = "sbx-aaaaaaaaaaaaaaaaaaaa";
/// Operations that look into the caller's own part of the bucket for what this host does not know, whether or not it exists elsewhere.
const LOOK_INTO_THE_BUCKET: [&str; 2] = ["undeleteSandbox", "deleteSnapshot"];
/// Pairs of calls of which the middle is taken.
const CALLS: usize = 9;
/// The two medians may differ so many times, beyond what a busy machine adds to both. That neither asks the store nor wakes anything is
/// counted; this is for what nobody thought of, such as a wait for a lock or a deadline.
const RATIO: f64 = 4.0;
const NOISE: Duration = Duration::from_millis(20);

fn main() {
    Suite::default()
        .test("what_is_anothers_is_as_if_it_were_not_there", no_pulse(), invisible)
        .test("lists_show_only_ones_own", no_pulse(), lists)
        .test("names_of_apps_tell_nothing", no_pulse(), apps)
        .main();
}

/// A tenant's things, and a stranger with a key.
struct Scene {
    service: Service,
    http: reqwest::Client,
    /// Templates and the image, as long as the service reads them.
    #[expect(dead_code, reason = "it is removed when it is dropped")]
    images: tempfile::TempDir,
    stranger: String,
    running: String,
    paused: String,
    snapshot: Value,
    url: Value,
    template: String,
}

/// What can be seen of an answer.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
}

impl Scene {
    async fn set() -> Result<Self, Error> {
        let images = host::scratch()?;
        let mut options = Options { images: Some(small_images(images.path())?), ..Options::default() };
        let boot = boots_images(&images.path().join("images"))?;
        let layer = archive(&[Entry::file("etc/motd", "theirs")]);
        Layout::new(&json!({}), &[(Packing::Plain, layer)])?.write(&images.path().join("image"), "v1")?;
        let local_dir = images.path().display().to_string();
        let ours = [
            ("STASIS_LIMITS_REQUESTS_PER_MINUTE", "0"),
            ("STASIS_TEMPLATES_LOCAL_DIR", local_dir.as_str()),
            ("STASIS_TEMPLATES_BOOT", boot),
            ("STASIS_TEMPLATES_DISK_MIB", "64"),
            ("STASIS_TEMPLATES_IMAGE_MIB", "16"),
        ];
        options.environment.extend(ours.map(|(name, value)| (name.to_owned(), value.to_owned())));
        let service = Service::start(options).await?;
        let stranger = service.other_key()?;
        let (running, paused) = (service.create_pulse().await?, service.create_pulse().await?);
        let body = Some(json!({"name": "theirs"}));
        let made = service.call("POST", &format!("/v1/sandbox/{running}/snapshot/create"), body).await?;
        let snapshot = made.expect(201)?.json;
        service.pause(&paused).await?.expect(201)?;
        let body = Some(json!({"port": 8000}));
        let url = service.call("POST", &format!("/v1/sandbox/{paused}/presigned-url"), body).await?.expect(201)?.json;
        let body = Some(json!({"name": "their-image", "uri": "oci:image:v1"}));
        let template = service.call("POST", "/v1/template", body).await?.expect(201)?.text("id");
        let http = reqwest::Client::builder().timeout(Duration::from_mins(2)).build()?;
        Ok(Self { service, http, images, stranger, running, paused, snapshot, url, template })
    }

    /// A request of the stranger's, its answer, and how long it took.
    async fn ask(&self, method: &str, path: &str, host: Option<&str>, key: &str) -> Result<(Seen, Duration), Error> {
        let mut request =
            self.http.request(method.to_ascii_uppercase().parse()?, format!("{}{path}", self.service.url));
        if let Some(host) = host {
            request = request.header("host", host);
        }
        if !key.is_empty() {
            request = request.header("leap0-authorization", key);
        }
        if method != "get" {
            request = request.header("content-type", "application/json").body("{}");
        }
        let begun = Instant::now();
        let answer = request.send().await?;
        let status = answer.status().as_u16();
        let headers = answer
            .headers()
            .iter()
            .filter(|(name, _)| !["x-request-id", "date"].contains(&name.as_str()))
            .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
            .collect();
        let body = answer.text().await?;
        Ok((Seen { status, headers, body }, begun.elapsed()))
    }

    /// Requests to the store so far, of the supervisor.
    async fn store_requests(&self) -> Result<u64, Error> {
        let text = self.http.get(format!("{}/metrics", self.service.url)).bearer_auth(&self.service.key);
        let text = text.send().await?.error_for_status()?.text().await?;
        let counts = text.lines().filter(|line| line.starts_with("stasis_store_requests_total{"));
        Ok(counts.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum())
    }

    /// What a stranger must not change.
    async fn state(&self) -> Result<Value, Error> {
        let mut all = Vec::new();
        for id in [&self.running, &self.paused] {
            let seen = self.service.call("GET", &format!("/v1/sandbox/{id}/inspect"), None).await?.expect(200)?.json;
            all.push(json!([seen["sandbox"]["state"], seen["transitions"], seen["head"]["etag"], seen["vmm"]]));
        }
        let urls = self.service.call("GET", "/v1/snapshots", None).await?.expect(200)?.json["total_items"].clone();
        let template = format!("/v1/template/{}", self.template);
        let template = self.service.call("GET", &template, None).await?.expect(200)?.json;
        Ok(json!([all, urls, template]))
    }
}

/// An operation of the description with a parameter in its path: its id, its method, and its path for the tenant's things and for nothing.
fn operations(scene: &Scene) -> Result<Vec<(String, String, String, String)>, Error> {
    let document = stasis_api::routes::document();
    let mut out = Vec::new();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    for (path, methods) in document["paths"].as_object().ok_or("no paths")? {
        if !path.contains('{') {
            continue;
        }
        for (method, operation) in methods.as_object().ok_or("no methods")? {
            let id = text(&operation["operationId"]);
            let (mut theirs, mut nobodys) = (path.clone(), path.clone());
            for parameter in operation["parameters"].as_array().into_iter().flatten().filter(|p| p["in"] == "path") {
                let name = text(&parameter["name"]);
                let of_url = path.contains("presigned-url");
                let theirs_one = match name.as_str() {
                    "id" if of_url => scene.paused.clone(),
                    "id" => scene.running.clone(),
                    "snapshot" => text(&scene.snapshot["id"]),
                    "url" => text(&scene.url["id"]),
                    "template" => scene.template.clone(),
                    "session" => "terminal".to_owned(),
                    other => return Err(format!("{id}: this test knows nothing to put in for {other:?}").into()),
                };
                let nobodys_one = match name.as_str() {
                    "id" => NOBODY.to_owned(),
                    "session" => "terminal".to_owned(),
                    // As long as theirs, and of the same kind.
                    _ => theirs_one.chars().enumerate().map(|(i, c)| if i < 5 || c == '-' { c } else { 'a' }).collect(),
                };
                let hole = format!("{{{name}}}");
                theirs = theirs.replace(&hole, &theirs_one);
                nobodys = nobodys.replace(&hole, &nobodys_one);
            }
            out.push((id, method.clone(), theirs, nobodys));
        }
    }
    Ok(out)
}

/// The answer without the names that the request had.
fn unnamed(seen: Seen, path: &str) -> Seen {
    let mut body = seen.body;
    for part in path.split('/').filter(|part| part.contains('-') && part.len() > 10) {
        body = body.replace(part, "…");
    }
    Seen { body, ..seen }
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    (times.get(times.len() / 2).copied().unwrap_or_default() + NOISE).as_secs_f64()
}

async fn invisible() -> Outcome {
    let scene = Scene::set().await?;
    let before = scene.state().await?;
    let all = operations(&scene)?;
    assert!(all.len() > 40, "{} operations", all.len());
    for (id, method, theirs, nobodys) in &all {
        let (mut of_theirs, mut of_nobodys) = (Vec::new(), Vec::new());
        let looks = LOOK_INTO_THE_BUCKET.contains(&id.as_str());
        for round in 0..CALLS {
            let at = scene.store_requests().await?;
            let (seen, took) = scene.ask(method, theirs, None, &scene.stranger).await?;
            let between = scene.store_requests().await?;
            let (other, other_took) = scene.ask(method, nobodys, None, &scene.stranger).await?;
            let after = scene.store_requests().await?;
            assert_eq!(seen.status, 404, "{id} {theirs}: {seen:?}");
            let (seen, other) = (unnamed(seen, theirs), unnamed(other, nobodys));
            assert_eq!(seen, other, "{id}");
            let message: Value = serde_json::from_str(&seen.body)?;
            assert!(message["message"].is_string() && message.as_object().is_some_and(|all| all.len() == 1), "{id}");
            assert_eq!(between - at, after - between, "{id}: requests to the store, round {round}");
            assert!(looks || between == at, "{id}: {} requests to the store", between - at);
            of_theirs.push(took);
            of_nobodys.push(other_took);
        }
        let ratio = median(of_theirs) / median(of_nobodys);
        assert!(
            (1.0 / RATIO..RATIO).contains(&ratio),
            "{id}: what is there takes {ratio} times as long as what is not"
        );
    }
    // By name, too.
    let body = |name: &str| Some(json!({"template_name": name}).to_string());
    let theirs = scene.service.call_as(&scene.stranger, "POST", "/v1/sandbox", body("their-image")).await?;
    let nobodys = scene.service.call_as(&scene.stranger, "POST", "/v1/sandbox", body("nobodys-own")).await?;
    assert!(theirs.status >= 400, "a stranger used the template");
    assert_eq!(theirs.status, nobodys.status);
    assert_eq!(theirs.text("message").replace("their-image", "nobodys-own"), nobodys.text("message"));
    for path in ["/v1/snapshot/restore", "/v1/snapshot/resume"] {
        let body = |name: &str| Some(json!({"snapshot_name": name}).to_string());
        let theirs = scene.service.call_as(&scene.stranger, "POST", path, body("theirs")).await?.expect(404)?;
        let nobodys = scene.service.call_as(&scene.stranger, "POST", path, body("nobody")).await?.expect(404)?;
        assert_eq!(theirs.text("message").replace("theirs", "nobody"), nobodys.text("message"));
    }
    assert_eq!(scene.state().await?, before, "a stranger changed something");
    scene.service.pulse_is_well(&scene.running).await?;

    // A URL of another's is not deleted by way of one's own sandbox, nor by one of the same owner that it does not belong to.
    let url = scene.url["id"].as_str().ok_or("no id")?;
    let body = json!({"template_name": "test/pulse", "memory": 32}).to_string();
    let made = scene.service.call_as(&scene.stranger, "POST", "/v1/sandbox", Some(body)).await?.expect(201)?;
    let path = format!("/v1/sandbox/{}/presigned-url/{url}", made.text("id"));
    scene.service.call_as(&scene.stranger, "DELETE", &path, None).await?.expect(404)?;
    scene
        .service
        .call("DELETE", &format!("/v1/sandbox/{}/presigned-url/{url}", scene.running), None)
        .await?
        .expect(404)?;
    scene
        .service
        .call("DELETE", &format!("/v1/sandbox/{}/presigned-url/{url}", scene.paused), None)
        .await?
        .expect(204)?;
    Ok(())
}

async fn lists() -> Outcome {
    let scene = Scene::set().await?;
    let snapshot = scene.snapshot["id"].as_str().ok_or("no id")?;
    let theirs = [&scene.running, &scene.paused, snapshot, &scene.template].map(str::to_owned);
    let url = scene.url["id"].as_str().ok_or("no id")?;
    for (method, path) in [
        ("get", "/v1/sandboxes?page-size=100"),
        ("get", "/v1/sandboxes?state=paused"),
        ("get", "/v1/snapshots"),
        ("get", "/v1/snapshots?query=theirs"),
        ("get", "/v1/template"),
        ("get", "/v1/templates"),
        ("post", "/v1/recover"),
        ("get", "/v1/host/metrics"),
        ("get", "/metrics"),
        ("get", "/healthz"),
        ("get", "/openapi.json"),
    ] {
        let (seen, _) = scene.ask(method, path, None, &scene.stranger).await?;
        assert_eq!(seen.status, 200, "{path}: {seen:?}");
        for name in theirs.iter().map(String::as_str).chain([url, "\"theirs\""]) {
            assert!(!seen.body.contains(name), "{path} shows {name}: {}", seen.body);
        }
        if path.starts_with("/v1/s") {
            let list: Value = serde_json::from_str(&seen.body)?;
            assert_eq!((&list["total_items"], &list["items"]), (&json!(0), &json!([])), "{path}");
        }
    }
    // The owner's own lists show them.
    let own = scene.service.call("GET", "/v1/sandboxes", None).await?.expect(200)?;
    assert_eq!(own.json["total_items"], 2);
    Ok(())
}

async fn apps() -> Outcome {
    let scene = Scene::set().await?;
    let before = scene.state().await?;
    let host = |label: &str| format!("{label}.sandbox.localhost");
    for (method, path) in [("get", "/"), ("post", "/v1/sandbox"), ("get", "/openapi.json"), ("delete", "/x")] {
        for suffix in ["", "-8000", "-22"] {
            for key in [scene.stranger.as_str(), "", "wrong"] {
                let (mut of_theirs, mut of_nobodys) = (Vec::new(), Vec::new());
                for _ in 0..5 {
                    let at = scene.store_requests().await?;
                    let named = host(&format!("{}{suffix}", scene.paused));
                    let (seen, took) = scene.ask(method, path, Some(&named), key).await?;
                    let (other, other_took) =
                        scene.ask(method, path, Some(&host(&format!("{NOBODY}{suffix}"))), key).await?;
                    let expected = if key == scene.stranger { 404 } else { 401 };
                    assert_eq!(seen.status, expected, "{named}: {seen:?}");
                    let seen = Seen { body: seen.body.replace(&scene.paused, NOBODY), ..seen };
                    assert_eq!(seen, other, "{named}");
                    assert_eq!(scene.store_requests().await?, at, "{named}: the store was asked");
                    of_theirs.push(took);
                    of_nobodys.push(other_took);
                }
                let ratio = median(of_theirs) / median(of_nobodys);
                assert!((1.0 / RATIO..RATIO).contains(&ratio), "{suffix} {key}: {ratio}");
            }
        }
    }
    // A token that was never made and one that is deleted.
    let token = scene.url["token"].as_str().ok_or("no token")?;
    let never: String = token.chars().map(|c| if c == 'a' { 'b' } else { 'a' }).collect();
    let path = format!("/v1/sandbox/{}/presigned-url/{}", scene.paused, scene.url["id"].as_str().unwrap_or_default());
    scene.service.call("DELETE", &path, None).await?.expect(204)?;
    let (deleted, _) = scene.ask("get", "/", Some(&host(token)), &scene.stranger).await?;
    let (unknown, _) = scene.ask("get", "/", Some(&host(&never)), &scene.stranger).await?;
    assert_eq!((deleted.status, &deleted), (404, &unknown));
    assert_eq!(scene.state().await?, before, "a stranger woke something");
    Ok(())
}
