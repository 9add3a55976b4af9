//! Vectors and labels: what every door turns a request to a model's encoder into. One call of a model runs at a time.

use std::sync::Arc;

use ndarray::{Array2, Axis, s};
use t5gemma_protocol::{EncodeRequest, ImageFields, Texts, TokenRows, TokenizedRequest};
use t5gemma_runtime::{Batch, Cancellation, Pooling, ScoreFunction, Task};

use crate::admission::Size;
use crate::call::Call;
use crate::failure::{Failure, Reason};
use crate::generating::check_images;
use crate::served::{EncoderWork, Served};
use crate::truncation::{self, Side};
use crate::uploads::{Uploads, WithUploads};

/// Sources of a request.
#[derive(Clone, Debug)]
pub enum Sources {
    /// Texts.
    Texts(Vec<String>),
    /// Token ids, image tokens among them.
    Tokens(Vec<Vec<i64>>),
}

impl Sources {
    fn len(&self) -> usize {
        match self {
            Sources::Texts(texts) => texts.len(),
            Sources::Tokens(rows) => rows.len(),
        }
    }
}

/// Sources with their images, if they have any.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// The sources.
    pub sources: Sources,
    /// Their images.
    pub images: ImageFields,
    /// What the images are, where they have no URI.
    pub uploads: Uploads,
}

impl From<Sources> for Inputs {
    fn from(sources: Sources) -> Inputs {
        Inputs { sources, images: ImageFields::default(), uploads: Uploads::default() }
    }
}

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// A vector for each source.
    Vectors {
        /// Whether it is divided by its Euclidean norm.
        normalize: bool,
    },
    /// A vector for each token.
    TokenVectors,
    /// The scores of the labels of each source or of each of its tokens.
    Labels {
        /// Whether scores are logits.
        raw: bool,
    },
}

/// A computed row.
#[derive(Clone, Debug)]
pub enum Row {
    /// Numbers of the source.
    Source(Vec<f32>),
    /// Numbers of each token.
    Tokens(Vec<(i64, Vec<f32>)>),
}

/// The rows of a request.
#[derive(Clone, Debug)]
pub struct Rows {
    /// One for each source.
    pub rows: Vec<Row>,
    /// The number of source tokens.
    pub source_tokens: usize,
}

impl Rows {
    /// The numbers of sources.
    pub fn of_sources(self) -> Vec<Vec<f32>> {
        let numbers = |row| match row {
            Row::Source(numbers) => numbers,
            Row::Tokens(tokens) => tokens.into_iter().flat_map(|(_, numbers)| numbers).collect(),
        };
        self.rows.into_iter().map(numbers).collect()
    }
}

impl Call {
    /// Runs a model's encoder. `truncate` shortens texts to what the model takes; otherwise longer ones are an error.
    ///
    /// # Errors
    /// A request that is invalid, too large, or too much now.
    pub async fn encode(
        &self,
        served: Arc<Served>,
        inputs: Inputs,
        truncate: Option<Side>,
        wanted: Wanted,
    ) -> Result<Rows, Failure> {
        let limit = self.app.config.limits.max_request_sources;
        match inputs.sources.len() {
            0 => return Err(Failure::new(Reason::Empty, "expected at least one text, found none")),
            count if count > limit => {
                let message = format!("the request has {count} texts, but the server takes at most {limit}");
                return Err(Failure::new(Reason::TooLarge, message));
            }
            _ => {}
        }
        inputs.images.check()?;
        check_images(inputs.images.count(), &self.app)?;
        let mut permit = self.app.admission.enter(self.tenant.as_ref())?;
        // Opening an encoder reads files.
        let of_task = served.clone();
        blocking(move || of_task.encoder().map(drop).map_err(Failure::from)).await?;
        let of_task = served.clone();
        let request = blocking(move || request(&of_task, inputs, truncate)).await?;
        let source_tokens = request.sources.iter().map(Vec::len).sum();
        let images = request.images.iter().map(Vec::len).sum();
        check_images(images, &self.app)?;
        permit.grow(Size { rows: request.sources.len(), tokens: source_tokens, images })?;
        let deadline = tokio::time::Instant::from_std(self.deadline);
        let turn = tokio::time::timeout_at(deadline, served.encoder()?.turn.acquire()).await;
        let _turn = match turn {
            Ok(turn) => turn.map_err(|_| Failure::from(t5gemma_runtime::Error::Closed))?,
            Err(_) => return Err(t5gemma_runtime::Error::Deadline.into()),
        };
        let cancel = Cancellation::until(self.deadline);
        let _guard = CancelOnDrop(cancel.clone());
        let of_task = served.clone();
        let rows = blocking(move || {
            let rows = compute(of_task.encoder()?, request, wanted, &cancel);
            drop(permit);
            rows
        });
        let rows = rows.await?;
        if let Some(metrics) = self.app.metrics.model(&served.name) {
            metrics.source_tokens.fetch_add(source_tokens as u64, std::sync::atomic::Ordering::Relaxed);
        }
        Ok(Rows { rows, source_tokens })
    }
}

