//! `App`: what all requests share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use tokio::sync::Semaphore;

use crate::admission::Admission;
use crate::config::Config;
use crate::metrics::{Engine, Metrics};
use crate::models::Models;

/// What all requests share.
#[derive(Debug)]
pub struct App {
    /// What to serve.
    pub config: Config,
    /// The models.
    pub models: Models,
    /// What is accepted.
    pub admission: Arc<Admission>,
    /// What is counted.
    pub metrics: Metrics,
    /// One request's images are decoded at a time.
    pub decoding: Arc<Semaphore>,
    phase: AtomicU8,
}

const SERVING: u8 = 0;
const LEAVING: u8 = 1;

impl App {
    /// No model is open yet.
    pub fn new(config: Config, doors: &[&'static str]) -> Arc<App> {
        let models = Models::new(&config.models);
        let names = config.models.iter().map(|model| model.name.as_str());
        let metrics = Metrics::new(names, doors);
        let admission = Admission::new(config.limits);
        let decoding = Arc::new(Semaphore::new(1));
        Arc::new(App { models, metrics, admission, config, decoding, phase: AtomicU8::new(SERVING) })
    }

    /// Whether new requests should be sent here.
    pub fn is_ready(&self) -> bool {
        self.phase.load(Ordering::Relaxed) == SERVING && self.models.are_ready()
    }

    /// Tells those who ask that the server is about to end; requests are still taken.
    pub fn leave(&self) {
        self.phase.store(LEAVING, Ordering::Relaxed);
    }

    /// The text for Prometheus.
    pub fn metrics_text(&self) -> String {
        let ready = self.models.ready();
        let engine = |served: &'_ _| -> Option<_> {
            let served: &Arc<crate::served::Served> = served;
            Some((served.name.clone(), served.generator()?.engine.stats()))
        };
        let stats: Vec<_> = ready.iter().filter_map(engine).collect();
        let engines: Vec<Engine<'_>> = stats.iter().map(|(model, stats)| Engine { model, stats: *stats }).collect();
        self.metrics.text(self.admission.requests(), self.is_ready(), &engines, self.config.vllm_metrics)
    }
}
