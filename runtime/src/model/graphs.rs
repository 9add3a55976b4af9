//! The opened graphs of a model, of which some are opened when they are first needed.

use std::sync::PoisonError;

use ort::session::builder::PrepackedWeights;

use super::Model;
use crate::error::Error;
use crate::session::{GraphSession, OpenOptions, Opener};

/// The graphs of a model that generates.
pub(super) struct Graphs {
    pub encoder: GraphSession,
    pub decoder: GraphSession,
    pub decoder_with_past: GraphSession,
}

/// The graphs that begin targets.
pub(super) struct FirstGraphs {
    pub encoder: GraphSession,
    pub decoder: GraphSession,
}

/// The sessions that a run uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Those of all calls.
    Main,
    /// Those for encoding and first steps beside the steps of other rows, so that these do not wait for a session. On
    /// other devices than the CPU, and with adapters, those of all calls.
    Aside,
}

/// What the graphs that are opened later are opened with.
pub(super) struct LazyOpener {
    pub options: OpenOptions,
    pub prepacked: PrepackedWeights,
}

impl Model {
    /// The graphs for rows with or without adapters.
    pub(super) fn graphs(&self, take_adapters: bool) -> Result<&Graphs, Error> {
        if !take_adapters {
            return Ok(&self.base);
        }
        if let Some(graphs) = self.lora.get() {
            return Ok(graphs);
        }
        let opener = self.lazy_opener.lock().unwrap_or_else(PoisonError::into_inner);
        if self.lora.get().is_none() {
            let LazyOpener { options, prepacked } = &*opener;
            let specs = self.folder.manifest.graph_specs();
            let mut opener = Opener::with_weights(&self.folder, options, prepacked.clone(), self._uploaded.as_ref())?;
            let mut open = |name: &str| {
                let spec = specs.iter().find(|spec| spec.name == name);
                opener.open(name, &spec.expect("a model that takes adapters has these graphs").ports)
            };
            let graphs = Graphs {
                encoder: open("encoder_lora")?,
                decoder: open("decoder_lora")?,
                decoder_with_past: open("decoder_with_past_lora")?,
            };
            self.lora.get_or_init(|| graphs);
        }
        Ok(self.lora.get().expect("opened just now"))
    }

    /// The encoder and the graph of the first step.
    pub(super) fn first_graphs(
        &self,
        lane: Lane,
        take_adapters: bool,
    ) -> Result<(&GraphSession, &GraphSession), Error> {
        if lane == Lane::Main || take_adapters || !self.on_cpu {
            let graphs = self.graphs(take_adapters)?;
            return Ok((&graphs.encoder, &graphs.decoder));
        }
        if self.aside.get().is_none() {
            let opener = self.lazy_opener.lock().unwrap_or_else(PoisonError::into_inner);
            let LazyOpener { options, prepacked } = &*opener;
            let specs = self.folder.manifest.graph_specs();
            let mut opener = Opener::with_weights(&self.folder, options, prepacked.clone(), self._uploaded.as_ref())?;
            let mut open = |name: &str| {
                let spec = specs.iter().find(|spec| spec.name == name);
                opener.open(name, &spec.expect("a model that generates has these graphs").ports)
            };
            let graphs = FirstGraphs { encoder: open("encoder")?, decoder: open("decoder")? };
            self.aside.get_or_init(|| graphs);
        }
        let FirstGraphs { encoder, decoder } = self.aside.get().expect("opened just now");
        Ok((encoder, decoder))
    }
}
