//! Sessions of the page for people: what a browser's cookie opens, and what it does not.

use crate::support::{Place, Served};
use axum::body::Body;
use axum::http::request::Builder;
use axum::http::{Request, Response};
use http_body_util::BodyExt as _;
use tower::ServiceExt as _;

const HOST: &str = "stasis.test:7878";

async fn ask(served: &Served, request: Builder, body: &str) -> Response<Body> {
    let app = stasis_api::routes::router(served.supervisor.core().clone());
    app.oneshot(request.header("host", HOST).body(Body::from(body.to_owned())).unwrap()).await.unwrap()
}

/// Signs in and answers the cookie as a browser sends it back.
async fn sign_in(served: &Served) -> String {
    let request = Request::post("/ui/session").header("stasis-page", "1").header("origin", format!("http://{HOST}"));
    let answer = ask(served, request, &format!("{{\"key\":\"{}\"}}", served.key)).await;
    assert_eq!(answer.status(), 200);
    let cookie = answer.headers()["set-cookie"].to_str().unwrap().to_owned();
    for attribute in ["HttpOnly", "SameSite=Strict", "Path=/"] {
        assert!(cookie.contains(attribute), "{cookie}");
    }
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    assert!(!String::from_utf8_lossy(&body).contains("sk_"), "the key is in the answer");
    cookie.split(';').next().unwrap().to_owned()
}

#[tokio::test]
async fn a_session_is_as_good_as_its_key_for_our_own_page_alone() {
    let place = Place::new();
    let served = place.start().await;
    let cookie = sign_in(&served).await;
    let list = |headers: &[(&'static str, &str)]| {
        let request = Request::get("/v1/sandboxes").header("cookie", &cookie);
        headers.iter().fold(request, |request, (name, value)| request.header(*name, *value))
    };
    let own = format!("http://{HOST}");
    let upgrade = [("connection", "Upgrade"), ("upgrade", "websocket")];
    for (headers, status) in [
        (vec![("stasis-page", "1")], 200),
        (vec![("stasis-page", "1"), ("origin", own.as_str())], 200),
        (vec![], 403),
        (vec![("origin", own.as_str())], 403),
        (vec![("origin", "http://a.stasis.test:7878"), ("stasis-page", "1")], 403),
        (vec![("origin", "null"), ("stasis-page", "1")], 403),
        ([&upgrade[..], &[("origin", own.as_str())]].concat(), 200),
        ([&upgrade[..], &[("origin", "https://evil.test")]].concat(), 403),
        ([&upgrade[..], &[("stasis-page", "1")]].concat(), 403),
        (vec![("stasis-page", "1"), ("authorization", "Bearer wrong")], 401),
    ] {
        assert_eq!(ask(&served, list(&headers), "").await.status(), status, "{headers:?}");
    }
    let unsafe_one = Request::post("/v1/recover").header("cookie", &cookie).header("content-type", "text/plain");
    assert_eq!(ask(&served, unsafe_one, "{}").await.status(), 403, "a form of another page");

    let core = served.supervisor.core();
    let key = core.journal.keys().unwrap().remove(0);
    core.journal.revoke_key(&key.id, core.sources.now_ms()).unwrap();
    assert_eq!(ask(&served, list(&[("stasis-page", "1")]), "").await.status(), 401, "its key is revoked");
}

#[tokio::test]
async fn a_session_ends_when_asked_and_nobody_signs_in_for_others() {
    let place = Place::new();
    let served = place.start().await;
    let cookie = sign_in(&served).await;
    let show = || Request::get("/ui/session").header("cookie", &cookie).header("stasis-page", "1");
    assert_eq!(ask(&served, show(), "").await.status(), 200);
    let end = Request::delete("/ui/session").header("cookie", &cookie);
    assert_eq!(ask(&served, end, "").await.status(), 403, "not from our page");
    let end = Request::delete("/ui/session").header("cookie", &cookie).header("stasis-page", "1");
    assert_eq!(ask(&served, end, "").await.status(), 204);
    assert_eq!(ask(&served, show(), "").await.status(), 401);

    for (key, headers, status) in [
        (served.key.as_str(), vec![], 403),
        (served.key.as_str(), vec![("stasis-page", "1"), ("origin", "https://evil.test")], 403),
        ("sk_wrong", vec![("stasis-page", "1")], 401),
        ("", vec![("stasis-page", "1")], 401),
    ] {
        let request = headers.iter().fold(Request::post("/ui/session"), |r, (name, value)| r.header(*name, *value));
        let answer = ask(&served, request, &format!("{{\"key\":\"{key}\"}}")).await;
        assert_eq!(answer.status(), status, "{headers:?}");
        assert!(!answer.headers().contains_key("set-cookie"));
    }
}

#[tokio::test]
async fn events_begin_with_what_is_there_and_end_with_the_supervisor() {
    let place = Place::new();
    let served = place.start().await;
    let request = Request::get("/v1/events").header("authorization", format!("Bearer {}", served.key));
    let answer = ask(&served, request, "").await;
    assert_eq!(
        (answer.status().as_u16(), &answer.headers()["content-type"]),
        (200, &"text/event-stream".parse().unwrap())
    );
    let mut body = answer.into_body();
    let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert!(String::from_utf8_lossy(&first).contains("event: listed"), "{first:?}");
    served.supervisor.core().ending.cancel();
    assert!(body.frame().await.is_none(), "the stream goes on");
    let nobody = ask(&served, Request::get("/v1/events"), "").await;
    assert_eq!(nobody.status(), 401);
}
