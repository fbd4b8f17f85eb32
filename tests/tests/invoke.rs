//! Requests to apps in sandboxes, through `stasis serve` as a process, with real clients. The sandboxes are pulse guests on this machine's own
//! `/dev/kvm`, so pauses and wakes are real; what is on the far side of their vsock is played (`stasis_tests::invoke`).

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use reqwest::{Client, ClientBuilder, Method, RequestBuilder, Response, Version};
use serde_json::{Value, json};
use stasis_api::dev::{Fault, Rule};
use stasis_api::front::authority::Authority;
use stasis_api::invoke::Domain;
use stasis_api::sources::Sources;
use stasis_tests::invoke::app::App;
use stasis_tests::invoke::guest::Guest;
use stasis_tests::service::{Options, Service};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::{Error, no_pulse, until};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

const DOMAIN: &str = "box.test";

fn main() {
    Suite::default()
        .test("every_http_reaches_the_app_and_no_key_does", no_pulse(), every_http)
        .test("large_bodies_stream_both_ways_in_little_memory", no_pulse(), large_bodies)
        .test("events_come_one_by_one", no_pulse(), events)
        .test("websockets_pass", no_pulse(), websockets)
        .test("who_may_not_and_what_is_not_there", no_pulse(), refusals)
        .test("a_hundred_requests_at_once_wake_a_sandbox_once", no_pulse(), wake_storm)
        .test("a_pause_cuts_streams_and_the_next_request_wakes", no_pulse(), pause_under_streams)
        .test("a_stream_keeps_a_sandbox_from_auto_pause", no_pulse(), activity)
        .test("presigned_urls_open_one_port_for_a_while", no_pulse(), presigned)
        .main();
}

struct Place {
    service: Service,
    app: App,
    guest: Guest,
    id: String,
    addr: SocketAddr,
    ca: reqwest::Certificate,
    _certificates: tempfile::TempDir,
}

impl Place {
    async fn new() -> Result<Self, Error> {
        Self::with(json!({"template_name": "test/pulse", "memory": 32}), &[]).await
    }

