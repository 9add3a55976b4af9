//! The sizes of a model's serving plan, to which requests are held: engines take no others. Batches run in pieces
//! (`needs.rs`) and are filled up, and what is longer or wider is refused before anything runs, with every provider: what a GPU
//! would not take shows on a processor too.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use t5gemma_graphs::interface::{DECODER, DECODER_WITH_PAST, ENCODER, MODEL, PROFILES_FILE};
use t5gemma_graphs::manifest::Manifest;

use crate::batch::Batch;
use crate::error::Error;

/// The least, usual and greatest of a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub least: usize,
    pub usual: usize,
    pub most: usize,
}

/// What a model was planned for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Profiles {
    /// Sources in a batch.
    pub batch: Sizes,
    /// Tokens of a source.
    pub source: Sizes,
    /// Of models that generate.
    pub decoder: Option<Decoder>,
}

/// What the decoder's graphs were planned for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Decoder {
    /// Target rows of a source.
    pub beams: Sizes,
    /// Tokens given to the first step.
    pub prompt: Sizes,
    /// Tokens given to another step, at most.
    pub step: usize,
    /// Tokens of a target at most; in a cache of fixed capacity nothing but that bounds them.
    pub target: Option<usize>,
}

/// Least, usual and greatest shapes by graph and input.
type Shapes = BTreeMap<String, BTreeMap<String, [Vec<usize>; 3]>>;

impl Profiles {
    /// Those of a folder, if it has some.
    pub fn read(folder: &Path, manifest: &Manifest) -> Result<Option<Profiles>, Error> {
        if !manifest.files.contains_key(PROFILES_FILE) {
            return Ok(None);
        }
        let path = folder.join(PROFILES_FILE);
        let text = fs::read(&path).map_err(Error::file(&path))?;
        let found = Profiles::parse(&text, manifest.task.is_generation());
        found.map(Some).map_err(|problem| Error::File { path, problem })
    }

    fn parse(text: &[u8], generates: bool) -> Result<Profiles, String> {
        let shapes: Shapes = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let given = |graph: &str, input: &str| shapes.get(graph).and_then(|inputs| inputs.get(input));
        let sizes = |graph: &str, input: &str, axis: usize| {
            let size = |of: usize| given(graph, input).and_then(|shapes| shapes[of].get(axis)).copied();
            match (size(0), size(1), size(2)) {
                (Some(least), Some(usual), Some(most)) if 1 <= least && least <= usual && usual <= most => {
                    Ok(Sizes { least, usual, most })
                }
                _ => {
                    Err(format!("{graph}: {input}: expected three ascending sizes from 1 of axis {axis}, found others"))
                }
            }
        };
        let first = if generates { ENCODER } else { MODEL };
        let (batch, source) = (sizes(first, "input_ids", 0)?, sizes(first, "input_ids", 1)?);
        let decoder = match generates {
            false => None,
            true => {
                let (rows, step) =
                    (sizes(DECODER_WITH_PAST, "input_ids", 0)?, sizes(DECODER_WITH_PAST, "input_ids", 1)?);
                let per_source = |rows: usize, sources: usize| (rows / sources).max(1);
                let beams = Sizes {
                    least: 1,
                    usual: per_source(rows.usual, batch.usual),
                    most: per_source(rows.most, batch.most),
                };
                // With a cache of fixed capacity every step is of one graph, the first too, and no past varies in length.
                let is_fixed = given(DECODER, "input_ids").is_none();
                let past = || sizes(DECODER_WITH_PAST, "past_key_values.0.decoder.key", 2);
                Some(Decoder {
                    beams,
                    prompt: if is_fixed { step } else { sizes(DECODER, "input_ids", 1)? },
                    step: step.most,
                    target: if is_fixed { None } else { Some(past()?.most + 1) },
                })
            }
        };
        Ok(Profiles { batch, source, decoder })
    }

    /// Refuses sources that are longer than planned.
    pub fn check_source(&self, tokens: usize) -> Result<(), Error> {
        let most = self.source.most;
        match tokens <= most {
            true => Ok(()),
            false => Err(Error::input(
                "input_ids",
                format!("at most {most} tokens a row (exported with --plan source={})", self.source),
                format!("{tokens} tokens"),
            )),
        }
    }

    /// Refuses prompts of another length than planned, and more targets for a source.
    pub fn check_targets(&self, prompt: usize, num_beams: usize, num_return_sequences: usize) -> Result<(), Error> {
        let Some(Decoder { beams, prompt: planned, .. }) = &self.decoder else { return Ok(()) };
        if !(planned.least..=planned.most).contains(&prompt) {
            let range = match planned.least == planned.most {
                true => planned.most.to_string(),
                false => format!("{} to {}", planned.least, planned.most),
            };
            let expected = format!("{range} tokens with the start token (exported with --plan prompt={planned})");
            return Err(Error::input("decoder_input_ids", expected, prompt.to_string()));
        }
        for (option, found) in [("num_beams", num_beams), ("num_return_sequences", num_return_sequences)] {
            if found > beams.most {
                let expected = format!("at most {} (exported with --plan beams={beams})", beams.most);
                return Err(Error::input(option, expected, found.to_string()));
            }
        }
        Ok(())
    }
}

