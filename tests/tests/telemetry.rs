//! What an OpenTelemetry collector is sent: the collector is a server of ours, everything else is real.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use prost::Message as _;
use stasis_tests::service::{Options, Service};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::{Error, no_pulse, until};
use tokio::net::TcpListener;

/// What a caller of ours says of its own span.
const CALLER: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn main() {
    Suite::default()
        .test("a_request_and_its_operation_are_one_trace", no_pulse(), traces)
        .test("a_collector_that_is_gone_hinders_nothing", no_pulse(), nobody)
        .main();
}

/// A collector: OTLP over HTTP, in protocol buffers.
struct Collector {
    addr: SocketAddr,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    spans: Vec<Span>,
    resource: BTreeMap<String, String>,
    octets: Vec<u8>,
    headers: Vec<String>,
}

fn said(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |attribute: &KeyValue| match attribute.value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::DoubleValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    };
    attributes.iter().map(|attribute| (attribute.key.clone(), text(attribute))).collect()
}

impl Collector {
    async fn start() -> Result<Self, Error> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (addr, seen) = (listener.local_addr()?, Arc::new(Mutex::new(Seen::default())));
        let shared = seen.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let seen = shared.clone();
                let service = service_fn(move |request| take(request, seen.clone()));
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        Ok(Self { addr, seen })
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first span of that name, once it has come.
    async fn span(&self, name: &str) -> Result<Span, Error> {
        until(&format!("the span {name}"), || Ok(self.seen().spans.iter().find(|span| span.name == name).cloned()))
            .await
    }
}

async fn take(request: Request<Incoming>, seen: Arc<Mutex<Seen>>) -> Result<Response<Full<Bytes>>, Infallible> {
    let path = request.uri().path().to_owned();
    let header = |name: &str| request.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    let headers = format!("{path} {} {}", header("content-type"), header("x-collector-key"));
    let body = request.into_body().collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    seen.headers.push(headers);
    seen.octets.extend_from_slice(&body);
    for spans in ExportTraceServiceRequest::decode(body).unwrap_or_default().resource_spans {
        seen.resource.extend(said(&spans.resource.unwrap_or_default().attributes));
        seen.spans.extend(spans.scope_spans.into_iter().flat_map(|scope| scope.spans));
    }
    Ok(Response::new(Full::new(ExportTraceServiceResponse::default().encode_to_vec().into())))
}

fn exporting(to: &str) -> Options {
    let mut options = Options::default();
    let ours = [
        ("STASIS_TELEMETRY_OTLP_ENDPOINT", to),
        // The exporter's own: what a collector wants to be sent, and how soon.
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-collector-key=open"),
        ("OTEL_BSP_SCHEDULE_DELAY", "100"),
    ];
    options.environment.extend(ours.map(|(name, value)| (name.to_owned(), value.to_owned())));
    options
}

async fn traces() -> Outcome {
    let collector = Collector::start().await?;
    let service = Service::start(exporting(&format!("http://{}", collector.addr))).await?;
    let id = service.create_pulse().await?;
    let url = format!("{}/v1/sandbox/{id}/pause", service.url);
    let answer =
        reqwest::Client::new().post(&url).bearer_auth(&service.key).header("traceparent", CALLER).send().await?;
    let request_id = answer.headers()["x-request-id"].to_str()?.to_owned();
    assert_eq!(answer.status().as_u16(), 201);

    let request = collector.span("POST /v1/sandbox/{id}/pause").await?;
    let told = said(&request.attributes);
    let expected = [
        ("http.request.method", "POST"),
        ("http.route", "/v1/sandbox/{id}/pause"),
        ("http.response.status_code", "201"),
        ("stasis.request.id", &request_id),
        ("stasis.sandbox.id", &id),
    ];
    assert!(expected.iter().all(|(name, value)| told.get(*name).is_some_and(|told| told == value)), "{told:?}");
    assert_eq!(request.kind(), SpanKind::Server);
    let hex = |octets: &[u8]| octets.iter().fold(String::new(), |text, octet| text + &format!("{octet:02x}"));
    assert_eq!(format!("00-{}-{}-01", hex(&request.trace_id), hex(&request.parent_span_id)), CALLER);

    let pause = collector.span("pause").await?;
    assert_eq!((&pause.trace_id, &pause.parent_span_id), (&request.trace_id, &request.span_id));
    let told = said(&pause.attributes);
    for name in ["stasis.phase.stop_ms", "stasis.phase.upload_ms", "stasis.phase.head_ms", "stasis.bytes.sent"] {
        assert!(told.get(name).is_some_and(|value| value.parse::<f64>().is_ok_and(|number| number > 0.0)), "{told:?}");
    }
    assert_eq!(told["stasis.sandbox.id"], id);
    assert!(pause.start_time_unix_nano < pause.end_time_unix_nano);

    // What fails says how, in one word of ours.
    service.call("POST", &format!("/v1/sandbox/{id}/start"), None).await?.expect(409)?;
    let refused = said(&collector.span("POST /v1/sandbox/{id}/start").await?.attributes);
    assert_eq!(refused["http.response.status_code"], "409");
    let create = collector.span("create").await?;
    assert_ne!(create.trace_id, pause.trace_id);

    let seen = collector.seen();
    assert_eq!(seen.resource["service.name"], "stasis");
    assert!(seen.headers.iter().all(|one| one == "/v1/traces application/x-protobuf open"), "{:?}", seen.headers);
    let secret = |text: &str| seen.octets.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(!secret(&service.key), "the key was exported");
    assert!(secret(&id));
    Ok(())
}

async fn nobody() -> Outcome {
    let service = Service::start(exporting("http://127.0.0.1:1")).await?;
    let id = service.create_pulse().await?;
    service.pause(&id).await?.expect(201)?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await?;
    until("a word about it in the log", || Ok(service.log().contains("BatchSpanProcessor").then_some(()))).await
}
