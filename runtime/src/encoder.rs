//! `Encoder`: a model folder opened for its encoder alone, or for the only graph of a model that was not exported for
//! generation. Hidden states and pooled vectors are here, classification is in `classify`, generation in `Model`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use ndarray::{Array1, Array2, Array3, ArrayD, ArrayView2, Axis};
use ort::session::builder::PrepackedWeights;
use t5gemma_graphs::facts::Facts;
use t5gemma_graphs::images::ImageSettings;
use t5gemma_graphs::manifest::{MANIFEST, Manifest};
use t5gemma_graphs::task::{Features, PaddingRows, Pooling, Task};

use crate::batch::{Batch, check_alone};
use crate::cancellation::Cancellation;
use crate::device::{Provider, cuda_graphs_require};
use crate::encoder_cache::States;
use crate::error::Error;
use crate::folder::{Folder, other_task};
use crate::images::PixelValues;
use crate::limits::{Limits, pieces_to_encode};
use crate::profiles::Profiles;
use crate::ragged_batch::{self, Grouping, OutputUnit};
use crate::session::{GraphSession, OpenOptions, Opener, float32_values};
use crate::tokenizer::{LazyTokenizer, Tokenizer};
use crate::vision::{self, VisionTower};

const READING_OUTPUT: &str = "reading the output";

/// An opened encoder or classifier, for use from any number of threads. It runs one call at a time.
pub struct Encoder {
    // The session reads the weights that `folder` maps, so it comes first: fields are dropped in order.
    session: GraphSession,
    vision: VisionTower,
    options: OpenOptions,
    prepacked: Mutex<PrepackedWeights>,
    on_cpu: bool,
    limits: Limits,
    tokenizer: LazyTokenizer,
    folder: Folder,
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoder").field("path", &self.folder.path).finish_non_exhaustive()
    }
}

impl Encoder {
    /// Opens the model folder `path` with the default [`OpenOptions`].
    ///
    /// # Errors
    /// As [`Model::open_with`](crate::Model::open_with).
    pub fn open(path: impl AsRef<Path>) -> Result<Encoder, Error> {
        Encoder::open_with(path, &OpenOptions::default())
    }

