//! Classification: a classifier's logits for its labels, and the function that turns them into scores, by the rules of
//! transformers' pipelines.

use ndarray::{Array2, Array3, Axis};
use t5gemma_graphs::config::ProblemType;
use t5gemma_graphs::facts::ClassifierFacts;
use t5gemma_graphs::task::Task;

use crate::batch::Batch;
use crate::cancellation::Cancellation;
use crate::encoder::Encoder;
use crate::error::Error;
use crate::profiles::ProfileRange;

/// The function that turns logits into scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ScoreFunction {
    /// The identity.
    None,
    /// `1 / (1 + exp(−x))`, for each label independently.
    Sigmoid,
    /// `exp(x) / Σ exp(x)` over the labels.
    Softmax,
}

impl ScoreFunction {
    /// Every function.
    pub const ALL: [ScoreFunction; 3] = [ScoreFunction::None, ScoreFunction::Sigmoid, ScoreFunction::Softmax];

    /// The name in transformers.
    pub fn name(self) -> &'static str {
        match self {
            ScoreFunction::None => "none",
            ScoreFunction::Sigmoid => "sigmoid",
            ScoreFunction::Softmax => "softmax",
        }
    }

    /// The function for a sequence classifier: none for regression, sigmoid for independent labels or a single one,
    /// softmax otherwise.
    pub fn of(classifier: &ClassifierFacts) -> ScoreFunction {
        match (classifier.problem_type, classifier.labels.len()) {
            (Some(ProblemType::Regression), _) => ScoreFunction::None,
            (Some(ProblemType::MultiLabelClassification), _) | (_, 1) => ScoreFunction::Sigmoid,
            _ => ScoreFunction::Softmax,
        }
    }

    /// The scores of logits.
    pub fn scores(self, logits: &[f32]) -> Vec<f32> {
        match self {
            ScoreFunction::None => logits.to_vec(),
            ScoreFunction::Sigmoid => logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect(),
            ScoreFunction::Softmax => {
                let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let powers: Vec<f32> = logits.iter().map(|logit| (logit - greatest).exp()).collect();
                let sum: f32 = powers.iter().sum();
                powers.into_iter().map(|power| power / sum).collect()
            }
        }
    }
}

impl Encoder {
    /// The model's labels.
    ///
    /// # Errors
    /// The model is not a classifier.
    pub fn classifier(&self) -> Result<&ClassifierFacts, Error> {
        let task = &self.manifest().task;
        match (task, &self.facts().classifier) {
            (Task::TextClassification | Task::TokenClassification, Some(classifier)) => Ok(classifier),
            _ => Err(self.other_task(task, "text-classification or token-classification, to classify with this model")),
        }
    }

    /// The logits of each source's labels, `[rows, labels]`.
    ///
    /// A classifier with a decoder reads one padding token of a padded row (as in transformers), so rows that were
    /// padded only to match longer ones run without that padding: a row's result does not depend on its neighbours.
    ///
    /// # Errors
    /// The model does not classify sources; otherwise as [`Encoder::encode`].
    pub fn classify(&self, batch: &Batch, cancel: &Cancellation) -> Result<Array2<f32>, Error> {
        let classifier = self.classifier()?;
        if self.manifest().task != Task::TextClassification {
            return Err(self.other_task(&self.manifest().task, "text-classification, to classify whole sources"));
        }
        let run = |batch: &Batch| self.output(batch, cancel)?.into_dimensionality().map_err(unexpected);
        if !classifier.is_encoder_decoder {
            return run(batch);
        }
        self.check(batch)?;
        if let Some(profiles) = self.profiles()
            && let Some(row) = (0..batch.rows()).find(|&row| batch.source(row).len() < profiles.source.min)
        {
            let ProfileRange { min, .. } = profiles.source;
            let expected = format!(
                "at least {min} tokens (exported with the plan source={}; padding would change this classifier's logits)",
                profiles.source
            );
            let found = batch.source(row).len().to_string();
            return Err(Error::input(format!("input_ids[{row}]"), expected, found));
        }
        let mut logits = Array2::zeros([batch.rows(), classifier.labels.len()]);
        for rows in rows_by_length(batch) {
            let of = |part: fn(&Batch, usize) -> &[i64]| rows.iter().map(move |&row| part(batch, row));
            let (ids, mask): (Vec<_>, Vec<_>) = (of(Batch::source).collect(), of(Batch::row_mask).collect());
            let images = rows.iter().map(|&row| batch.images()[row].clone()).collect();
            let of_length = Batch::masked(&ids, &mask)?.with_images(images)?;
            for (&row, found) in rows.iter().zip(run(&of_length)?.outer_iter()) {
                logits.index_axis_mut(Axis(0), row).assign(&found);
            }
        }
        Ok(logits)
    }

    /// The logits of each token's labels, `[rows, length, labels]`; those of padding are meaningless.
    ///
    /// # Errors
    /// The model does not classify tokens; otherwise as [`Encoder::encode`].
    pub fn classify_tokens(&self, batch: &Batch, cancel: &Cancellation) -> Result<Array3<f32>, Error> {
        self.classifier()?;
        if self.manifest().task != Task::TokenClassification {
            return Err(self.other_task(&self.manifest().task, "token-classification, to classify tokens"));
        }
        self.output(batch, cancel)?.into_dimensionality().map_err(unexpected)
    }
}

/// Groups of rows that had the same length before padding.
fn rows_by_length(batch: &Batch) -> Vec<Vec<usize>> {
    let mut rows: Vec<usize> = (0..batch.rows()).collect();
    rows.sort_by_key(|&row| batch.source(row).len());
    rows.chunk_by(|&a, &b| batch.source(a).len() == batch.source(b).len()).map(<[usize]>::to_vec).collect()
}

fn unexpected(error: ndarray::ShapeError) -> Error {
    Error::OnnxRuntime { during: "reading the logits".into(), message: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_function_follows_from_the_problem() {
        let classifier = |problem_type, labels: usize| ClassifierFacts {
            is_encoder_decoder: false,
            labels: vec![String::new(); labels],
            problem_type,
        };
        for (problem, labels, expected) in [
            (None, 3, ScoreFunction::Softmax),
            (None, 1, ScoreFunction::Sigmoid),
            (Some(ProblemType::SingleLabelClassification), 2, ScoreFunction::Softmax),
            (Some(ProblemType::MultiLabelClassification), 5, ScoreFunction::Sigmoid),
            (Some(ProblemType::Regression), 1, ScoreFunction::None),
        ] {
            assert_eq!(ScoreFunction::of(&classifier(problem, labels)), expected, "{problem:?} {labels}");
        }
    }

    #[test]
    fn scores_of_large_logits_are_finite() {
        assert_eq!(ScoreFunction::Softmax.scores(&[1000.0, 1000.0]), [0.5, 0.5]);
        assert_eq!(ScoreFunction::Sigmoid.scores(&[0.0, -1000.0]), [0.5, 0.0]);
        assert_eq!(ScoreFunction::None.scores(&[7.0]), [7.0]);
    }

    #[test]
    fn rows_are_grouped_by_the_length_they_were_given_with() {
        let batch = Batch::padded(&[vec![5, 6], vec![7], vec![8, 9]], 0).expect("well-formed");
        assert_eq!(rows_by_length(&batch), [vec![1], vec![0, 2]]);
    }
}
