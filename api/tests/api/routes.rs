//! Status codes and bodies of every route that needs no guest.

use crate::support::{Place, write_head};
use axum::body::Body;
use axum::http::Request;
use serde_json::json;
use stasis_snapshot::commit::HeadState;

const UNKNOWN: &str = "/v1/sandbox/sbx-unknown0000000000000";

#[tokio::test]
async fn every_route_wants_a_key_and_says_so() {
    let place = Place::new();
    let served = place.start().await;
    for (method, path) in [
        ("POST", "/v1/sandbox"),
        ("POST", "/v1/sandbox/"),
        ("GET", "/v1/sandboxes"),
        ("GET", UNKNOWN),
        ("DELETE", UNKNOWN),
        ("POST", &format!("{UNKNOWN}/pause")),
        ("POST", &format!("{UNKNOWN}/resume")),
        ("POST", &format!("{UNKNOWN}/process/execute")),
        ("GET", &format!("{UNKNOWN}/inspect")),
        ("POST", "/v1/recover"),
    ] {
        for header in [None, Some("Bearer wrong"), Some("Basic x"), Some("")] {
            let mut request = Request::builder().method(method).uri(path);
            if let Some(value) = header {
                request = request.header("authorization", value);
            }
            let answer = served.send(request.body(Body::empty()).unwrap()).await;
            assert_eq!(answer.status, 401, "{method} {path} {header:?}");
            assert!(answer.body["message"].is_string());
        }
    }
    for value in [served.key.clone(), format!("Bearer {}", served.key)] {
        let request =
            Request::builder().uri("/v1/sandboxes").header("leap0-authorization", value).body(Body::empty()).unwrap();
        assert_eq!(served.send(request).await.status, 200);
    }
}

/// The description is of what is served: each operation answers, with a key where it says so, and nothing else does.
#[tokio::test]
async fn what_is_described_is_served_and_no_other_method() {
    let place = Place::new();
    let served = place.start().await;
    let document = served.get("/openapi.json").await.body;
    let ask = async |method: &str, path: &str| {
        served.send(Request::builder().method(method).uri(path).body(Body::empty()).unwrap()).await
    };
    for (path, methods) in document["paths"].as_object().unwrap() {
        let parts = path.split('/').map(|part| if part.starts_with('{') { "sbx-x" } else { part });
        let at = parts.collect::<Vec<_>>().join("/");
        let described: Vec<String> = methods.as_object().unwrap().keys().map(|m| m.to_ascii_uppercase()).collect();
        for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "TRACE"] {
            for at in [at.clone(), format!("{at}/")] {
                let answer = ask(method, &at).await;
                let open = methods[method.to_ascii_lowercase()]["security"] == json!([]);
                if !described.iter().any(|known| known == method) {
                    assert_eq!(answer.status, 405, "{method} {at}");
                    let allow = answer.headers["allow"].to_str().unwrap();
                    let allowed: Vec<_> = allow.split(',').map(str::trim).filter(|word| *word != "HEAD").collect();
                    let same =
                        allowed.len() == described.len() && described.iter().all(|m| allowed.contains(&m.as_str()));
                    assert!(same, "{at} allows {allow}, described are {described:?}");
                } else if open {
                    assert!(answer.status == 200 || at.starts_with("/readyz"), "{method} {at}: {}", answer.status);
                } else {
                    assert_eq!(answer.status, 401, "{method} {at}");
                    assert!(answer.headers.contains_key("stasis-error"));
                }
            }
        }
    }
    for one in document["x-left-out"].as_array().unwrap() {
        let path = one["path"].as_str().unwrap().replace("{id}", "sbx-x").replace('*', "");
        let method = one["method"].as_str().unwrap().to_ascii_uppercase().replace("ANY", "GET");
        assert_eq!(ask(&method, &path.replace(['{', '}'], "")).await.status, 401, "{method} {path}");
    }
    let page = ask("GET", "/docs").await;
    assert_eq!(page.headers["content-type"], "text/html; charset=utf-8");
    assert!(page.headers["content-security-policy"].to_str().unwrap().contains("default-src 'none'"));
    // What is no text names nothing.
    assert_eq!(served.get("/v1/sandbox/%ff").await.body["message"], "there is no /v1/sandbox/%ff");
}

#[tokio::test]
async fn unknown_things_are_404_and_wrong_methods_405() {
    let place = Place::new();
    let served = place.start().await;
    for path in [UNKNOWN, &format!("{UNKNOWN}/"), "/v1/sandbox/not-an-id", "/v1/sandbox/..%2Fx", "/v1/nothing", "/"] {
        let answer = served.get(path).await;
        assert_eq!(answer.status, 404, "{path}");
        assert!(answer.body["message"].is_string(), "{path}");
    }
    for (method, path) in
        [("GET", "/v1/sandbox"), ("PUT", UNKNOWN), ("GET", &format!("{UNKNOWN}/pause")), ("POST", "/v1/sandboxes")]
    {
        let answer = served.call(method, path, "").await;
        assert_eq!(answer.status, 405, "{method} {path}");
        assert!(answer.body["message"].is_string());
    }
}

