//! `VisionTower`: the graph from pixel values to image features, opened for the first image. Calls with text alone never
//! read its weights.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use ndarray::Array3;
use ort::session::SessionInputValue;
use t5gemma_graphs::facts::{Facts, VisionFacts};
use t5gemma_graphs::interface::DType;
use t5gemma_kernels::LogitsRequest;

use crate::cancellation::Cancellation;
use crate::encoder_cache::{EncoderCache, States};
use crate::error::Error;
use crate::images::PixelValues;
use crate::session::{GraphSession, float_tensor, float32_values};

const DURING: &str = "running the vision tower";
/// Images of a run on a device. On a CPU, one keeps all threads busy and takes the least memory.
const ON_DEVICE: usize = 8;

/// The vision tower of a model that has one.
#[derive(Default)]
pub(crate) struct VisionTower {
    session: OnceLock<GraphSession>,
    opening: Mutex<()>,
}

impl VisionTower {
    /// The features of the images of each row, which have been checked; `open` opens the graph.
    pub fn features(
        &self,
        rows: &[Vec<PixelValues>],
        vision: &VisionFacts,
        cache: Option<&EncoderCache>,
        on_cpu: bool,
        open: impl FnOnce() -> Result<GraphSession, Error>,
        cancel: &Cancellation,
    ) -> Result<Vec<Vec<States>>, Error> {
        // By digest: a picture may stand in several rows.
        let mut known: HashMap<[u8; 32], States> = HashMap::new();
        let mut missing: Vec<&PixelValues> = Vec::new();
        for image in rows.iter().flatten() {
            if known.contains_key(&image.digest()) || missing.iter().any(|other| other.digest() == image.digest()) {
                continue;
            }
            match cache.and_then(|cache| cache.features(image)) {
                Some(features) => drop(known.insert(image.digest(), features)),
                None => missing.push(image),
            }
        }
        if !missing.is_empty() {
            let session = self.session(open)?;
            for images in missing.chunks(if on_cpu { 1 } else { ON_DEVICE }) {
                for (image, features) in images.iter().zip(run(session, images, vision, cancel)?) {
                    if let Some(cache) = cache {
                        cache.put_features(image, &features);
                    }
                    known.insert(image.digest(), features);
                }
            }
        }
        let of_row = |images: &Vec<PixelValues>| images.iter().map(|image| known[&image.digest()].clone()).collect();
        Ok(rows.iter().map(of_row).collect())
    }

    fn session(&self, open: impl FnOnce() -> Result<GraphSession, Error>) -> Result<&GraphSession, Error> {
        if let Some(session) = self.session.get() {
            return Ok(session);
        }
        let _opening = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(session) = self.session.get() {
            return Ok(session);
        }
        let session = open()?;
        Ok(self.session.get_or_init(|| session))
    }
}

/// Features of images as an array, `[images, tokens_per_image, hidden_size]`.
pub(crate) fn stacked(features: &[States], facts: &Facts) -> Result<Array3<f32>, Error> {
    let tokens = facts.vision.as_ref().map_or(0, |vision| vision.tokens_per_image);
    let shape = [features.len(), tokens, facts.encoder.hidden_size];
    let numbers = features.iter().flat_map(|features| features.iter().copied()).collect();
    Array3::from_shape_vec(shape, numbers)
        .map_err(|error| Error::OnnxRuntime { during: DURING.into(), message: error.to_string() })
}

/// The features of each image.
fn run(
    session: &GraphSession,
    images: &[&PixelValues],
    vision: &VisionFacts,
    cancel: &Cancellation,
) -> Result<Vec<States>, Error> {
    cancel.check()?;
    let side = vision.image_size;
    let values = images.iter().flat_map(|image| image.values().iter().copied()).collect();
    let pixels = float_tensor(DType::Float32, [images.len(), 3, side, side], values);
    let pixels = pixels.map_err(Error::onnxruntime("preparing a run"))?;
    let outputs = session.run(LogitsRequest::All, &[SessionInputValue::from(&pixels)], DURING, cancel)?;
    let output = outputs.first().expect("opening has verified that there is one output");
    let features = float32_values(output).map_err(Error::onnxruntime(DURING))?;
    if !features.len().is_multiple_of(images.len()) || features.is_empty() {
        let message = format!("expected features of {} images, found {} numbers", images.len(), features.len());
        return Err(Error::OnnxRuntime { during: DURING.into(), message });
    }
    Ok(features.chunks(features.len() / images.len()).map(States::from).collect())
}
