//! `Metrics`: counters and histograms in the text format of Prometheus. All series exist from the start, and labels are
//! models, doors, statuses and reasons only, so that their number does not grow with the requests.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use t5gemma_runtime::EngineStats;

/// Bounds of the times of whole requests and their parts, in seconds.
const SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0];

/// What is counted.
#[derive(Debug)]
pub struct Metrics {
    models: BTreeMap<String, ModelMetrics>,
    /// Answers by door and status.
    answers: Mutex<BTreeMap<(&'static str, u16), u64>>,
    /// Requests that were not answered, by reason.
    refused: Mutex<BTreeMap<&'static str, u64>>,
    /// Requests whose client left.
    pub disconnected: AtomicU64,
    /// Open connections.
    pub connections: AtomicU64,
}

/// What is counted for a model.
#[derive(Debug, Default)]
pub struct ModelMetrics {
    /// From acceptance to the end.
    pub request: Histogram,
    /// From acceptance to the first token.
    pub first_token: Histogram,
    /// Between two tokens of a row.
    pub between_tokens: Histogram,
    /// From acceptance until the first source was admitted.
    pub queue: Histogram,
    /// Time in the encoder.
    pub encode: Histogram,
    /// Source tokens of finished requests.
    pub source_tokens: AtomicU64,
    /// Generated tokens of finished requests.
    pub target_tokens: AtomicU64,
    /// Targets by the reason of their end.
    finished: Mutex<BTreeMap<&'static str, u64>>,
}

/// Counts of values in buckets.
#[derive(Debug)]
pub struct Histogram {
    counts: Vec<AtomicU64>,
    /// In microseconds.
    sum: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { counts: (0..=SECONDS.len()).map(|_| AtomicU64::new(0)).collect(), sum: AtomicU64::new(0) }
    }
}

impl Histogram {
    /// Counts a time.
    pub fn observe(&self, time: std::time::Duration) {
        let seconds = time.as_secs_f64();
        let bucket = SECONDS.iter().position(|&bound| seconds <= bound).unwrap_or(SECONDS.len());
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(time.as_micros().try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn write(&self, out: &mut String, name: &str, labels: &str) {
        let mut total = 0;
        for (at, count) in self.counts.iter().enumerate() {
            total += count.load(Ordering::Relaxed);
            let bound = SECONDS.get(at).map_or("+Inf".to_string(), f64::to_string);
            let _ = writeln!(out, "{name}_bucket{{{labels},le=\"{bound}\"}} {total}");
        }
        let sum = self.sum.load(Ordering::Relaxed) as f64 / 1e6;
        let _ = writeln!(out, "{name}_sum{{{labels}}} {sum}\n{name}_count{{{labels}}} {total}");
    }
}

/// The reasons for which targets end.
const FINISH_REASONS: [&str; 6] = ["eos", "length", "stop_string", "time", "constraint", "constraint_incomplete"];

impl ModelMetrics {
    /// Counts a finished target.
    pub fn finished(&self, reason: &'static str) {
        *self.finished.lock().unwrap_or_else(PoisonError::into_inner).entry(reason).or_default() += 1;
    }
}

/// A model's engine at this moment.
pub struct Engine<'a> {
    /// The model's name.
    pub model: &'a str,
    /// The engine's statistics.
    pub stats: EngineStats,
}

impl Metrics {
    /// All series at zero.
    pub fn new<'a>(models: impl Iterator<Item = &'a str>, doors: &[&'static str]) -> Metrics {
        let of_model = |name: &str| {
            let metrics = ModelMetrics::default();
            *metrics.finished.lock().unwrap_or_else(PoisonError::into_inner) = FINISH_REASONS.map(|it| (it, 0)).into();
            (name.to_string(), metrics)
        };
        Metrics {
            models: models.map(of_model).collect(),
            answers: Mutex::new(doors.iter().map(|&door| ((door, 200), 0)).collect()),
            refused: Mutex::new(["full", "deadline", "internal"].map(|reason| (reason, 0)).into()),
            disconnected: AtomicU64::new(0),
            connections: AtomicU64::new(0),
        }
    }

    /// The counts of a model.
    pub fn model(&self, name: &str) -> Option<&ModelMetrics> {
        self.models.get(name)
    }

    /// Counts an answer.
    pub fn answered(&self, door: &'static str, status: u16) {
        *self.answers.lock().unwrap_or_else(PoisonError::into_inner).entry((door, status)).or_default() += 1;
    }

