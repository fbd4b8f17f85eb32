//! Traces for an OpenTelemetry collector, where the operator names one (`telemetry.otlp_endpoint`): a span for each request, below the span
//! that the caller's `traceparent` names, and one for each operation on a sandbox with its phases and bytes, below the request that asked for
//! it. What a sandbox does by itself, such as an auto-pause, has a trace of its own.
//!
//! A span says what `/metrics` and the log say: methods, routes, ids, statuses, times. Paths, queries, bodies and keys are in none.
//!
//! The exporter's own thread sends batches. Its queue is bounded, and what does not fit, or what the collector does not take, is dropped: a
//! collector that is slow or gone costs nothing but its spans.

use crate::config;
use crate::error::Error;
use crate::ids::SandboxId;
use crate::sources::UnixMs;
use crate::timing::Timing;
use http::{HeaderMap, StatusCode};
use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::{SpanKind, Status, TraceContextExt as _, Tracer as _, TracerProvider as _};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::HeaderExtractor;
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Where a collector takes traces (OTLP specification, "OTLP/HTTP Request").
const TRACES: &str = "/v1/traces";
/// For one batch.
const SENDING: Duration = Duration::from_secs(10);
/// For what is left when the supervisor ends.
const LAST: Duration = Duration::from_secs(2);
const NAME: &str = "stasis";

/// Nothing can be exported.
#[derive(Debug, thiserror::Error)]
#[error("cannot export traces to {endpoint} (telemetry.otlp_endpoint)")]
pub struct TelemetryError {
    endpoint: String,
    #[source]
    source: ExporterBuildError,
}

/// Where spans go, if they do.
#[derive(Debug, Default)]
pub struct Telemetry {
    exported: Option<(SdkTracerProvider, SdkTracer)>,
}

impl Telemetry {
    /// Begins to export, if that is configured. `owner` is this supervisor's name.
    pub fn start(config: &config::Telemetry, owner: &str) -> Result<Self, TelemetryError> {
        let Some(endpoint) = &config.otlp_endpoint else { return Ok(Self::default()) };
        let url = format!("{}{TRACES}", endpoint.trim_end_matches('/'));
        // Headers, such as a key of the collector's, are the crate's to read: OTEL_EXPORTER_OTLP_HEADERS.
        let exporter = SpanExporter::builder().with_http().with_endpoint(url).with_timeout(SENDING).build();
        let exporter = exporter.map_err(|source| TelemetryError { endpoint: endpoint.clone(), source })?;
        let resource = Resource::builder()
            .with_service_name(NAME)
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .with_attribute(KeyValue::new("service.instance.id", owner.to_owned()))
            .build();
        let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        let tracer = provider.tracer(NAME);
        Ok(Self { exported: Some((provider, tracer)) })
    }

    /// Begins the span of a request. What is done within the answer belongs below it; [`answered`] ends it.
    pub fn request(&self, method: &http::Method, headers: &HeaderMap, id: &str) -> Context {
        let Some((_, tracer)) = &self.exported else { return Context::new() };
        let caller = TraceContextPropagator::new().extract_with_context(&Context::new(), &HeaderExtractor(headers));
        let attributes = [
            KeyValue::new("http.request.method", method.as_str().to_owned()),
            KeyValue::new("stasis.request.id", id.to_owned()),
        ];
        // The route is not known yet; a path is no name.
        let builder = tracer.span_builder(method.as_str().to_owned());
        let span = tracer.build_with_context(builder.with_kind(SpanKind::Server).with_attributes(attributes), &caller);
        caller.with_span(span)
    }

    /// Tells of an operation on a sandbox that ended at `ended`, below the request that is answered now, if there is one.
    pub fn operation(
        &self,
        sandbox: &SandboxId,
        operation: &'static str,
        ended: UnixMs,
        took: Duration,
        failure: Option<&Error>,
        timing: &Timing,
    ) {
        let Some((_, tracer)) = &self.exported else { return };
        let milliseconds =
            |name: &str, took: &Duration| KeyValue::new(format!("stasis.phase.{name}_ms"), took.as_secs_f64() * 1000.0);
        let bytes = |name: &str, bytes: u64| {
            KeyValue::new(format!("stasis.bytes.{name}"), i64::try_from(bytes).unwrap_or(i64::MAX))
        };
        let mut attributes = vec![KeyValue::new("stasis.sandbox.id", sandbox.to_string())];
        attributes.extend(timing.phases().iter().map(|(name, took)| milliseconds(name, took)));
        attributes.extend(timing.byte_counts().iter().map(|(name, count)| bytes(name, *count)));
        let ended = time(ended);
        let mut builder = tracer
            .span_builder(operation)
            .with_start_time(ended.checked_sub(took).unwrap_or(UNIX_EPOCH))
            .with_end_time(ended)
            .with_attributes(attributes);
        if let Some(error) = failure {
            builder = builder.with_status(Status::error(error.code()));
        }
        // Ended when it is dropped, at the time that was given.
        drop(tracer.build_with_context(builder, &Context::current()));
    }

    /// Sends what is left. Blocks for a moment.
    pub fn end(&self) {
        if let Some((provider, _)) = &self.exported
            && let Err(error) = provider.shutdown_with_timeout(LAST)
        {
            tracing::warn!(%error, "the last spans were not exported");
        }
    }
}

fn time(at: UnixMs) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(at).unwrap_or(0))
}

/// Names the request that is answered now by its route, such as `/v1/sandbox/{id}/pause`.
pub fn route(method: &http::Method, route: &str) {
    Context::map_current(|context| {
        context.span().update_name(format!("{method} {route}"));
        context.span().set_attribute(KeyValue::new("http.route", route.to_owned()));
    });
}

/// Names the sandbox that the request is about.
pub fn sandbox(context: &Context, id: &SandboxId) {
    context.span().set_attribute(KeyValue::new("stasis.sandbox.id", id.to_string()));
}

/// Ends the span of a request whose head was answered.
pub fn answered(context: &Context, status: StatusCode) {
    let span = context.span();
    span.set_attribute(KeyValue::new("http.response.status_code", i64::from(status.as_u16())));
    if status.is_server_error() {
        span.set_status(Status::error(status.as_str().to_owned()));
    }
    span.end();
}