/// Ends a call when its client leaves.
struct CancelOnDrop(Cancellation);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| Failure::new(Reason::Internal, "the request could not be computed"))?
}

/// The sources as token ids, with their images.
fn request(served: &Served, inputs: Inputs, truncate: Option<Side>) -> Result<TokenizedRequest, Failure> {
    let Inputs { sources, images, uploads } = inputs;
    if !images.is_given() {
        let sources = tokens(served, sources, truncate)?;
        let mask = sources.iter().map(|source| vec![1; source.len()]).collect();
        return Ok(TokenizedRequest::new(0.into(), sources, mask));
    }
    if truncate.is_some() {
        return Err(Failure::field("truncate", "no images beside it", "images"));
    }
    let (text, input_ids) = match sources {
        Sources::Texts(texts) => (Some(Texts::Several(texts)), None),
        Sources::Tokens(rows) => (None, Some(TokenRows::Several(rows))),
    };
    let request = EncodeRequest { text, input_ids, images, ..EncodeRequest::default() };
    Ok(request.tokenize(0.into(), &WithUploads(served.tokenize(), &uploads))?)
}

/// The token ids of sources without images.
pub fn tokens(served: &Served, sources: Sources, truncate: Option<Side>) -> Result<Vec<Vec<i64>>, Failure> {
    let model = served.tokenize();
    let longest = served.longest_source();
    match (sources, truncate) {
        (Sources::Texts(texts), None) => {
            let sources = t5gemma_protocol::sources(&texts, model)?;
            match sources.iter().find(|source| source.len() > longest) {
                Some(source) => {
                    let message =
                        format!("the text has {} tokens, but the model takes at most {longest}", source.len());
                    Err(Failure::new(Reason::TooLarge, message))
                }
                None => Ok(sources),
            }
        }
        (Sources::Texts(texts), Some(side)) => {
            texts.iter().map(|text| truncation::keep(text, longest, side, model)).collect()
        }
        (Sources::Tokens(mut rows), truncate) => {
            if truncate.is_some() {
                rows.iter_mut().for_each(|row| row.truncate(longest));
            }
            Ok(rows)
        }
    }
}

fn compute(
    work: &EncoderWork,
    request: TokenizedRequest,
    wanted: Wanted,
    cancel: &Cancellation,
) -> Result<Vec<Row>, Failure> {
    let encoder = &work.encoder;
    let batch = t5gemma_protocol::batch(&[request], encoder.pad_token_id())?;
    match wanted {
        Wanted::Vectors { normalize } => {
            let pooling = match encoder.features()?.pooling {
                Pooling::None => Pooling::Mean,
                own => own,
            };
            let vectors: Array2<f32> = match normalize {
                true => encoder.embed_normalized(&batch, pooling, cancel)?,
                false => encoder.embed(&batch, pooling, cancel)?,
            };
            Ok(vectors.outer_iter().map(|row| Row::Source(row.to_vec())).collect())
        }
        Wanted::TokenVectors => {
            if encoder.features()?.pooling != Pooling::None {
                let message = "the model was exported with pooling: it has one vector for each source";
                return Err(Failure::new(Reason::Unsupported, message));
            }
            let batch = &*encoder.pad(&batch);
            let states = encoder.encode(batch, cancel)?;
            let row = |row: usize| of_tokens(batch, row, |at| states.slice(s![row, at, ..]).to_vec());
            Ok((0..batch.rows()).map(row).collect())
        }
        Wanted::Labels { raw } => {
            let classifier = encoder.classifier()?;
            let scores = |function: ScoreFunction, logits: Vec<f32>| match raw {
                true => logits,
                false => function.scores(&logits),
            };
            if encoder.manifest().task == Task::TextClassification {
                let function = ScoreFunction::of(classifier);
                let logits = encoder.classify(&batch, cancel)?;
                return Ok(logits.outer_iter().map(|row| Row::Source(scores(function, row.to_vec()))).collect());
            }
            let logits = encoder.classify_tokens(&batch, cancel)?;
            let row = |row: usize| {
                let of_row = logits.index_axis(Axis(0), row);
                of_tokens(&batch, row, |at| scores(ScoreFunction::Softmax, of_row.row(at).to_vec()))
            };
            Ok((0..batch.rows()).map(row).collect())
        }
    }
}

/// The numbers of a row's tokens that are not padding.
fn of_tokens(batch: &Batch, row: usize, numbers: impl Fn(usize) -> Vec<f32>) -> Row {
    let tokens = batch.source(row).iter().zip(batch.row_mask(row)).enumerate();
    let seen = tokens.filter(|(_, (_, mask))| **mask != 0);
    Row::Tokens(seen.map(|(at, (&token, _))| (token, numbers(at))).collect())
}

/// The cosine of the angle between two vectors of length 1.
pub fn cosine(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
