//! The optimization profiles of a model's serving plan: TensorRT's engines accept no other sizes. Batches run in pieces
//! and are padded to the minimum sizes; longer or wider requests are rejected before anything runs, with every
//! provider, so that a CPU rejects the same requests as an engine.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use t5gemma_graphs::interface::{DECODER, DECODER_WITH_PAST, ENCODER, MODEL, PROFILES_FILE};
use t5gemma_graphs::manifest::Manifest;

use crate::batch::Batch;
use crate::error::Error;

/// The range of a size, and the one that engines are optimized for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProfileRange {
    pub min: usize,
    pub opt: usize,
    pub max: usize,
}

/// The sizes of a serving plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Profiles {
    /// Sources in a batch.
    pub batch: ProfileRange,
    /// Tokens of a source.
    pub source: ProfileRange,
    /// For models that generate.
    pub decoder: Option<DecoderProfiles>,
}

/// The sizes of the decoder's graphs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DecoderProfiles {
    /// Target rows for each source.
    pub beams: ProfileRange,
    /// Tokens of the first step.
    pub prompt: ProfileRange,
    /// Greatest number of tokens of a further step.
    pub step: usize,
    /// Greatest number of tokens of a target; `None` with a cache of fixed capacity, which is the only limit then.
    pub target: Option<usize>,
}

/// Minimum, optimum and maximum shapes by graph and input.
type Shapes = BTreeMap<String, BTreeMap<String, [Vec<usize>; 3]>>;

impl Profiles {
    /// Reads the profiles of a folder, if it has some.
    pub fn read(folder: &Path, manifest: &Manifest) -> Result<Option<Profiles>, Error> {
        if !manifest.files.contains_key(PROFILES_FILE) {
            return Ok(None);
        }
        let path = folder.join(PROFILES_FILE);
        let text = fs::read(&path).map_err(Error::reading(&path))?;
        let found = Profiles::parse(&text, manifest.task.is_generation());
        found.map(Some).map_err(|problem| Error::File { path, problem })
    }

    fn parse(text: &[u8], generates: bool) -> Result<Profiles, String> {
        let shapes: Shapes = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let given = |graph: &str, input: &str| shapes.get(graph).and_then(|inputs| inputs.get(input));
        let sizes = |graph: &str, input: &str, axis: usize| {
            let size = |of: usize| given(graph, input).and_then(|shapes| shapes[of].get(axis)).copied();
            match (size(0), size(1), size(2)) {
                (Some(min), Some(opt), Some(max)) if 1 <= min && min <= opt && opt <= max => {
                    Ok(ProfileRange { min, opt, max })
                }
                _ => {
                    Err(format!("{graph}: {input}: axis {axis}: expected ascending sizes MIN, OPT, MAX of at least 1"))
                }
            }
        };
        let first = if generates { ENCODER } else { MODEL };
        let (batch, source) = (sizes(first, "input_ids", 0)?, sizes(first, "input_ids", 1)?);
        let decoder = if generates {
            let rows = sizes(DECODER_WITH_PAST, "input_ids", 0)?;
            let step = sizes(DECODER_WITH_PAST, "input_ids", 1)?;
            let per_source = |rows: usize, sources: usize| (rows / sources).max(1);
            let beams =
                ProfileRange { min: 1, opt: per_source(rows.opt, batch.opt), max: per_source(rows.max, batch.max) };
            // With a cache of fixed capacity, one graph runs all steps, the first too, and the length of the past does
            // not vary.
            let is_static = given(DECODER, "input_ids").is_none();
            let past = || sizes(DECODER_WITH_PAST, "past_key_values.0.decoder.key", 2);
            Some(DecoderProfiles {
                beams,
                prompt: if is_static { step } else { sizes(DECODER, "input_ids", 1)? },
                step: step.max,
                target: if is_static { None } else { Some(past()?.max + 1) },
            })
        } else {
            None
        };
        Ok(Profiles { batch, source, decoder })
    }

    /// Refuses sources that are longer than planned.
    pub fn check_source(&self, tokens: usize) -> Result<(), Error> {
        let max = self.source.max;
        if tokens <= max {
            return Ok(());
        }
        let expected = format!("at most {max} tokens a row (exported with the plan source={})", self.source);
        Err(Error::input("input_ids", expected, format!("{tokens} tokens")))
    }

    /// Refuses prompts of another length than planned, and more targets for each source.
    pub fn check_targets(&self, prompt: usize, num_beams: usize, num_return_sequences: usize) -> Result<(), Error> {
        let Some(DecoderProfiles { beams, prompt: planned, .. }) = &self.decoder else { return Ok(()) };
        if !(planned.min..=planned.max).contains(&prompt) {
            let ProfileRange { min, max, .. } = planned;
            let range = if min == max { max.to_string() } else { format!("{min} to {max}") };
            let expected = format!("{range} tokens with the start token (exported with the plan prompt={planned})");
            return Err(Error::input("decoder_input_ids", expected, prompt.to_string()));
        }
        for (option, found) in [("num_beams", num_beams), ("num_return_sequences", num_return_sequences)] {
            if found > beams.max {
                let expected = format!("at most {} (exported with the plan beams={beams})", beams.max);
                return Err(Error::input(option, expected, found.to_string()));
            }
        }
        Ok(())
    }
}

