//! `Fleet`: several engines, each with a copy of one model on a device of its own, behind one door. A request goes as a whole
//! to the engine that has the fewest sources to answer, so its rows share the steps of that engine only.

use std::sync::Arc;

use crate::engine::{Engine, EngineOptions, EngineStats, Generation, Request};
use crate::error::Error;
use crate::model::Model;

/// Generates for many at once with several copies of a model. Dropping it is [`Fleet::shutdown`].
pub struct Fleet {
    engines: Vec<Engine>,
}

impl Fleet {
    /// Starts an engine for each of the models, with these bounds for each.
    ///
    /// # Errors
    /// No model, or models that are not copies of one.
    pub fn new(models: &[Arc<Model>], options: &EngineOptions) -> Result<Fleet, Error> {
        let Some(first) = models.first() else { return Err(Error::input("models", "at least one", "none")) };
        // Graphs and weights, as their hashes tell.
        let (weights, graphs) = (&first.manifest().weights.record, &first.manifest().graphs);
        let is_copy = |model: &Model| model.manifest().weights.record == *weights && model.manifest().graphs == *graphs;
        if let Some(at) = models.iter().position(|model| !is_copy(model)) {
            return Err(Error::input(format!("models[{at}]"), "a copy of models[0]", "another model"));
        }
        Ok(Fleet { engines: models.iter().map(|model| Engine::new(model.clone(), options.clone())).collect() })
    }

    /// Submits a request to the engine that has the least to do, or of those that may take no more to the next.
    ///
    /// # Errors
    /// As [`Engine::submit`]; [`Error::Busy`] if too many requests are waiting at every engine.
    pub fn submit(&self, request: Request) -> Result<Generation, Error> {
        let loads: Vec<usize> = self.stats().iter().map(|stats| stats.sources + stats.waiting_sources).collect();
        let mut order: Vec<usize> = (0..self.engines.len()).collect();
        order.sort_by_key(|&at| loads[at]);
        let (last, before) = order.split_last().expect("there is at least one engine");
        for &at in before {
            match self.engines[at].submit(request.clone()) {
                Err(Error::Busy { .. }) => {}
                submitted => return submitted,
            }
        }
        self.engines[*last].submit(request)
    }

    /// What each engine has done and is doing.
    pub fn stats(&self) -> Vec<EngineStats> {
        self.engines.iter().map(Engine::stats).collect()
    }

    /// [`Engine::drain`] of all.
    pub fn drain(&self) {
        self.engines.iter().for_each(Engine::drain);
    }

    /// [`Engine::shutdown`] of all.
    pub fn shutdown(&self) {
        self.engines.iter().for_each(Engine::shutdown);
    }
}
