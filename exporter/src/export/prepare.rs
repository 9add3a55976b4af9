//! Everything that an export decides before it writes: the configuration, the graphs and the list of weights. All
//! options are checked against the checkpoint here, so that nothing is written for an export that cannot succeed.

use std::sync::Arc;

use serde_json::Value;
use t5gemma_graphs::config::Config;
use t5gemma_graphs::facts::VisionFacts;
use t5gemma_graphs::images::{ImageSettings, ImageTokens};
use t5gemma_graphs::onnx::Definition;
use t5gemma_graphs::quantization::Activations;
use t5gemma_graphs::task::Task;
use t5gemma_graphs::{Options, Vocabulary, definitions};

use super::{Export, custom, rules};
use crate::checkpoint::{Checkpoint, GENERATION_CONFIG, SENTENCEPIECE_FILE, SENTENCEPIECE_TENSOR};
use crate::error::{Error, Result};
use crate::images::{PREPROCESSOR, PROCESSOR};
use crate::source::{Source, SourceConfig};
use crate::tensorrt::MemoryEstimate;
use crate::weights::{self, Weight};

/// Building graphs of up to this many layers is fast, whether or not the checkpoint has them.
const LAYERS_OF_REAL_MODELS: usize = 256;

/// An export that is ready to be written.
pub(super) struct Prepared<'e> {
    pub export: &'e Export,
    pub source: &'e Source,
    /// The text of `config.json`.
    pub config_text: String,
    pub config: Config,
    /// The content of `generation_config.json`.
    pub generation_config: Option<Value>,
    /// Files to copy into the model folder.
    pub companions: Vec<(&'static str, Vec<u8>)>,
    /// How images become pixel values and tokens, if the model reads images.
    pub images: Option<ImageSettings>,
    pub options: Options,
    /// The graphs of the task, in the order of `interface::graphs`; then the same graphs with adapters as inputs, if the
    /// model can be given any.
    pub graphs: Vec<Definition>,
    pub weights: Vec<Weight>,
    /// Tensors of the checkpoint that no graph uses.
    pub unused: Vec<String>,
    /// GPU memory that the serving plan takes.
    pub memory: Option<MemoryEstimate>,
}