    async fn with(create: Value, environment: &[(&str, &str)]) -> Result<Self, Error> {
        let certificates = tempfile::tempdir()?;
        let domain = Domain::parse(DOMAIN).ok_or("the domain")?;
        let made = Authority::prepare(certificates.path(), &domain, &Sources::system())?;
        let mut options = Options::default();
        let own = [
            ("STASIS_DOMAIN", DOMAIN.to_owned()),
            ("STASIS_TLS_CERT", made.cert.display().to_string()),
            ("STASIS_TLS_KEY", made.key.display().to_string()),
            ("STASIS_TLS_PLAIN", "true".to_owned()),
            ("STASIS_LOG_JSON", "1".to_owned()),
        ];
        options.environment.extend(own.map(|(k, v)| (k.to_owned(), v)));
        options.environment.extend(environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
        let service = Service::start(options).await?;
        let addr = service.url.trim_start_matches("http://").parse()?;
        let id = service.call("POST", "/v1/sandbox", Some(create)).await?.expect(201)?.text("id");
        let guest = Guest::start(service.run_dir(&id)).await?;
        let ca = reqwest::Certificate::from_pem(&std::fs::read(&made.ca)?)?;
        Ok(Self { service, app: App::start().await?, guest, id, addr, ca, _certificates: certificates })
    }

    /// Host of the app.
    fn host(&self) -> String {
        format!("{}-{}.{DOMAIN}", self.id, self.app.addr.port())
    }

    /// A client for which these hosts are the service's address.
    fn client(&self, change: impl FnOnce(ClientBuilder) -> ClientBuilder) -> Result<Client, Error> {
        let hosts =
            [self.host(), format!("{}.{DOMAIN}", self.id), format!("{}-1.{DOMAIN}", self.id), DOMAIN.to_owned()];
        let mut builder = Client::builder().add_root_certificate(self.ca.clone()).timeout(Duration::from_mins(5));
        for host in hosts {
            builder = builder.resolve(&host, self.addr);
        }
        Ok(change(builder).build()?)
    }

    fn url(&self, scheme: &str, path: &str) -> String {
        format!("{scheme}://{}:{}{path}", self.host(), self.addr.port())
    }

    /// A request to the app over HTTP/1.1 in clear.
    fn ask(&self, client: &Client, method: Method, path: &str) -> RequestBuilder {
        client.request(method, self.url("http", path)).header("leap0-authorization", &self.service.key)
    }

    async fn socket(&self) -> Result<WebSocketStream<TcpStream>, Error> {
        let mut request = format!("ws://{}/ws", self.host()).into_client_request()?;
        request.headers_mut().insert("authorization", format!("Bearer {}", self.service.key).parse()?);
        Ok(client_async(request, TcpStream::connect(self.addr).await?).await?.0)
    }
}

async fn message(response: Response, status: u16) -> Result<String, Error> {
    if response.status().as_u16() != status {
        return Err(format!("expected {status}, got {}: {}", response.status(), response.text().await?).into());
    }
    let body: Value = response.json().await?;
    Ok(body["message"].as_str().ok_or("no message")?.to_owned())
}

async fn every_http() -> Outcome {
    let place = Place::new().await?;
    let key = &place.service.key;
    for (scheme, expected, client) in [
        ("http", Version::HTTP_11, place.client(ClientBuilder::http1_only)?),
        ("http", Version::HTTP_2, place.client(ClientBuilder::http2_prior_knowledge)?),
        ("https", Version::HTTP_11, place.client(ClientBuilder::http1_only)?),
        ("https", Version::HTTP_2, place.client(|c| c)?),
    ] {
        let what = format!("{scheme} {expected:?}");
        let answer = client
            .patch(place.url(scheme, "/headers?a=%20b&c"))
            .header("leap0-authorization", format!("Bearer {key}"))
            .header("authorization", "Basic of-the-app")
            .header("x-forwarded-for", "1.2.3.4")
            .header("te", "trailers")
            .body("text")
            .send()
            .await?;
        assert_eq!((answer.status().as_u16(), answer.version()), (200, expected), "{what}");
        assert!(answer.headers().contains_key("x-request-id"));
        let text = answer.text().await?;
        assert!(!text.contains(key), "{what}: the key reached the guest");
        let seen: Value = serde_json::from_str(&text)?;
        assert_eq!((&seen["method"], &seen["target"]), (&json!("PATCH"), &json!("/headers?a=%20b&c")), "{what}");
        let headers = &seen["headers"];
        let host = format!("{}:{}", place.host(), place.addr.port());
        for (name, value) in [
            ("host", host.as_str()),
            ("x-forwarded-host", &host),
            ("x-forwarded-proto", scheme),
            ("x-forwarded-for", "127.0.0.1"),
            ("authorization", "Basic of-the-app"),
            ("content-length", "4"),
        ] {
            assert_eq!(headers[name], json!([value]), "{what}: {name} in {seen}");
        }
        assert!(headers.get("leap0-authorization").is_none() && headers.get("upgrade").is_none(), "{what}: {seen}");

        let chunks = futures::stream::iter((0..64).map(|n| Ok::<_, std::io::Error>(Bytes::from(vec![n; 1000]))));
        let echo = client.post(place.url(scheme, "/echo")).bearer_auth(key);
        let echo = echo.body(reqwest::Body::wrap_stream(chunks)).send().await?.bytes().await?;
        let sent: Vec<u8> = (0..64).flat_map(|n| vec![n; 1000]).collect();
        assert_eq!(echo, sent, "{what}");
        for status in [204, 304, 404, 418, 500] {
            let answer = client.get(place.url(scheme, &format!("/status/{status}"))).bearer_auth(key).send().await?;
            assert_eq!(answer.status().as_u16(), status, "{what}");
        }
        let head = client.head(place.url(scheme, "/headers")).bearer_auth(key).send().await?;
        assert!(head.status().is_success() && head.headers()["content-length"] != "0", "{what}");
        // The API is on the same listener.
        let api = client.get(format!("{scheme}://{DOMAIN}:{}/healthz", place.addr.port())).send().await?;
        assert_eq!((api.status().as_u16(), api.version()), (200, expected), "{what}");
    }
    // A client that connects by the unix socket breaks once before anything was sent: the request is not lost.
    place.guest.break_next();
    let client = place.client(|c| c)?;
    let answer = place.ask(&client, Method::POST, "/count").body("once").send().await?;
    assert_eq!(answer.text().await?, "once");
    assert_eq!(place.app.counted().get("once"), Some(&1));
    let log = place.service.log();
    assert!(!log.contains(key.as_str()) && log.contains(&place.id) && log.contains("\"request\":"));
    Ok(())
}

async fn large_bodies() -> Outcome {
    const TOTAL: usize = 100 << 20;
    const CHUNK: usize = 128 << 10;
    let place = Place::new().await?;
    let peak = || -> Result<u64, Error> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", place.service.supervisor_pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("VmHWM")?;
        Ok(line.trim().trim_end_matches("kB").trim().parse::<u64>()? >> 10)
    };
    let before = peak()?;
    for (scheme, client) in [("http", place.client(ClientBuilder::http1_only)?), ("https", place.client(|c| c)?)] {
        let chunk = Bytes::from((0..CHUNK).map(|n| (n % 251) as u8).collect::<Vec<_>>());
        let sent = chunk.clone();
        let body = futures::stream::iter((0..TOTAL / CHUNK).map(move |_| Ok::<_, std::io::Error>(sent.clone())));
        let echo = client.post(place.url(scheme, "/echo")).bearer_auth(&place.service.key);
        let mut echo = echo.body(reqwest::Body::wrap_stream(body)).send().await?;
        let mut seen = 0;
        while let Some(bytes) = echo.chunk().await? {
            assert!(
                bytes.iter().enumerate().all(|(at, byte)| *byte == chunk[(seen + at) % CHUNK]),
                "{scheme} at {seen}"
            );
            seen += bytes.len();
        }
        assert_eq!(seen, TOTAL, "{scheme}");
    }
    let grown = peak()? - before;
    assert!(grown < 64, "200 MiB passed in {grown} MiB of memory");
    Ok(())
}