    /// Counts a request that was not answered.
    pub fn refused(&self, reason: &'static str) {
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner).entry(reason).or_default() += 1;
    }

    /// The text for Prometheus.
    pub fn text(&self, accepted: usize, ready: bool, engines: &[Engine<'_>], vllm: bool) -> String {
        let mut out = String::new();
        let head = |out: &mut String, name: &str, kind: &str, help: &str| {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        };
        let one = |out: &mut String, name: &str, kind: &str, help: &str, value: f64| {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
        };
        one(&mut out, "t5gemma_ready", "gauge", "Whether the server takes requests.", f64::from(u8::from(ready)));
        one(&mut out, "t5gemma_requests_in_flight", "gauge", "Accepted and unfinished requests.", accepted as f64);
        let connections = self.connections.load(Ordering::Relaxed) as f64;
        one(&mut out, "t5gemma_connections", "gauge", "Open connections.", connections);
        let left = self.disconnected.load(Ordering::Relaxed) as f64;
        one(&mut out, "t5gemma_client_disconnected_total", "counter", "Requests whose client left.", left);
        head(&mut out, "t5gemma_http_answers_total", "counter", "Answers by door and status.");
        for ((door, status), count) in &*self.answers.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = writeln!(out, "t5gemma_http_answers_total{{door=\"{door}\",status=\"{status}\"}} {count}");
        }
        head(&mut out, "t5gemma_refused_total", "counter", "Requests that failed, by reason.");
        for (reason, count) in &*self.refused.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = writeln!(out, "t5gemma_refused_total{{reason=\"{reason}\"}} {count}");
        }
        self.write_engines(&mut out, engines);
        self.write_models(&mut out, "t5gemma_", "model");
        if vllm {
            self.write_vllm(&mut out, engines);
        }
        out
    }

    fn write_engines(&self, out: &mut String, engines: &[Engine<'_>]) {
        type Value = fn(&EngineStats) -> f64;
        let rows: [(&str, &str, &str, Value); 8] = [
            ("requests_waiting", "gauge", "Requests with a source that has not been admitted.", |it| {
                it.waiting_requests as f64
            }),
            ("sources_waiting", "gauge", "Sources that have not been admitted.", |it| it.waiting_sources as f64),
            ("rows_waiting", "gauge", "Target rows that these will have.", |it| it.waiting_rows as f64),
            ("sources_in_flight", "gauge", "Sources in flight.", |it| it.sources as f64),
            ("rows_in_flight", "gauge", "Target rows in flight.", |it| it.rows as f64),
            ("planned_bytes", "gauge", "Bytes that the rows in flight may need.", |it| it.planned_bytes as f64),
            ("steps_total", "counter", "Runs of a decoder graph.", |it| it.steps as f64),
            ("stepped_rows_total", "counter", "Target rows of all runs.", |it| it.stepped_rows as f64),
        ];
        for (name, kind, help, value) in rows {
            let _ = writeln!(out, "# HELP t5gemma_{name} {help}\n# TYPE t5gemma_{name} {kind}");
            for Engine { model, stats } in engines {
                let _ = writeln!(out, "t5gemma_{name}{{model=\"{}\"}} {}", escaped(model), value(stats));
            }
        }
    }

    fn write_models(&self, out: &mut String, prefix: &str, label: &str) {
        type Part = fn(&ModelMetrics) -> &Histogram;
        let histograms: [(&str, &str, Part); 5] = [
            ("request_seconds", "From acceptance to the end.", |it| &it.request),
            ("time_to_first_token_seconds", "From acceptance to the first token.", |it| &it.first_token),
            ("inter_token_seconds", "Between two tokens of a row.", |it| &it.between_tokens),
            ("queue_seconds", "From acceptance until the first source was admitted.", |it| &it.queue),
            ("encode_seconds", "Time in the encoder.", |it| &it.encode),
        ];
        for (name, help, part) in histograms {
            let _ = writeln!(out, "# HELP {prefix}{name} {help}\n# TYPE {prefix}{name} histogram");
            for (model, metrics) in &self.models {
                let labels = format!("{label}=\"{}\"", escaped(model));
                part(metrics).write(out, &format!("{prefix}{name}"), &labels);
            }
        }
        type Count = fn(&ModelMetrics) -> &AtomicU64;
        let counts: [(&str, &str, Count); 2] = [
            ("source_tokens_total", "Source tokens of finished requests.", |it| &it.source_tokens),
            ("target_tokens_total", "Generated tokens of finished requests.", |it| &it.target_tokens),
        ];
        for (name, help, count) in counts {
            let _ = writeln!(out, "# HELP {prefix}{name} {help}\n# TYPE {prefix}{name} counter");
            for (model, metrics) in &self.models {
                let count = count(metrics).load(Ordering::Relaxed);
                let _ = writeln!(out, "{prefix}{name}{{{label}=\"{}\"}} {count}", escaped(model));
            }
        }
        let _ = writeln!(
            out,
            "# HELP {prefix}targets_total Targets by the reason of their end.\n# TYPE {prefix}targets_total counter"
        );
        for (model, metrics) in &self.models {
            for (reason, count) in &*metrics.finished.lock().unwrap_or_else(PoisonError::into_inner) {
                let _ = writeln!(
                    out,
                    "{prefix}targets_total{{{label}=\"{}\",reason=\"{reason}\"}} {count}",
                    escaped(model)
                );
            }
        }
    }

    /// The names that dashboards and autoscalers made for vLLM look for.
    fn write_vllm(&self, out: &mut String, engines: &[Engine<'_>]) {
        for (name, value) in [
            ("num_requests_running", (|it| it.sources) as fn(&EngineStats) -> usize),
            ("num_requests_waiting", |it| it.waiting_requests),
        ] {
            let _ = writeln!(out, "# TYPE vllm:{name} gauge");
            for Engine { model, stats } in engines {
                let _ = writeln!(out, "vllm:{name}{{model_name=\"{}\"}} {}", escaped(model), value(stats));
            }
        }
        type Part = fn(&ModelMetrics) -> &Histogram;
        let histograms: [(&str, Part); 4] = [
            ("e2e_request_latency_seconds", |it| &it.request),
            ("time_to_first_token_seconds", |it| &it.first_token),
            ("inter_token_latency_seconds", |it| &it.between_tokens),
            ("request_queue_time_seconds", |it| &it.queue),
        ];
        for (name, part) in histograms {
            let _ = writeln!(out, "# TYPE vllm:{name} histogram");
            for (model, metrics) in &self.models {
                let labels = format!("model_name=\"{}\"", escaped(model));
                part(metrics).write(out, &format!("vllm:{name}"), &labels);
            }
        }
        type Count = fn(&ModelMetrics) -> &AtomicU64;
        let counts: [(&str, Count); 2] =
            [("prompt_tokens_total", |it| &it.source_tokens), ("generation_tokens_total", |it| &it.target_tokens)];
        for (name, count) in counts {
            let _ = writeln!(out, "# TYPE vllm:{name} counter");
            for (model, metrics) in &self.models {
                let count = count(metrics).load(Ordering::Relaxed);
                let _ = writeln!(out, "vllm:{name}{{model_name=\"{}\"}} {count}", escaped(model));
            }
        }
    }
}

/// A label's value.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_series_is_there_from_the_start() {
        let metrics = Metrics::new(["a\"b"].into_iter(), &["chat"]);
        let text = metrics.text(0, true, &[], true);
        for line in [
            "t5gemma_http_answers_total{door=\"chat\",status=\"200\"} 0",
            "t5gemma_request_seconds_bucket{model=\"a\\\"b\",le=\"+Inf\"} 0",
            "t5gemma_targets_total{model=\"a\\\"b\",reason=\"eos\"} 0",
            "vllm:generation_tokens_total{model_name=\"a\\\"b\"} 0",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} in\n{text}");
        }
        let model = metrics.model("a\"b").expect("it is served");
        model.request.observe(Duration::from_millis(3));
        model.request.observe(Duration::from_secs(1000));
        let text = metrics.text(0, true, &[], false);
        for line in [
            "t5gemma_request_seconds_bucket{model=\"a\\\"b\",le=\"0.0025\"} 0",
            "t5gemma_request_seconds_bucket{model=\"a\\\"b\",le=\"0.005\"} 1",
            "t5gemma_request_seconds_bucket{model=\"a\\\"b\",le=\"+Inf\"} 2",
            "t5gemma_request_seconds_sum{model=\"a\\\"b\"} 1000.003",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} in\n{text}");
        }
        assert!(!text.contains("vllm"));
    }
}
