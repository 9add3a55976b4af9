//! Sessions: the graphs of a model folder, opened by ONNX Runtime over one copy of the weights, each verified to have
//! the inputs and outputs that the configuration implies. `Model` and `Encoder` decide which tensors they run on.
//!
//! # Design
//! The weights are mapped once, or copied to a device once, and given to every session as initializers, with ONNX
//! Runtime's prepacking off: otherwise each session would read or pack a copy of its own. Tensors pass between graphs
//! by position, because opening has verified that ports are in the order of
//! [`Interface`](t5gemma_graphs::interface::Interface).

mod open;
mod options;
mod ports;

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ort::session::{Session, SessionInputValue};
use ort::value::DynValue;
use t5gemma_graphs::interface::Port;
use t5gemma_kernels::{Kernels, LogitsRequest};

use crate::batch::Batch;
use crate::cancellation::Cancellation;
use crate::encoder_cache::States;
use crate::error::Error;
use crate::fork::{InCall, Origin};
use crate::positions;
pub(crate) use crate::tensors::{float_tensor, float32_tensor, float32_values, int64_tensor};
pub(crate) use open::Opener;
pub use options::{DEFAULT_ENCODER_CACHE_BYTES, OpenOptions};

/// An opened graph, which runs one call at a time.
pub(crate) struct GraphSession {
    session: Arc<Mutex<Session>>,
    pub kernels: Kernels,
    /// The scale of the float positions that the graph takes with sources, if it takes any.
    source_scale: Option<f32>,
    /// The input for the features of images, if the graph reads sources with images.
    image_features: Option<ImageInput>,
    origin: Origin,
}

impl Drop for GraphSession {
    fn drop(&mut self) {
        // Dropping a session waits for its threads, which a forked process does not have.
        if !self.origin.is_this_process() {
            std::mem::forget(self.session.clone());
        }
    }
}

/// The input for the features of images.
pub(crate) struct ImageInput {
    pub port: Port,
    /// The token in whose places features are put, if the graph runs with at least one image: engines of TensorRT take
    /// no empty tensor. Without images, they get one of zeros, which sources without the token do not read.
    pub placeholder_token: Option<i64>,
}

/// The session of a graph during a call.
pub(crate) struct Locked<'s> {
    // Unlocked before the call is over.
    session: MutexGuard<'s, Session>,
    _in_call: InCall,
}

impl Deref for Locked<'_> {
    type Target = Session;

    fn deref(&self) -> &Session {
        &self.session
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Session {
        &mut self.session
    }
}

impl GraphSession {
    fn new(
        session: Session,
        kernels: Kernels,
        source_scale: Option<f32>,
        image_features: Option<ImageInput>,
    ) -> GraphSession {
        let session = Arc::new(Mutex::new(session));
        GraphSession { session, kernels, source_scale, image_features, origin: Origin::now() }
    }

    /// The session, for a run whose logits come in dense rows.
    ///
    /// # Errors
    /// [`Error::ForkedInCall`].
    pub fn lock(&self, request: LogitsRequest) -> Result<Locked<'_>, Error> {
        self.lock_sparse(request.dense())
    }

    /// The session, for a run whose logits may come in sparse rows if the request allows it.
    ///
    /// # Errors
    /// As [`GraphSession::lock`].
    pub fn lock_sparse(&self, request: LogitsRequest) -> Result<Locked<'_>, Error> {
        let in_call = self.origin.enter()?;
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        self.kernels.request_logits(request);
        Ok(Locked { session, _in_call: in_call })
    }

    /// Runs the graph and returns its outputs in order, logits in dense rows. Errors name `during`.
    pub fn run(
        &self,
        request: LogitsRequest,
        inputs: &[SessionInputValue],
        during: &'static str,
        cancel: &Cancellation,
    ) -> Result<Vec<DynValue>, Error> {
        run(self.lock(request)?, inputs, during, cancel)
    }

    /// Runs a graph that takes sources with their mask, the features of the images of each row, and `others` behind them.
    pub fn run_on_batch(
        &self,
        batch: &Batch,
        features: &[Vec<States>],
        others: &[Arc<DynValue>],
        during: &'static str,
        cancel: &Cancellation,
    ) -> Result<Vec<DynValue>, Error> {
        let sources = [batch.ids().to_vec(), batch.mask().to_vec()];
        let features = features.iter().flatten().cloned().collect();
        self.run_on_sources(batch.rows(), sources, features, others, during, cancel)
    }

    /// [`GraphSession::run_on_batch`] for ids and a mask, `[rows, length]` each, with the features of all images.
    pub fn run_on_sources(
        &self,
        rows: usize,
        [ids, mask]: [Vec<i64>; 2],
        features: Vec<States>,
        others: &[Arc<DynValue>],
        during: &'static str,
        cancel: &Cancellation,
    ) -> Result<Vec<DynValue>, Error> {
        let positions = self.source_positions(rows, &mask)?;
        let images = self.image_features.as_ref().map(|input| features_tensor(input, &features, &ids)).transpose()?;
        let (ids, mask) = (int64_tensor(rows, ids)?, int64_tensor(rows, mask)?);
        let inputs = [&ids, &mask].into_iter().chain(&positions).chain(&images);
        let inputs = inputs.chain(others.iter().map(|other| &**other));
        let inputs: Vec<SessionInputValue> = inputs.map(SessionInputValue::from).collect();
        self.run(LogitsRequest::All, &inputs, during, cancel)
    }

    /// The float positions of sources with this mask, `[rows, length]`; `None` for a graph that takes none.
    pub fn source_positions(&self, rows: usize, mask: &[i64]) -> Result<Option<DynValue>, Error> {
        let positions = self.source_scale.map(|scale| positions::of_sources(mask, mask.len() / rows, scale));
        positions.map(|positions| float32_tensor(rows, positions)).transpose()
    }
}

/// The features of images, of which there may be none, for sources with these ids.
fn features_tensor(input: &ImageInput, features: &[States], ids: &[i64]) -> Result<DynValue, Error> {
    let ImageInput { port, placeholder_token } = input;
    let [tokens, width] = [1, 2].map(|axis| port.shape[axis].as_fixed().unwrap_or(0));
    let mut values: Vec<f32> = features.iter().flat_map(|features| features.iter().copied()).collect();
    let mut images = features.len();
    if let (0, Some(token)) = (images, placeholder_token) {
        if ids.contains(token) {
            return Err(Error::Unsupported {
                what: format!("input_ids: the image token {token} without an image in an engine of TensorRT"),
                remedy: "leave the token out, pass an image, or use another provider".into(),
            });
        }
        (images, values) = (1, vec![0.0; tokens * width]);
    }
    float_tensor(port.dtype, [images, tokens, width], values).map_err(Error::onnxruntime("preparing a run"))
}

/// Runs a locked session and returns its outputs in order.
pub(crate) fn run(
    mut session: Locked<'_>,
    inputs: &[SessionInputValue],
    during: &'static str,
    cancel: &Cancellation,
) -> Result<Vec<DynValue>, Error> {
    let options = cancel.run_options()?;
    let outputs = session.run_with_options(inputs, options).map_err(cancel.failed(during))?;
    Ok(outputs.into_iter().map(|(_, value)| value).collect())
}