async fn events() -> Outcome {
    let place = Place::new().await?;
    for client in [place.client(ClientBuilder::http1_only)?, place.client(ClientBuilder::http2_prior_knowledge)?] {
        let mut stream = place.ask(&client, Method::GET, "/events").send().await?;
        assert_eq!(stream.headers()["content-type"], "text/event-stream");
        for number in 0..5 {
            // The next one is sent only when this one has arrived.
            place.app.events.add_permits(1);
            assert_eq!(stream.chunk().await?, Some(format!("data: {number}\n\n").into()));
        }
    }
    Ok(())
}

async fn websockets() -> Outcome {
    let place = Place::new().await?;
    let mut socket = place.socket().await?;
    for message in [Message::text("hello"), Message::binary(vec![7; 1 << 20]), Message::text("")] {
        socket.send(message.clone()).await?;
        assert_eq!(socket.next().await.ok_or("the end")??, message);
    }
    socket.close(None).await?;
    assert!(matches!(socket.next().await, Some(Ok(Message::Close(_))) | None));
    // Many at once, each alone.
    let mut all = Vec::new();
    for number in 0..50 {
        let mut socket = place.socket().await?;
        socket.send(Message::text(number.to_string())).await?;
        all.push(socket);
    }
    for (number, mut socket) in all.into_iter().enumerate() {
        assert_eq!(socket.next().await.ok_or("the end")??, Message::text(number.to_string()));
    }
    // An app that does not agree answers as it likes.
    let mut request = format!("ws://{}/headers", place.host()).into_client_request()?;
    request.headers_mut().insert("leap0-authorization", place.service.key.parse()?);
    match client_async(request, TcpStream::connect(place.addr).await?).await {
        Err(tungstenite::Error::Http(answer)) => assert_eq!(answer.status().as_u16(), 200),
        other => return Err(format!("{other:?}").into()),
    }
    Ok(())
}

async fn refusals() -> Outcome {
    let place =
        Place::with(json!({"template_name": "test/pulse", "memory": 32}), &[("STASIS_DEADLINES_IDLE_MS", "6000")])
            .await?;
    let client = place.client(ClientBuilder::http1_only)?;
    let (other, id) = (place.service.other_key()?, &place.id);
    let url = place.url("http", "/headers");
    for key in [None, Some("sk_wrong")] {
        let mut request = client.get(&url);
        if let Some(key) = key {
            request = request.header("authorization", key);
        }
        message(request.send().await?, 401).await?;
    }
    let of_other = message(client.get(&url).bearer_auth(&other).send().await?, 404).await?;
    let unknown = url.replace(id, "sbx-zzzzzzzzzzzzzzzzzzzz");
    let host = |host: String| client.get(&place.service.url).header("host", host).bearer_auth(&place.service.key);
    let of_nobody = host(unknown.split('/').nth(2).ok_or("host")?.to_owned()).send().await?;
    let of_nobody = message(of_nobody, 404).await?;
    assert_eq!(of_other.replace(id.as_str(), "X"), of_nobody.replace("sbx-zzzzzzzzzzzzzzzzzzzz", "X"));
    for name in ["www", "sbx-a-0", "a.b"] {
        message(host(format!("{name}.{DOMAIN}")).send().await?, 404).await?;
    }
    // Nobody listens there; the default port has no listener either.
    for port in ["-1", ""] {
        let answer = host(format!("{id}{port}.{DOMAIN}")).send().await?;
        let said = message(answer, 502).await?;
        assert!(said.contains("nothing listens"), "{said}");
    }
    let silent = message(place.ask(&client, Method::POST, "/never").body("x").send().await?, 504).await?;
    assert!(silent.contains("6000 ms"), "{silent}");
    // A stream on which nothing moves is ended, one on which something does is not.
    let mut stream = place.ask(&client, Method::GET, "/events").send().await?;
    for _ in 0..5 {
        // All together longer than the limit, and each so much shorter that a machine under load keeps within it.
        tokio::time::sleep(Duration::from_millis(1400)).await;
        place.app.events.add_permits(1);
        assert!(stream.chunk().await?.is_some());
    }
    assert!(stream.chunk().await.is_err(), "a stream that was cut off does not end as if it were whole");
    // The guest dies under a request.
    // Not only its connection: a request that was not sent yet is held, and finds no sandbox.
    let hung = || place.app.counted().get("never").copied().unwrap_or_default();
    let before = hung();
    let hanging = tokio::spawn(place.ask(&client, Method::GET, "/never").send());
    until("the request in the app", || Ok((hung() > before).then_some(()))).await?;
    place.service.call("DELETE", &format!("/v1/sandbox/{id}"), None).await?.expect(204)?;
    assert!([502, 504].contains(&hanging.await??.status().as_u16()));
    message(place.ask(&client, Method::GET, "/headers").send().await?, 404).await?;
    Ok(())
}