/// A batch of which no more rows and tokens are than planned, as an engine takes it: with as many as are missing behind.
pub(crate) fn fit<'b>(profiles: Option<&Profiles>, batch: &'b Batch, pad: i64) -> Cow<'b, Batch> {
    match profiles {
        Some(Profiles { batch: rows, source, .. }) if batch.rows() < rows.least || batch.length() < source.least => {
            Cow::Owned(batch.widened(rows.least, source.least, pad))
        }
        _ => Cow::Borrowed(batch),
    }
}

impl std::fmt::Display for Sizes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Sizes { least, most, .. } = self;
        if least == most { write!(f, "{most}") } else { write!(f, "{least}..{most}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROWING: &str = r#"{"encoder_model.onnx": {"input_ids": [[2, 8], [4, 32], [8, 64]]},
        "decoder_model.onnx": {"input_ids": [[2, 1], [16, 2], [32, 4]]},
        "decoder_with_past_model.onnx": {"input_ids": [[1, 1], [16, 1], [32, 1]],
            "past_key_values.0.decoder.key": [[1, 2, 1, 8], [16, 2, 16, 8], [32, 2, 31, 8]]}}"#;

    fn sizes(least: usize, usual: usize, most: usize) -> Sizes {
        Sizes { least, usual, most }
    }

    fn growing() -> Profiles {
        Profiles::parse(GROWING.as_bytes(), true).expect("profiles")
    }

    #[test]
    fn a_plan_is_what_the_shapes_say() {
        let decoder = Decoder { beams: sizes(1, 4, 4), prompt: sizes(1, 2, 4), step: 1, target: Some(32) };
        let (batch, source) = (sizes(2, 4, 8), sizes(8, 32, 64));
        assert_eq!(growing(), Profiles { batch, source, decoder: Some(decoder) });
        let fixed = r#"{"encoder_model.onnx": {"input_ids": [[1, 1], [4, 32], [8, 64]]},
            "decoder_model.onnx": {"encoder_hidden_states": [[1, 1, 9], [4, 32, 9], [8, 64, 9]]},
            "decoder_with_past_model.onnx": {"input_ids": [[1, 1], [4, 1], [8, 3]]}}"#;
        let found = Profiles::parse(fixed.as_bytes(), true).expect("profiles").decoder;
        assert_eq!(found, Some(Decoder { beams: sizes(1, 1, 1), prompt: sizes(1, 1, 3), step: 3, target: None }));
        let one = r#"{"model.onnx": {"input_ids": [[4, 64], [4, 64], [4, 64]]}}"#;
        let found = Profiles::parse(one.as_bytes(), false).expect("profiles");
        assert_eq!(found, Profiles { batch: sizes(4, 4, 4), source: sizes(64, 64, 64), decoder: None });
        for (text, expected) in [
            ("{", "EOF"),
            ("{}", "encoder_model.onnx: input_ids: expected three ascending sizes from 1 of axis 0"),
            (r#"{"encoder_model.onnx": {"input_ids": [[1, 1], [0, 32], [8, 64]]}}"#, "axis 0"),
            (r#"{"encoder_model.onnx": {"input_ids": [[1, 1], [4], [8, 64]]}}"#, "axis 1"),
            (r#"{"encoder_model.onnx": {"input_ids": [[1, 1], [4, 3], [8, 2]]}}"#, "axis 1"),
        ] {
            let error = Profiles::parse(text.as_bytes(), true).expect_err(text);
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn what_is_beyond_the_plan_is_refused_with_its_numbers() {
        let plan = growing();
        let told = |result: Result<(), Error>| result.err().map_or("taken".into(), |error| error.to_string());
        for (tokens, expected) in [
            (1, "taken"),
            (64, "taken"),
            (65, "input_ids: expected at most 64 tokens a row (exported with --plan source=8..64), found 65 tokens"),
        ] {
            assert_eq!(told(plan.check_source(tokens)), expected, "{tokens}");
        }
        for (prompt, beams, returned, expected) in [
            (1, 1, 1, "taken"),
            (4, 4, 4, "taken"),
            (1, 5, 1, "num_beams: expected at most 4 (exported with --plan beams=1..4), found 5"),
            (1, 1, 5, "num_return_sequences: expected at most 4 (exported with --plan beams=1..4), found 5"),
            (
                5,
                1,
                1,
                "decoder_input_ids: expected 1 to 4 tokens with the start token (exported with --plan prompt=1..4), found 5",
            ),
        ] {
            assert_eq!(told(plan.check_targets(prompt, beams, returned)), expected, "{prompt} {beams} {returned}");
        }
    }

    #[test]
    fn batches_are_filled_up_to_the_least() {
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