/// A batch within the greatest planned sizes, padded with rows and tokens up to the least.
pub(crate) fn fit<'b>(profiles: Option<&Profiles>, batch: &'b Batch, pad: i64) -> Cow<'b, Batch> {
    match profiles {
        Some(Profiles { batch: rows, source, .. }) if batch.rows() < rows.min || batch.length() < source.min => {
            Cow::Owned(batch.widened(rows.min, source.min, pad))
        }
        _ => Cow::Borrowed(batch),
    }
}

impl std::fmt::Display for ProfileRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ProfileRange { min, max, .. } = self;
        if min == max { write!(f, "{max}") } else { write!(f, "{min}..{max}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROWING: &str = r#"{"encoder_model.onnx": {"input_ids": [[2, 8], [4, 32], [8, 64]]},
        "decoder_model.onnx": {"input_ids": [[2, 1], [16, 2], [32, 4]]},
        "decoder_with_past_model.onnx": {"input_ids": [[1, 1], [16, 1], [32, 1]],
            "past_key_values.0.decoder.key": [[1, 2, 1, 8], [16, 2, 16, 8], [32, 2, 31, 8]]}}"#;

    fn sizes(min: usize, opt: usize, max: usize) -> ProfileRange {
        ProfileRange { min, opt, max }
    }

    fn growing() -> Profiles {
        Profiles::parse(GROWING.as_bytes(), true).expect("profiles")
    }

    #[test]
    fn profiles_follow_from_the_shapes() {
        let decoder = DecoderProfiles { beams: sizes(1, 4, 4), prompt: sizes(1, 2, 4), step: 1, target: Some(32) };
        let (batch, source) = (sizes(2, 4, 8), sizes(8, 32, 64));
        assert_eq!(growing(), Profiles { batch, source, decoder: Some(decoder) });
        let fixed = r#"{"encoder_model.onnx": {"input_ids": [[1, 1], [4, 32], [8, 64]]},
            "decoder_model.onnx": {"encoder_hidden_states": [[1, 1, 9], [4, 32, 9], [8, 64, 9]]},
            "decoder_with_past_model.onnx": {"input_ids": [[1, 1], [4, 1], [8, 3]]}}"#;
        let found = Profiles::parse(fixed.as_bytes(), true).expect("profiles").decoder;
        assert_eq!(
            found,
            Some(DecoderProfiles { beams: sizes(1, 1, 1), prompt: sizes(1, 1, 3), step: 3, target: None })
        );
        let one = r#"{"model.onnx": {"input_ids": [[4, 64], [4, 64], [4, 64]]}}"#;
        let found = Profiles::parse(one.as_bytes(), false).expect("profiles");
        assert_eq!(found, Profiles { batch: sizes(4, 4, 4), source: sizes(64, 64, 64), decoder: None });
        for (text, expected) in [
            ("{", "EOF"),
            ("{}", "encoder_model.onnx: input_ids: axis 0: expected ascending sizes MIN, OPT, MAX of at least 1"),
            (r#"{"encoder_model.onnx": {"input_ids": [[1, 1], [0, 32], [8, 64]]}}"#, "axis 0"),
            (r#"{"encoder_model.onnx": {"input_ids": [[1, 1], [4], [8, 64]]}}"#, "axis 1"),
            (r#"{"encoder_model.onnx": {"input_ids": [[1, 1], [4, 3], [8, 2]]}}"#, "axis 1"),
        ] {
            let error = Profiles::parse(text.as_bytes(), true).expect_err(text);
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn requests_beyond_the_plan_are_refused_with_the_numbers() {
        let plan = growing();
        let outcome = |result: Result<(), Error>| result.err().map_or("accepted".into(), |error| error.to_string());
        for (tokens, expected) in [
            (1, "accepted"),
            (64, "accepted"),
            (65, "input_ids: expected at most 64 tokens a row (exported with the plan source=8..64), found 65 tokens"),
        ] {
            assert_eq!(outcome(plan.check_source(tokens)), expected, "{tokens}");
        }
        for (prompt, beams, returned, expected) in [
            (1, 1, 1, "accepted"),
            (4, 4, 4, "accepted"),
            (1, 5, 1, "num_beams: expected at most 4 (exported with the plan beams=1..4), found 5"),
            (1, 1, 5, "num_return_sequences: expected at most 4 (exported with the plan beams=1..4), found 5"),
            (
                5,
                1,
                1,
                "decoder_input_ids: expected 1 to 4 tokens with the start token (exported with the plan prompt=1..4), found 5",
            ),
        ] {
            assert_eq!(outcome(plan.check_targets(prompt, beams, returned)), expected, "{prompt} {beams} {returned}");
        }
    }

    #[test]
    fn batches_are_padded_to_the_least_sizes() {
        for (rows, length, expected) in
            [(1, 3, (2, 8)), (2, 8, (2, 8)), (1, 9, (2, 9)), (8, 64, (8, 64)), (3, 2, (3, 8))]
        {
            let batch = Batch::padded(&vec![vec![5; length]; rows], 0).expect("well-formed");
            let found = fit(Some(&growing()), &batch, 0);
            assert_eq!((found.rows(), found.length()), expected, "{rows} rows of {length}");
            assert_eq!(matches!(found, Cow::Borrowed(_)), (rows, length) == expected, "{rows} rows of {length}");
            assert!(matches!(fit(None, &batch, 0), Cow::Borrowed(_)));
        }
    }
}