async fn wake_storm() -> Outcome {
    let place = Place::new().await?;
    let clients = [place.client(ClientBuilder::http1_only)?, place.client(|c| c)?];
    for round in 1..=2 {
        place.service.pause(&place.id).await?.expect(201)?;
        let mut all = tokio::task::JoinSet::new();
        for number in 0..100 {
            let (scheme, client) = if number % 2 == 0 { ("http", &clients[0]) } else { ("https", &clients[1]) };
            let request = client.post(place.url(scheme, "/count")).bearer_auth(&place.service.key);
            let body = format!("{round}-{number}");
            all.spawn(async move {
                let answer = request.body(body.clone()).send().await?;
                let (status, text) = (answer.status().as_u16(), answer.text().await?);
                assert_eq!((status, &text), (200, &body), "{text}");
                Ok::<_, reqwest::Error>(())
            });
        }
        while let Some(done) = all.join_next().await {
            done??;
        }
        assert_eq!(place.guest.lives(), 1 + round, "one wake");
        assert_eq!(place.service.operations("resume", "ok").await?, round as u64, "one wake by the metrics");
        assert_eq!(place.service.operations("resume", "error").await?, 0);
        let counted = place.app.counted();
        assert!(counted.len() == 100 * round && counted.values().all(|n| *n == 1), "none lost, none doubled");
    }
    place.service.pulse_is_well(&place.id).await
}

async fn pause_under_streams() -> Outcome {
    let place = Place::new().await?;
    let client = place.client(ClientBuilder::http1_only)?;
    let mut stream = place.ask(&client, Method::GET, "/events").send().await?;
    let mut socket = place.socket().await?;
    place.app.events.add_permits(1);
    assert!(stream.chunk().await?.is_some());
    let hanging = tokio::spawn(place.ask(&client, Method::POST, "/never").body("x").send());
    // Not only its connection: a request that was not sent yet is held, and sent after the wake.
    until("the request that hangs", || Ok(place.app.counted().contains_key("never").then_some(()))).await?;
    place.service.pause(&place.id).await?.expect(201)?;
    assert!(stream.chunk().await.is_err(), "cut off, and the client can tell");
    assert!(!matches!(socket.next().await, Some(Ok(_))));
    let said = message(hanging.await??, 502).await?;
    assert!(said.contains("may have got"), "{said}");
    // Requests that come while a pause is under way wait for its end, and wake.
    let answer = place.ask(&client, Method::POST, "/count").body("a").send().await?;
    assert!(answer.headers().contains_key("server-timing"), "the wake says what it cost");
    assert_eq!(answer.text().await?, "a");
    let mut all = tokio::task::JoinSet::new();
    place.service.proxy.add(Rule::once(Method::PUT, "/head", Fault::Hold));
    let pause = {
        let (url, key) = (format!("{}/v1/sandbox/{}/pause", place.service.url, place.id), place.service.key.clone());
        let client = client.clone();
        tokio::spawn(async move { client.post(url).bearer_auth(key).send().await })
    };
    place.service.await_held().await?;
    assert_eq!(place.service.state(&place.id).await?, "snapshotting");
    for number in 0..20 {
        let request = place.ask(&client, Method::POST, "/count").body(format!("b{number}"));
        all.spawn(async move { Ok::<_, reqwest::Error>(request.send().await?.status().as_u16()) });
    }
    let waiting = "stasis_guest_requests 20";
    place.service.await_told(waiting).await?;
    place.service.proxy.release();
    while let Some(done) = all.join_next().await {
        assert_eq!(done??, 200);
    }
    assert_eq!(pause.await??.status().as_u16(), 201);
    assert!(place.app.counted().values().all(|n| *n == 1));
    assert_eq!(place.guest.lives(), 3);
    Ok(())
}

