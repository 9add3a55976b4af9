//! `Traces`: the parts of each request as spans of OpenTelemetry, sent by OTLP over HTTP where the usual environment
//! variables say so. The only user of opentelemetry, and of an HTTP client.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::http::HeaderMap;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Span, SpanKind, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::{Bytes, HeaderExtractor, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{SpanExporter, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use t5gemma_runtime::RequestStats;

/// Where spans are sent.
#[derive(Clone, Debug)]
pub struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

/// The span of a request, which ends with the last copy; without a receiver, nothing.
#[derive(Clone, Default)]
pub struct Trace(Option<Arc<Root>>);

struct Root {
    tracer: SdkTracer,
    context: Context,
}

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trace").field("is_recorded", &self.0.is_some()).finish()
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        self.context.span().end();
    }
}

/// Whether the environment asks for traces.
fn are_wanted() -> bool {
    let is = |name: &str, value: &str| std::env::var(name).is_ok_and(|found| found.eq_ignore_ascii_case(value));
    let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let has_receiver = is_set("OTEL_EXPORTER_OTLP_ENDPOINT")
        || is_set("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        || is("OTEL_TRACES_EXPORTER", "otlp");
    has_receiver && !is("OTEL_SDK_DISABLED", "true") && !is("OTEL_TRACES_EXPORTER", "none")
}

impl Traces {
    /// What the environment variables of OpenTelemetry ask for; `None` if they name no receiver.
    ///
    /// # Errors
    /// Variables with values that mean nothing.
    pub fn from_environment() -> Result<Option<Traces>, String> {
        if !are_wanted() {
            return Ok(None);
        }
        let exporter = SpanExporter::builder().with_http().with_http_client(Client::new()).build();
        let exporter = exporter.map_err(|error| format!("traces by OpenTelemetry: {error}"))?;
        let mut resource = Resource::builder();
        if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
            resource = resource.with_service_name("t5gemma");
        }
        let provider =
            SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource.build()).build();
        let tracer = provider.tracer("t5gemma");
        Ok(Some(Traces { provider, tracer }))
    }

    /// Sends what has not been sent. Blocks as long as that takes, a few seconds at most.
    pub fn end(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(Duration::from_secs(3)) {
            crate::log::note(&format!("some traces were not sent: {error}"));
        }
    }

    /// Begins the span of a request, within the one that its header `traceparent` names.
    pub fn begin(&self, door: &str, id: &str, headers: &HeaderMap) -> Trace {
        let parent = TraceContextPropagator::new().extract(&HeaderExtractor(headers));
        let attributes = [("t5gemma.door", door), ("t5gemma.request_id", id)];
        let span = self
            .tracer
            .span_builder(format!("t5gemma {door}"))
            .with_kind(SpanKind::Server)
            .with_attributes(attributes.map(|(name, value)| KeyValue::new(name, value.to_string())))
            .start_with_context(&self.tracer, &parent);
        Trace(Some(Arc::new(Root { tracer: self.tracer.clone(), context: parent.with_span(span) })))
    }
}

impl Trace {
    /// Notes the status of the answer.
    pub fn answered(&self, status: u16) {
        let Some(root) = &self.0 else { return };
        let span = root.context.span();
        span.set_attribute(KeyValue::new("http.response.status_code", i64::from(status)));
        if status >= 500 {
            span.set_status(Status::error(""));
        }
    }

    /// Adds the spans of a request that the engine has ended: `queue`, `encode`, `first token` and `decode`, one after
    /// the other.
    pub fn generated(&self, model: &str, submitted: SystemTime, stats: &RequestStats, failure: Option<&'static str>) {
        let Some(root) = &self.0 else { return };
        let span = root.context.span();
        span.set_attribute(KeyValue::new("gen_ai.request.model", model.to_string()));
        span.set_attribute(KeyValue::new("gen_ai.usage.input_tokens", stats.source_tokens as i64));
        span.set_attribute(KeyValue::new("gen_ai.usage.output_tokens", stats.new_tokens as i64));
        if let Some(failure) = failure {
            span.set_status(Status::error(failure));
        }
        let encoded = stats.queued + stats.encoding;
        let first = stats.first_token.unwrap_or(stats.total).max(encoded);
        let parts = [
            ("queue", Duration::ZERO, stats.queued),
            ("encode", stats.queued, encoded),
            ("first token", encoded, first),
            ("decode", first, stats.total),
        ];
        for (name, from, to) in parts {
            // What a request that ended early has not come to.
            if from > stats.total || (name != "queue" && from == to) {
                continue;
            }
            let part = root.tracer.span_builder(name).with_start_time(submitted + from);
            part.start_with_context(&root.tracer, &root.context).end_with_timestamp(submitted + to.min(stats.total));
        }
    }
}

/// Sends spans, on the thread of the exporter.
#[derive(Debug)]
struct Client(ureq::Agent);

impl Client {
    fn new() -> Client {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(10)))
            .http_status_as_error(false)
            .build();
        Client(config.into())
    }
}

impl HttpClient for Client {
    fn send_bytes<'this, 'future>(
        &'this self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'future>>
    where
        'this: 'future,
        Self: 'future,
    {
        let sent = || -> Result<Response<Bytes>, HttpError> {
            let (parts, body) = request.into_parts();
            let answer = self.0.run(Request::from_parts(parts, body.to_vec()))?;
            let (parts, mut body) = answer.into_parts();
            Ok(Response::from_parts(parts, body.with_config().limit(1 << 20).read_to_vec()?.into()))
        };
        let sent = sent();
        Box::pin(async move { sent })
    }
}