    /// Opens the model folder `path`, of any task; of a generation model, opens only the encoder.
    ///
    /// # Errors
    /// As [`Model::open_with`](crate::Model::open_with).
    pub fn open_with(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Encoder, Error> {
        options.check()?;
        if let Some(option) = options.provider.cuda_graph_option() {
            return Err(cuda_graphs_require("generation", option));
        }
        let folder = Folder::open(path.as_ref(), options.weights_access())?;
        let parts = folder.manifest.graph_specs();
        let first = parts.first().expect("a model has a graph, and its encoder comes first");
        let mut opener = Opener::new(&folder, options)?;
        let session = opener.open(first.name, &first.ports)?;
        let prepacked = Mutex::new(opener.prepacked());
        drop(opener);
        let on_cpu = options.provider.kind == Provider::Cpu;
        let limits = folder.limits(options.limits.resolved(on_cpu));
        let tokenizer = LazyTokenizer::in_folder(&folder.path);
        let (vision, options) = (VisionTower::default(), options.clone());
        Ok(Encoder { session, vision, options, prepacked, on_cpu, limits, tokenizer, folder })
    }

    /// The sizes, special tokens and labels of the model.
    pub fn facts(&self) -> &Facts {
        &self.folder.manifest.facts
    }

    /// The exporter's description of the model.
    pub fn manifest(&self) -> &Manifest {
        &self.folder.manifest
    }

    /// How images become pixel values and tokens.
    ///
    /// # Errors
    /// A model that reads no images.
    pub fn image_settings(&self) -> Result<&ImageSettings, Error> {
        self.folder.image_settings()
    }

    /// The sizes of the model's serving plan, if it has one.
    pub(crate) fn profiles(&self) -> Option<&Profiles> {
        self.folder.profiles.as_ref()
    }

    /// The model's folder.
    pub(crate) fn path(&self) -> &Path {
        &self.folder.path
    }

    /// The model's tokenizer, loaded by the first call.
    ///
    /// # Errors
    /// The folder has no `tokenizer.json`, or an unusable one.
    pub fn tokenizer(&self) -> Result<&Tokenizer, Error> {
        self.tokenizer.get()
    }

    /// The token that pads sources of unequal length.
    pub fn pad_token_id(&self) -> i64 {
        self.folder.manifest.facts.tokens.pad.unwrap_or(0)
    }

    /// What the model's graph returns: last hidden states without pooling, unless exported otherwise.
    ///
    /// # Errors
    /// The model is a classifier.
    pub fn features(&self) -> Result<Features, Error> {
        match &self.folder.manifest.task {
            Task::FeatureExtraction(features) => Ok(*features),
            Task::Text2TextGeneration => Ok(Features::default()),
            task => Err(self.other_task(task, "feature-extraction, to encode with this model")),
        }
    }

    /// The batch as the graph reads it: sources padded to the length that the model was exported with. States and masks
    /// of this batch have the same length.
    pub fn pad<'b>(&self, batch: &'b Batch) -> Cow<'b, Batch> {
        let Some(Features { fixed_length, padding_rows, .. }) = self.folder.features() else {
            return Cow::Borrowed(batch);
        };
        if fixed_length.is_none() && padding_rows.is_unspecified() {
            return Cow::Borrowed(batch);
        }
        Cow::Owned(batch.with_own_padding(fixed_length.unwrap_or(0), self.pad_token_id()))
    }

    /// The hidden states of each token, `[rows, length, hidden_size]`; `length` is that of [`pad`](Encoder::pad). Those
    /// of padding are meaningless, unless the model was exported with states for padding; only then may sources be empty.
    ///
    /// # Errors
    /// A model of another task, or one that returns one vector per source; otherwise as
    /// [`Model::encode`](crate::Model::encode).
    pub fn encode(&self, batch: &Batch, cancel: &Cancellation) -> Result<Array3<f32>, Error> {
        let pooling = self.features()?.pooling;
        if pooling != Pooling::None {
            return Err(self.pooled_already(Pooling::None, pooling));
        }
        self.output(batch, cancel)?.into_dimensionality().map_err(wrong_rank)
    }

    /// The features of images, as [`Model::encode_images`](crate::Model::encode_images).
    ///
    /// # Errors
    /// As there.
    pub fn encode_images(&self, images: &[PixelValues], cancel: &Cancellation) -> Result<Array3<f32>, Error> {
        check_alone(images, self.facts())?;
        let features = self.features_of(&[images.to_vec()], cancel)?;
        vision::stacked(&features[0], self.facts())
    }

    /// The hidden states of each token by layer, `[rows, length, hidden_size]` each, in the order of transformers'
    /// `hidden_states`: the embedding, the output of every layer, and of the last layer the normed output.
    ///
    /// # Errors
    /// A model that was not exported with `output_hidden_states`; otherwise as [`Encoder::encode`].
    pub fn hidden_states(&self, batch: &Batch, cancel: &Cancellation) -> Result<Vec<Array3<f32>>, Error> {
        if !self.features()?.output_hidden_states {
            return Err(Error::Folder {
                path: self.path().join(MANIFEST),
                field: "task.output_hidden_states".into(),
                expected: "true (export with output_hidden_states)".into(),
                found: "false".into(),
            });
        }
        let outputs = self.outputs(batch, cancel)?.into_iter();
        let mut states: Vec<Array3<f32>> =
            outputs.map(|output| output.into_dimensionality().map_err(wrong_rank)).collect::<Result<_, _>>()?;
        states.rotate_left(1);
        Ok(states)
    }

    /// The names of the graph's outputs with states: those of [`Encoder::hidden_states`], or the only one.
    pub fn output_names(&self) -> Vec<String> {
        let manifest = &self.folder.manifest;
        let graph = manifest.graph_specs().into_iter().next().expect("a model has a graph");
        let of_states = graph.ports.outputs.into_iter().take(1 + self.folder.hidden_states());
        let mut names: Vec<String> = of_states.map(|port| port.name).collect();
        names.rotate_left(1);
        names
    }

    /// One vector per source, `[rows, hidden_size]`, reduced by `pooling`.
    ///
    /// # Errors
    /// [`Pooling::None`], or another pooling than the one that the model was exported with; otherwise as
    /// [`Encoder::encode`].
    pub fn embed(&self, batch: &Batch, pooling: Pooling, cancel: &Cancellation) -> Result<Array2<f32>, Error> {
        let own = self.features()?.pooling;
        if pooling == Pooling::None {
            return Err(Error::input("pooling", "mean, first or last", "none"));
        }
        if own != Pooling::None && own != pooling {
            return Err(self.pooled_already(pooling, own));
        }
        if own == Pooling::None {
            batch.check_visible()?;
            let batch = &*self.pad(batch);
            Ok(pooled(&self.encode(batch, cancel)?, batch, pooling))
        } else {
            self.output(batch, cancel)?.into_dimensionality().map_err(wrong_rank)
        }
    }

    /// [`Encoder::embed`] with L2-normalized vectors.
    ///
    /// # Errors
    /// As [`Encoder::embed`].
    pub fn embed_normalized(
        &self,
        batch: &Batch,
        pooling: Pooling,
        cancel: &Cancellation,
    ) -> Result<Array2<f32>, Error> {
        let mut vectors = self.embed(batch, pooling, cancel)?;
        for mut vector in vectors.rows_mut() {
            let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
            vector.mapv_inplace(|x| x / length);
        }
        Ok(vectors)
    }

    /// See [`Folder::check`] and [`Limits::check_source`].
    pub(crate) fn check(&self, batch: &Batch) -> Result<(), Error> {
        self.folder.check(batch)?;
        self.limits.check_source(&self.folder.manifest, batch.length())
    }

    /// The graph's first output for a batch.
    pub(crate) fn output(&self, batch: &Batch, cancel: &Cancellation) -> Result<ArrayD<f32>, Error> {
        Ok(self.outputs(batch, cancel)?.swap_remove(0))
    }

    /// The graph's outputs for a batch, in pieces if the batch is beyond the limits.
    fn outputs(&self, batch: &Batch, cancel: &Cancellation) -> Result<Vec<ArrayD<f32>>, Error> {
        self.check(batch)?;
        cancel.check()?;
        let batch = &*self.pad(batch);
        let pieces = pieces_to_encode(batch, &self.folder.manifest, &self.limits);
        let runs: Vec<_> = batch.encoder_runs().collect();
        let of_run = |piece: Range<usize>| {
            let common = |run: &Range<usize>| run.start.max(piece.start)..run.end.min(piece.end);
            runs.iter().map(common).filter(|rows| !rows.is_empty()).collect::<Vec<_>>()
        };
        let pieces: Vec<Range<usize>> = pieces.into_iter().flat_map(of_run).collect();
        if pieces.len() == 1 {
            return self.outputs_of_piece(batch, cancel);
        }
        let mut outputs: Vec<ArrayD<f32>> = Vec::new();
        for rows in pieces {
            let piece = batch.piece(rows.clone());
            let found = self.outputs_of_piece(&piece, cancel)?;
            if outputs.is_empty() {
                let whole = |found: &ArrayD<f32>| {
                    let mut shape = found.shape().to_vec();
                    shape[0] = batch.rows();
                    // An output with a vector for each token has tokens on its second axis.
                    if shape.len() == 3 {
                        shape[1] = batch.length();
                    }
                    ArrayD::zeros(shape)
                };
                outputs = found.iter().map(whole).collect();
            }
            for (output, found) in outputs.iter_mut().zip(found) {
                let mut of_piece = output.slice_axis_mut(Axis(0), rows.clone().into());
                if found.ndim() == 3 {
                    of_piece.slice_axis_inplace(Axis(1), (..piece.length()).into());
                }
                of_piece.assign(&found);
            }
        }
        Ok(outputs)
    }

    fn outputs_of_piece(&self, batch: &Batch, cancel: &Cancellation) -> Result<Vec<ArrayD<f32>>, Error> {
        let fitting = self.folder.fit(batch);
        let outputs = self.outputs_of_rectangle(&fitting, cancel)?;
        if matches!(fitting, Cow::Borrowed(_)) {
            return Ok(outputs);
        }
        let requested = |output: ArrayD<f32>| {
            let mut requested = output.slice_axis(Axis(0), (..batch.rows()).into());
            if requested.ndim() == 3 {
                requested.slice_axis_inplace(Axis(1), (..batch.length()).into());
            }
            requested.to_owned()
        };
        Ok(outputs.into_iter().map(requested).collect())
    }

    fn outputs_of_rectangle(&self, batch: &Batch, cancel: &Cancellation) -> Result<Vec<ArrayD<f32>>, Error> {
        let features = self.image_features(batch, cancel)?;
        // Classifiers are left out, because they read padding tokens too.
        if self.on_cpu
            && !batch.hides_image_tokens(self.facts())
            && let Ok(Features { pooling, padding_rows, fixed_length: None, output_hidden_states: false, .. }) =
                self.features()
            && let Some(groups) = ragged_batch::groups(batch, Grouping::of(&self.folder.manifest))
        {
            let unit = match (pooling, padding_rows) {
                (Pooling::None, PaddingRows::Learned) => OutputUnit::TokenOrPadding,
                (Pooling::None, PaddingRows::Unspecified | PaddingRows::Zero) => OutputUnit::Token,
                _ => OutputUnit::Source,
            };
            let output = ragged_batch::run(&self.session, &[], batch, &features, &groups, unit, cancel)?;
            cancel.check()?;
            return Ok(vec![ArrayD::from_shape_vec(output.shape, output.values).map_err(wrong_rank)?]);
        }
        let outputs = self.session.run_on_batch(batch, &features, &[], "running the encoder", cancel)?;
        cancel.check()?;
        // Models to be observed have one more output, the ranges.
        let of_states = outputs.into_iter().take(1 + self.folder.hidden_states());
        let read = of_states.map(|output| {
            let shape: Vec<usize> = output.shape().iter().map(|&size| size as usize).collect();
            let values = float32_values(&output).map_err(Error::onnxruntime(READING_OUTPUT))?;
            if shape.first() != Some(&batch.rows()) {
                let message = format!("expected an output of {} rows, found shape {shape:?}", batch.rows());
                return Err(Error::OnnxRuntime { during: READING_OUTPUT.into(), message });
            }
            ArrayD::from_shape_vec(shape, values).map_err(wrong_rank)
        });
        read.collect()
    }

    /// The features of the images of each row; empty without images.
    fn image_features(&self, batch: &Batch, cancel: &Cancellation) -> Result<Vec<Vec<States>>, Error> {
        if batch.has_images() { self.features_of(batch.images(), cancel) } else { Ok(Vec::new()) }
    }

    fn features_of(&self, images: &[Vec<PixelValues>], cancel: &Cancellation) -> Result<Vec<Vec<States>>, Error> {
        let Some(vision) = &self.facts().vision else { return Ok(Vec::new()) };
        let open = || {
            let prepacked = self.prepacked.lock().unwrap_or_else(PoisonError::into_inner).clone();
            Opener::with_weights(&self.folder, &self.options, prepacked, None)?.open_vision()
        };
        self.vision.features(images, vision, None, self.on_cpu, open, cancel)
    }

    /// The activation ranges for a source: for each matrix, the largest absolute input value. Only for models exported
    /// with observed activations.
    pub(crate) fn observe(&self, batch: &Batch, cancel: &Cancellation) -> Result<BTreeMap<String, f32>, Error> {
        const DURING: &str = "observing the activations";
        self.check(batch)?;
        let outputs = self.session.run_on_batch(batch, &self.image_features(batch, cancel)?, &[], DURING, cancel)?;
        let last = outputs.last().expect("opening has verified that there are outputs");
        let (_, found) = last.try_extract_tensor::<f32>().map_err(Error::onnxruntime(DURING))?;
        let names = self.folder.manifest.observed.values().flatten().cloned();
        Ok(names.zip(found.iter().copied()).collect())
    }

    /// The error of using the model for another task.
    pub(crate) fn other_task(&self, found: &Task, expected: &str) -> Error {
        other_task(self.path(), found, expected)
    }

    fn pooled_already(&self, requested: Pooling, own: Pooling) -> Error {
        Error::Folder {
            path: self.path().join(MANIFEST),
            field: "task.pooling".into(),
            expected: format!("{requested} as requested (export with pooling {requested}, or none for any)"),
            found: own.to_string(),
        }
    }
}