async fn activity() -> Outcome {
    let create = json!({"template_name": "test/pulse", "memory": 32, "timeout": 5, "auto_pause": true});
    let place = Place::with(create, &[]).await?;
    let mut socket = place.socket().await?;
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        socket.send(Message::text("x")).await?;
        assert!(matches!(socket.next().await, Some(Ok(_))));
        assert_eq!(place.service.state(&place.id).await?, "running");
    }
    let lives = place.guest.lives();
    drop(socket);
    place.service.await_state(&place.id, "paused").await?;
    let client = place.client(|c| c)?;
    let answer = place.ask(&client, Method::POST, "/count").body("again").send().await?;
    assert_eq!(answer.text().await?, "again");
    assert_eq!(place.guest.lives(), lives + 1);
    place.service.await_state(&place.id, "paused").await
}

async fn presigned() -> Outcome {
    let place = Place::new().await?;
    let path = format!("/v1/sandbox/{}/presigned-url", place.id);
    let create = async |life: u64| {
        let body = json!({"port": place.app.addr.port(), "expires_in": life});
        place.service.call("POST", &path, Some(body)).await?.expect(201)
    };
    let made = create(3600).await?;
    for field in ["id", "token", "url", "sandbox_id", "port", "expires_at", "created_at"] {
        assert!(!made.json[field].is_null() && made.json[field] != json!(""), "{field} in {made:?}");
    }
    let token = made.text("token");
    assert_eq!(made.text("url"), format!("https://{token}.{DOMAIN}"));
    assert!(made.text("id").starts_with("psu-") && made.text("sandbox_id") == place.id);
    let client = Client::builder()
        .add_root_certificate(place.ca.clone())
        .resolve(&format!("{token}.{DOMAIN}"), place.addr)
        .build()?;
    let open = format!("https://{token}.{DOMAIN}:{}", place.addr.port());
    // No key is needed; one that comes along all the same goes no further. A paused sandbox is woken.
    place.service.pause(&place.id).await?.expect(201)?;
    let answer = client.get(format!("{open}/headers")).bearer_auth(&place.service.key).send().await?;
    assert_eq!(
        (answer.status().as_u16(), answer.headers()["referrer-policy"].as_bytes()),
        (200, b"same-origin".as_slice())
    );
    assert!(!answer.text().await?.contains(&place.service.key));
    let own = client.get(format!("{open}/headers")).basic_auth("app", Some("x")).send().await?.text().await?;
    assert!(own.contains("Basic "));
    // One that expires; one whose secret is guessed; one of another sandbox's path; one that is deleted.
    let by =
        |token: &str| client.get(format!("{}/headers", place.service.url)).header("host", format!("{token}.{DOMAIN}"));
    let short = create(1).await?.text("token");
    assert_ne!(by(&short).send().await?.status().as_u16(), 401);
    until_gone(|| by(&short)).await?;
    let guessed = format!("{}{}", &token[..12], "a".repeat(40));
    message(by(&guessed).send().await?, 404).await?;
    let other = place.service.other_key()?;
    let one = format!("{path}/{}", made.text("id"));
    place.service.call_as(&other, "DELETE", &one, None).await?.expect(404)?;
    place.service.call_as(&other, "POST", &path, Some(r#"{"port":80}"#.to_owned())).await?.expect(404)?;
    assert_eq!(by(&token).send().await?.status().as_u16(), 200);
    place.service.call("DELETE", &one, None).await?.expect(204)?;
    place.service.call("DELETE", &one, None).await?.expect(404)?;
    message(by(&token).send().await?, 404).await?;
    place.service.call("POST", &path, Some(json!({"port": 0}))).await?.expect(400)?;
    let log = place.service.log();
    assert!(!log.contains(&token[12..]) && !log.contains(&short[12..]), "tokens are not logged");
    assert!(log.contains(&made.text("id")));
    Ok(())
}

async fn until_gone(request: impl Fn() -> RequestBuilder) -> Result<(), Error> {
    for _ in 0..200 {
        if request().send().await?.status().as_u16() == 404 {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Err("it does not expire".into())
}