impl<'e> Prepared<'e> {
    pub fn new(export: &'e Export, source: &'e Source) -> Result<Prepared<'e>> {
        let SourceConfig { text: config_text, mut config, origin } = source.config()?;
        rules::check_family(export, &config)?;
        export.custom.lay_over(&mut config, source)?;
        if !reads_images(export, &config, source) {
            config.vision = None;
        }
        rules::check_vision(export, &config)?;
        if let Some(vision) = &config.vision {
            vision.check().map_err(|error| Error::config(&origin, error))?;
        }
        let task = rules::task(export.task.clone(), &config)?;
        custom::check(export, &config, &task)?;
        rules::check_task(export, &task)?;
        rules::check_sizes(export, &config)?;
        if let Source::Checkpoint(checkpoint) = source {
            checkpoint.check_present(|tensor| weights::is_for(tensor, &config, &task))?;
            check_layers(checkpoint, &config, &task)?;
        }
        let images = config.facts().vision.map(|vision| {
            let VisionFacts { image_size, tokens_per_image, image_token: image, start_of_image, end_of_image, .. } =
                vision;
            let tokens = ImageTokens { image, start_of_image, end_of_image };
            source.image_settings(ImageSettings::new(image_size, tokens_per_image, tokens))
        });
        let images = images.transpose()?;
        let mut companions = source.companions()?;
        if images.is_none() {
            companions.retain(|(name, _)| ![PREPROCESSOR, PROCESSOR].contains(name));
        }
        if export.write_sentencepiece {
            let Source::Checkpoint(checkpoint) = source else { return Err(rules::no_sentencepiece().into()) };
            companions.retain(|(name, _)| *name != SENTENCEPIECE_FILE);
            companions.push((SENTENCEPIECE_FILE, checkpoint.sentencepiece()?.to_vec()));
        }
        let mut generation_config = source.generation_config()?;
        if config.custom.progress.is_some() {
            // The published loop of such models reads config.json alone; this file is the text model's.
            companions.retain(|(name, _)| *name != GENERATION_CONFIG);
            generation_config = None;
        }
        if let Some(tokens) = &export.kept_tokens {
            rules::check_kept_tokens(tokens, &config, generation_config.as_ref())?;
        }
        let vocabulary = match source {
            Source::Checkpoint(checkpoint) => weights::vocabulary(&config, checkpoint, &task)?,
            Source::Dummy { .. } => weights::default_vocabulary(&config),
        };
        let padding_row = rules::padding_row(export, &task, &config)?;
        let options = Options {
            task,
            target: export.target,
            dtype: export.dtype,
            logits: export.logits,
            alignment_layers: rules::alignment_layers(&export.alignment, &config)?,
            encoder_window: config.family.encoder_window().unwrap_or(export.encoder_window),
            quantization: export.quantization.clone(),
            activations: export.activations.clone(),
            capacity: export.capacity,
            padding_row: padding_row.map(Arc::from),
            vocabulary: Vocabulary { kept: export.kept_tokens.clone().map(Arc::from), ..vocabulary },
            takes_adapters: false,
        };
        if let Activations::Ranges(ranges) = &export.activations {
            rules::check_ranges(&config, &options, ranges)?;
        }
        let mut graphs = definitions(&config, &options);
        if export.lora_inputs.is_some() {
            graphs.extend(definitions(&config, &Options { takes_adapters: true, ..options.clone() }));
        }
        let memory = match &export.plan {
            Some(plan) => {
                rules::check_fixed_length(plan, &options.task)?;
                plan.check(&config, &options, &graphs)?;
                let memory = MemoryEstimate::new(plan, &config, &options, &graphs);
                rules::check_memory(export.memory_limit, &memory)?;
                Some(memory)
            }
            None => None,
        };
        let weights = weights::collect(&graphs, &config, &options);
        rules::check_excluded(&export.quantization.exclude, &weights)?;
        let unused = match source {
            Source::Checkpoint(checkpoint) => {
                let mut unused = weights::check(&weights, checkpoint, &config, &options.task)?;
                unused.retain(|tensor| !(export.write_sentencepiece && tensor == SENTENCEPIECE_TENSOR));
                unused
            }
            Source::Dummy { .. } => Vec::new(),
        };
        weights::check_size(&weights, &origin)?;
        Ok(Prepared {
            export,
            source,
            config_text,
            config,
            generation_config,
            companions,
            images,
            options,
            graphs,
            weights,
            unused,
            memory,
        })
    }
}

/// Whether the model is to read images, and has the weights for it: a text-only checkpoint may have a configuration of
/// the part that does, with the defaults.
fn reads_images(export: &Export, config: &Config, source: &Source) -> bool {
    export.vision
        && match source {
            Source::Checkpoint(checkpoint) => checkpoint.lists(|name| weights::is_of_vision(name, config)),
            Source::Dummy { .. } => true,
        }
}

/// Refuses a configuration with more layers than the checkpoint can have, before graphs with that many layers are
/// built.
fn check_layers(checkpoint: &Checkpoint, config: &Config, task: &Task) -> Result<()> {
    let of_decoder = if task.is_generation() { config.decoder.layers.len() } else { 0 };
    let (layers, tensors) = (config.encoder.layers.len() + of_decoder, checkpoint.names().count());
    if layers <= tensors.max(LAYERS_OF_REAL_MODELS) {
        return Ok(());
    }
    Err(Error::Tensors {
        checkpoint: checkpoint.path().to_path_buf(),
        mismatches: vec![format!("expected tensors of {layers} layers, found {tensors} tensors in all")],
        hint: String::new(),
    })
}