fn wrong_rank(error: ndarray::ShapeError) -> Error {
    Error::OnnxRuntime { during: READING_OUTPUT.into(), message: error.to_string() }
}

/// Pools each row of `states` over the tokens that its mask shows; every row of a batch has at least one.
fn pooled(states: &Array3<f32>, batch: &Batch, pooling: Pooling) -> Array2<f32> {
    let mut vectors = Array2::zeros([states.shape()[0], states.shape()[2]]);
    let rows = states.outer_iter().zip(batch.mask().chunks(batch.length()));
    for ((states, mask), mut vector) in rows.zip(vectors.outer_iter_mut()) {
        vector.assign(&pooled_row(states, mask, pooling));
    }
    vectors
}

fn pooled_row(states: ArrayView2<'_, f32>, mask: &[i64], pooling: Pooling) -> Array1<f32> {
    let seen: Vec<usize> = (0..mask.len()).filter(|&at| mask[at] != 0).collect();
    let one = |at: Option<&usize>| states.row(at.copied().unwrap_or(0)).to_owned();
    match pooling {
        Pooling::First => one(seen.first()),
        Pooling::Last => one(seen.last()),
        Pooling::Mean | Pooling::None => states.select(Axis(0), &seen).sum_axis(Axis(0)) / seen.len() as f32,
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn only_visible_tokens_are_pooled() {
        let states = array![[9.0, 9.0], [1.0, 2.0], [f32::NAN, 0.0], [3.0, 6.0], [9.0, 9.0]];
        for (pooling, expected) in
            [(Pooling::Mean, [2.0, 4.0]), (Pooling::First, [1.0, 2.0]), (Pooling::Last, [3.0, 6.0])]
        {
            assert_eq!(pooled_row(states.view(), &[0, 1, 0, 1, 0], pooling).to_vec(), expected, "{pooling}");
        }
    }
}