#[tokio::test]
async fn bad_requests_name_their_fields() {
    let place = Place::new();
    let served = place.start().await;
    let bare = r#""template_name":"test/bare""#;
    for (body, field) in [
        (format!("{{{bare},\"vcpu\":0}}"), "vcpu"),
        (format!("{{{bare},\"vcpu\":9}}"), "vcpu"),
        (format!("{{{bare},\"memory\":32}}"), "memory"),
        (format!("{{{bare},\"memory_mib\":8194}}"), "memory_mib"),
        (format!("{{{bare},\"memory\":65}}"), "memory"),
        (format!("{{{bare},\"timeout\":0}}"), "timeout"),
        (format!("{{{bare},\"timeout_min\":481}}"), "timeout_min"),
        (format!("{{{bare},\"network_policy\":{{\"mode\":\"x\"}}}}"), "network_policy"),
        (r#"{"template_name":"no/such"}"#.to_owned(), "template_name"),
        (r#"{"template_name":7}"#.to_owned(), "template_name"),
    ] {
        let answer = served.call("POST", "/v1/sandbox", &body).await;
        assert_eq!(answer.status, 400, "{body}");
        assert_eq!(answer.body["errors"][0]["field"], field, "{body}");
        assert!(answer.body["errors"][0]["error"].is_string() && answer.body["message"].is_string());
    }
    for body in ["{", "[]", "\"x\"", "\u{0}"] {
        let answer = served.call("POST", "/v1/sandbox", body).await;
        assert_eq!(answer.status, 400, "{body:?}");
        assert_eq!(answer.body["errors"][0]["field"], "body");
    }
    let large = format!("{{{bare},\"env_vars\":{{\"A\":\"{}\"}}}}", "x".repeat(70_000));
    assert_eq!(served.call("POST", "/v1/sandbox", &large).await.status, 413);
    for query in ["state=deleted", "page=0", "page-size=101", "order-by=up", "sort=name"] {
        let answer = served.get(&format!("/v1/sandboxes?{query}")).await;
        assert_eq!(answer.status, 400, "{query}");
        assert_eq!(answer.body["errors"][0]["field"], query.split('=').next().unwrap());
    }
    let list = served.get("/v1/sandboxes/").await;
    assert_eq!((list.status, &list.body), (200, &json!({"items": [], "total_items": 0})));
}

#[tokio::test]
async fn a_create_that_fails_leaves_nothing_but_its_reason() {
    if !std::path::Path::new("/dev/kvm").exists() {
        eprintln!("left out: a create is refused for want of /dev/kvm before its VMM can fail");
        return;
    }
    let place = Place::new();
    let served = place.start().await;
    let answer = served.call("POST", "/v1/sandbox", r#"{"template_name":"test/bare","memory":64}"#).await;
    assert_eq!(answer.status, 500);
    assert!(answer.body["message"].as_str().unwrap().contains("this vmm cannot run"), "{}", answer.body);
    let sandboxes = served.supervisor.core().registry.all();
    assert_eq!(sandboxes.len(), 1);
    let id = sandboxes[0].id.to_string();
    let got = served.get(&format!("/v1/sandbox/{id}")).await;
    assert_eq!((got.status, got.body["state"].as_str()), (200, Some("deleted")));
    assert!(got.body["reason"].as_str().unwrap().contains("this vmm cannot run"));
    assert_eq!(served.call("POST", &format!("/v1/sandbox/{id}/pause"), "").await.status, 409);
    assert_eq!(served.call("DELETE", &format!("/v1/sandbox/{id}"), "").await.status, 404);
    assert_eq!(std::fs::read_dir(place.path("data/run")).unwrap().count(), 0);
    assert_eq!(served.get("/v1/sandboxes").await.body["total_items"], 0);
}

#[tokio::test]
async fn a_paused_sandbox_answers_as_the_contract_says() {
    let place = Place::new();
    let id = "sbx-paused00000000000000a";
    write_head(&place.path("store"), id, "host-other", HeadState::Paused).await;
    let served = place.start().await;
    for path in [format!("/v1/sandbox/{id}"), format!("/v1/sandbox/{id}/")] {
        let got = served.get(&path).await;
        assert_eq!(got.status, 200);
        assert_eq!(got.body["state"], "paused");
        for field in
            ["template_id", "vcpu", "memory", "memory_mib", "disk", "disk_mib", "timeout", "auto_pause", "created_at"]
        {
            assert!(!got.body[field].is_null(), "{field}");
        }
        assert!(got.body.get("env_vars").is_none() && got.body.get("network_policy").is_none());
    }
    let pause = served.call("POST", &format!("/v1/sandbox/{id}/pause"), "").await;
    assert_eq!(pause.status, 409);
    assert!(pause.body["message"].as_str().unwrap().contains("is paused"));
    let exec = served.call("POST", &format!("/v1/sandbox/{id}/process/execute"), "{}").await;
    assert_eq!((exec.status, exec.body["errors"][0]["field"].as_str()), (400, Some("command")));
    let list = served.get("/v1/sandboxes?state=paused").await;
    assert_eq!(list.body["items"][0]["id"], id);

    // Another tenant's key does not even see it.
    let (_, other) =
        served.supervisor.core().journal.create_key("other", "", &stasis_api::sources::Sources::system()).unwrap();
    for (method, rest) in [("GET", ""), ("DELETE", ""), ("POST", "/pause"), ("POST", "/resume"), ("GET", "/inspect")] {
        let request =
            Request::builder().method(method).uri(format!("/v1/sandbox/{id}{rest}")).header("authorization", &other);
        assert_eq!(served.send(request.body(Body::empty()).unwrap()).await.status, 404, "{method} {rest}");
    }

    // Its manifest is missing: the resume names it, and the sandbox stays paused.
    let resume = served.call("POST", &format!("/v1/sandbox/{id}/resume"), "").await;
    assert_eq!(resume.status, 502, "{}", resume.body);
    assert!(resume.body["message"].as_str().unwrap().contains("/manifest"), "{}", resume.body);
    let got = served.get(&format!("/v1/sandbox/{id}")).await;
    assert_eq!(got.body["state"], "paused");
    assert!(got.body["reason"].as_str().unwrap().contains("manifest"));
    let inspect = served.get(&format!("/v1/sandbox/{id}/inspect")).await;
    assert_eq!(inspect.body["head"]["body"]["state"], "paused", "{}", inspect.body);
    assert!(inspect.body["manifest"]["problem"].is_string());

    assert_eq!(served.call("DELETE", &format!("/v1/sandbox/{id}/"), "").await.status, 204);
    assert_eq!(served.get(&format!("/v1/sandbox/{id}")).await.body["state"], "deleted");
    assert_eq!(served.call("DELETE", &format!("/v1/sandbox/{id}"), "").await.status, 404);
    let inspect = served.get(&format!("/v1/sandbox/{id}/inspect")).await;
    assert_eq!(inspect.body["head"]["body"]["state"], "deleted");
    assert_eq!(inspect.body["objects"].as_array().unwrap().len(), 1, "the tombstone stays");
}

/// However many ask for a sandbox that sleeps, it is woken once, and a failure is everybody's.
#[tokio::test]
async fn requests_that_come_together_share_one_wake() {
    let place = Place::new();
    let id = "sbx-paused00000000000000b";
    write_head(&place.path("store"), id, "host-other", HeadState::Paused).await;
    let served = place.start().await;
    let path = format!("/v1/sandbox/{id}/resume");
    let answers = futures::future::join_all((0..8).map(|_| served.call("POST", &path, ""))).await;
    for answer in &answers {
        assert_eq!((answer.status, &answer.body), (502, &answers[0].body));
    }
    let core = served.supervisor.core();
    let sandbox = core.registry.find("dev", id).unwrap();
    let wakes = |of: &[stasis_api::journal::Transition]| of.iter().filter(|t| t.event == "resume").count();
    assert_eq!(wakes(&core.journal.transitions(&sandbox.id).unwrap()), 1);
    // Asked again later, it is tried again.
    assert_eq!(served.call("POST", &path, "").await.status, 502);
    assert_eq!(wakes(&core.journal.transitions(&sandbox.id).unwrap()), 2);
}

#[tokio::test]
async fn health_says_what_is_missing_and_needs_no_key() {
    let place = Place::new();
    let served = place.start().await;
    for path in ["/healthz", "/readyz"] {
        let answer = served.send(Request::builder().uri(path).body(Body::empty()).unwrap()).await;
        assert!(answer.status == 200 || path == "/readyz" && answer.status == 503, "{path}: {}", answer.status);
        assert!(answer.body["status"].is_string());
    }
    std::fs::remove_dir_all(place.path("store")).unwrap();
    let answer = served.get("/readyz").await;
    assert_eq!(answer.status, 503, "{}", answer.body);
    assert!(answer.body["message"].is_string());
    assert_eq!(served.get("/healthz").await.body["store"]["conditional_writes"], true);
}
