//! `Batch`: the tokens of one request as a validated, padded rectangle: the input of encoding, generation and scoring.
//! Constructors check what needs no model; [`Batch::check`] checks the rest against a model's sizes, once, before
//! anything runs.

mod images;

use std::ops::Range;

use ndarray::{Array3, s};
use t5gemma_graphs::config::Custom;
use t5gemma_graphs::facts::Facts;

use crate::adapter::Adapter;
use crate::draws::Draws;
use crate::error::Error;
use crate::images::PixelValues;

pub(crate) use images::{check_alone, reads_no_images};

/// Source rows of equal length with their attention masks, and optionally decoder prompts.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    rows: usize,
    length: usize,
    ids: Vec<i64>,
    mask: Vec<i64>,
    /// The length of each row as the caller gave it; the rest is padding added here.
    given: Vec<usize>,
    /// The seed of each row; `None` for rows that use the seed of the options.
    seeds: Vec<Option<u64>>,
    /// The index of each row in the batch that it was given in.
    indices: Vec<usize>,
    prompts: Option<Prompts>,
    /// The expected length of each row's target, the start token included.
    totals: Vec<Option<usize>>,
    /// The encoder's hidden states of the sources, `[rows, length, hidden_size]`, if the caller provided them.
    states: Option<Array3<f32>>,
    /// The LoRA adapter of each row, if it uses one.
    adapters: Vec<Option<Adapter>>,
    /// The images of each row, in the order of their tokens.
    images: Vec<Vec<PixelValues>>,
}

/// The decoder prompts, `[rows, length]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Prompts {
    pub length: usize,
    pub ids: Vec<i64>,
}

impl Prompts {
    /// The prompts of consecutive rows.
    pub fn piece(&self, rows: Range<usize>) -> Prompts {
        Prompts { length: self.length, ids: self.ids[rows.start * self.length..rows.end * self.length].to_vec() }
    }

    /// Repeats the last prompt until there are at least `rows`.
    pub fn widened(mut self, rows: usize) -> Prompts {
        let missing = rows.saturating_sub(self.ids.len() / self.length);
        let last = self.ids[self.ids.len() - self.length..].repeat(missing);
        self.ids.extend(last);
        self
    }
}

impl Batch {
    /// A batch of sources of any lengths, padded on the right with `pad`; the padding is masked out. Sources without a
    /// token are for encoders whose states at padding have a meaning; all other models refuse them.
    ///
    /// # Errors
    /// No source.
    pub fn padded<S: AsRef<[i64]>>(sources: &[S], pad: i64) -> Result<Batch, Error> {
        let length = sources.iter().map(|source| source.as_ref().len()).max().unwrap_or(0).max(1);
        let filled = |value: fn(i64) -> i64, fill: i64| {
            let row = move |source: &S| {
                let ids = source.as_ref();
                let padding = std::iter::repeat_n(fill, length - ids.len());
                ids.iter().map(|&id| value(id)).chain(padding).collect::<Vec<_>>()
            };
            sources.iter().flat_map(row).collect::<Vec<_>>()
        };
        let given = sources.iter().map(|source| source.as_ref().len()).collect();
        Ok(Batch { given, ..Batch::flat(sources.len(), filled(|id| id, pad), filled(|_| 1, 0))? })
    }

    /// Joins batches that have no decoder prompts, or the same one for all rows. Shorter rows are padded on the right
    /// with `pad`; the padding is masked out and hidden from logits processors, so that a row's result does not depend
    /// on its neighbours. A single batch is returned unchanged, prompts included.
    ///
    /// # Errors
    /// No batch, or several whose decoder prompts differ.
    pub fn joined(mut batches: Vec<Batch>, pad: i64) -> Result<Batch, Error> {
        if batches.len() == 1 {
            return Ok(batches.remove(0));
        }
        // The start token is prepended to all prompts of a batch or to none, so prompts keep their meaning in a joined
        // batch only if they are equal.
        let of_all = batches.iter().flat_map(|batch| match &batch.prompts {
            Some(prompts) if prompts.length > 0 => prompts.ids.chunks(prompts.length).map(Some).collect(),
            _ => vec![None; batch.rows],
        });
        let of_all: Vec<Option<&[i64]>> = of_all.collect();
        if of_all.windows(2).any(|pair| pair[0] != pair[1]) {
            return Err(Error::input(
                "decoder_input_ids",
                "the same prompt for all rows of a joined batch",
                "different ones",
            ));
        }
        let states = joined_states(&batches)?;
        let prompts = of_all.first().copied().flatten();
        let prompts = prompts.map(|prompt| Prompts { length: prompt.len(), ids: prompt.repeat(of_all.len()) });
        let length = batches.iter().map(|batch| batch.length).max().unwrap_or(0);
        let wider = |rows: &[i64], own: usize, fill: i64| {
            let row = move |row: &[i64]| [row, &vec![fill; length - own]].concat();
            rows.chunks(own).flat_map(row).collect::<Vec<_>>()
        };
        let ids = batches.iter().flat_map(|batch| wider(&batch.ids, batch.length, pad)).collect();
        let mask = batches.iter().flat_map(|batch| wider(&batch.mask, batch.length, 0)).collect();
        let given = batches.iter().flat_map(|batch| batch.given.clone()).collect();
        let seeds = batches.iter().flat_map(|batch| batch.seeds.clone()).collect();
        let indices = batches.iter().flat_map(|batch| batch.indices.clone()).collect();
        let totals = batches.iter().flat_map(|batch| batch.totals.clone()).collect();
        let adapters = batches.iter().flat_map(|batch| batch.adapters.clone()).collect();
        let images = batches.iter().flat_map(|batch| batch.images.clone()).collect();
        let rows = batches.iter().map(|batch| batch.rows).sum();
        Ok(Batch { given, seeds, indices, prompts, totals, states, adapters, images, ..Batch::flat(rows, ids, mask)? })
    }

    /// A batch of sources that are already padded, on either side: a token counts if its mask is not 0. Rows whose mask
    /// is all 0 are for encoders whose states at padding have a meaning; all other models refuse them.
    ///
    /// # Errors
    /// No source, rows of unequal lengths, or a mask of another shape.
    pub fn masked<I: AsRef<[i64]>, M: AsRef<[i64]>>(ids: &[I], mask: &[M]) -> Result<Batch, Error> {
        let length = ids.first().map_or(0, |row| row.as_ref().len());
        let rectangle = |field: &str, found: Vec<usize>| match found.iter().position(|&tokens| tokens != length) {
            Some(row) => Err(Error::input(
                format!("{field}[{row}]"),
                format!("{length} entries, as many as input_ids[0] has"),
                format!("{} entries", found[row]),
            )),
            None => Ok(()),
        };
        rectangle("input_ids", ids.iter().map(|row| row.as_ref().len()).collect())?;
        rectangle("attention_mask", mask.iter().map(|row| row.as_ref().len()).collect())?;
        if mask.len() != ids.len() {
            let expected = format!("{} rows, as many as input_ids has", ids.len());
            return Err(Error::input("attention_mask", expected, format!("{} rows", mask.len())));
        }
        if length == 0 {
            return Batch::padded(ids, 0);
        }
        let flat = |row: &[i64]| row.to_vec();
        Batch::flat(
            ids.len(),
            ids.iter().flat_map(|row| flat(row.as_ref())).collect(),
            mask.iter().flat_map(|row| flat(row.as_ref())).collect(),
        )
    }

    /// A batch of `rows` sources from the concatenation of their tokens and of their masks, which may be all 0 as in
    /// [`Batch::masked`].
    ///
    /// # Errors
    /// No source, rows without a token, or lengths that are no multiple of `rows`.
    pub fn flat(rows: usize, ids: Vec<i64>, mask: Vec<i64>) -> Result<Batch, Error> {
        if rows == 0 {
            return Err(Error::input("input_ids", "at least one row", "none"));
        }
        if ids.is_empty() {
            return Err(Error::input("input_ids[0]", "at least one token", "none"));
        }
        if !ids.len().is_multiple_of(rows) {
            let expected = format!("a multiple of {rows} entries, the number of rows");
            return Err(Error::input("input_ids", expected, format!("{} entries", ids.len())));
        }
        if mask.len() != ids.len() {
            let expected = format!("{} entries, as many as input_ids has", ids.len());
            return Err(Error::input("attention_mask", expected, format!("{} entries", mask.len())));
        }
        let length = ids.len() / rows;
        let mask = mask.into_iter().map(|visible| (visible != 0) as i64).collect();
        let (given, seeds, indices) = (vec![length; rows], vec![None; rows], (0..rows).collect());
        Ok(Batch {
            rows,
            length,
            ids,
            mask,
            given,
            seeds,
            indices,
            prompts: None,
            totals: vec![None; rows],
            states: None,
            adapters: vec![None; rows],
            images: vec![Vec::new(); rows],
        })
    }

    /// Sets the decoder prompt of each row, which generation continues.
    ///
    /// The decoder's start token is prepended to all rows unless one of them begins with it, as in transformers.
    ///
    /// # Errors
    /// Not one row per source, or rows of unequal lengths.
    pub fn with_decoder_input_ids<P: AsRef<[i64]>>(self, prompts: &[P]) -> Result<Batch, Error> {
        if prompts.len() != self.rows {
            let expected = format!("{} rows, as many as input_ids has", self.rows);
            return Err(Error::input("decoder_input_ids", expected, format!("{} rows", prompts.len())));
        }
        let length = prompts[0].as_ref().len();
        if let Some(row) = prompts.iter().position(|prompt| prompt.as_ref().len() != length) {
            let expected = format!("{length} entries, as many as decoder_input_ids[0] has");
            let found = format!("{} entries", prompts[row].as_ref().len());
            return Err(Error::input(format!("decoder_input_ids[{row}]"), expected, found));
        }
        let ids = prompts.iter().flat_map(|prompt| prompt.as_ref().to_vec()).collect();
        Ok(Batch { prompts: Some(Prompts { length, ids }), ..self })
    }

    /// Sets a seed for these rows, which they keep in a joined batch.
    pub fn with_seed(self, seed: u64) -> Batch {
        Batch { seeds: vec![Some(seed); self.rows], ..self }
    }

    /// Sets the LoRA adapter that the model computes these rows with, which they keep in a joined batch. The option
    /// `adapter` does the same for a call.
    pub fn with_adapter(self, adapter: &Adapter) -> Batch {
        Batch { adapters: vec![Some(adapter.clone()); self.rows], ..self }
    }

    /// Sets the expected length of each row's target in tokens, the start token included: `progress_total`, for models
    /// whose positions depend on it.
    ///
    /// # Errors
    /// Not one length per source, or one below 1.
    pub fn with_progress_totals(self, totals: &[i64]) -> Result<Batch, Error> {
        let length = |(row, &total): (usize, &i64)| match usize::try_from(total) {
            Ok(total) if total > 0 => Ok(Some(total)),
            _ => Err(Error::input(format!("progress_total[{row}]"), "a length of at least 1", total.to_string())),
        };
        if totals.len() != self.rows {
            let expected = format!("{} lengths, as many as input_ids has rows", self.rows);
            return Err(Error::input("progress_total", expected, totals.len().to_string()));
        }
        Ok(Batch { totals: totals.iter().enumerate().map(length).collect::<Result<_, Error>>()?, ..self })
    }

    /// The same batch with `total` as the expected length of each target that has none, for models whose positions
    /// depend on it.
    pub(crate) fn with_expected_lengths(self, custom: &Custom, total: usize) -> Batch {
        if custom.target_scale().is_none() {
            return self;
        }
        let totals = self.totals.iter().map(|given| Some(given.unwrap_or(total))).collect();
        Batch { totals, ..self }
    }

    /// Sets the encoder's hidden states of these sources, `[rows, length, hidden_size]` as [`Model::encode`] and
    /// [`Encoder::encode`] return them, so that the encoder does not run. States of padding are ignored.
    ///
    /// [`Model::encode`]: crate::Model::encode
    /// [`Encoder::encode`]: crate::Encoder::encode
    ///
    /// # Errors
    /// States of another shape.
    pub fn with_encoder_outputs(self, states: Array3<f32>) -> Result<Batch, Error> {
        if states.shape()[..2] != [self.rows, self.length] {
            let expected = format!("states of {} rows of {} tokens, as input_ids has", self.rows, self.length);
            return Err(Error::input("encoder_outputs", expected, format!("shape {:?}", states.shape())));
        }
        Ok(Batch { states: Some(states), ..self })
    }

    /// One row as the caller gave it, without added padding and without its decoder prompt.
    pub(crate) fn alone(&self, row: usize) -> Batch {
        self.piece(row..row + 1)
    }

    /// Consecutive rows without decoder prompts, padded only to the longest of them.
    pub(crate) fn piece(&self, rows: Range<usize>) -> Batch {
        let length = self.given[rows.clone()].iter().copied().max().unwrap_or(0).max(1);
        let cut = |flat: &[i64]| -> Vec<i64> {
            rows.clone().flat_map(|row| flat[row * self.length..][..length].iter().copied()).collect()
        };
        let states = self.states.as_ref().map(|states| states.slice(s![rows.clone(), ..length, ..]).to_owned());
        Batch {
            rows: rows.len(),
            length,
            ids: cut(&self.ids),
            mask: cut(&self.mask),
            given: self.given[rows.clone()].to_vec(),
            seeds: self.seeds[rows.clone()].to_vec(),
            indices: self.indices[rows.clone()].to_vec(),
            prompts: None,
            totals: self.totals[rows.clone()].to_vec(),
            states,
            adapters: self.adapters[rows.clone()].to_vec(),
            images: self.images[rows].to_vec(),
        }
    }

    /// A batch of at least `rows` rows of at least `length` tokens, without decoder prompts: rows are padded on the
    /// right with `pad`, which the mask hides, and the last row is repeated.
    pub(crate) fn widened(&self, rows: usize, length: usize, pad: i64) -> Batch {
        let (wide, long) = (rows.max(self.rows), length.max(self.length));
        let rows: Vec<usize> = (0..self.rows).chain(std::iter::repeat_n(self.rows - 1, wide - self.rows)).collect();
        let filled = |values: &[i64], fill: i64| -> Vec<i64> {
            let row = |&row: &usize| {
                let own = values[row * self.length..][..self.length].iter().copied();
                own.chain(std::iter::repeat_n(fill, long - self.length))
            };
            rows.iter().flat_map(row).collect()
        };
        let states = self.states.as_ref().map(|states| {
            let mut filled = Array3::zeros([wide, long, states.shape()[2]]);
            for (to, &from) in rows.iter().enumerate() {
                filled.slice_mut(s![to, ..self.length, ..]).assign(&states.slice(s![from, .., ..]));
            }
            filled
        });
        Batch {
            rows: wide,
            length: long,
            ids: filled(&self.ids, pad),
            mask: filled(&self.mask, 0),
            given: rows.iter().map(|&row| self.given[row]).collect(),
            seeds: rows.iter().map(|&row| self.seeds[row]).collect(),
            indices: rows.iter().map(|&row| self.indices[row]).collect(),
            prompts: None,
            totals: rows.iter().map(|&row| self.totals[row]).collect(),
            states,
            adapters: rows.iter().map(|&row| self.adapters[row].clone()).collect(),
            images: rows.iter().map(|&row| self.images[row].clone()).collect(),
        }
    }

    /// The same batch with padding up to `length` that belongs to the sources, as if it had been given: also the padding
    /// that is there already.
    pub(crate) fn with_own_padding(&self, length: usize, pad: i64) -> Batch {
        let wide = self.widened(self.rows, length, pad);
        Batch { given: vec![wide.length; wide.rows], ..wide }
    }

    /// The encoder's hidden states of the sources, if the caller provided them.
    pub(crate) fn encoder_outputs(&self) -> Option<&Array3<f32>> {
        self.states.as_ref()
    }

    /// The LoRA adapter of each row.
    pub(crate) fn adapters(&self) -> &[Option<Adapter>] {
        &self.adapters
    }

    /// Consecutive rows that the encoder can run on at once: with the same LoRA adapter or none, and all with images or
    /// none, since image tokens of a row without images are ordinary ones.
    pub(crate) fn encoder_runs(&self) -> impl Iterator<Item = Range<usize>> {
        let kinds: Vec<_> = self.adapters.iter().zip(self.images.iter().map(|images| images.is_empty())).collect();
        let mut first = 0;
        let lengths: Vec<usize> = kinds.chunk_by(|one, next| one == next).map(<[_]>::len).collect();
        lengths.into_iter().map(move |length| {
            first += length;
            first - length..first
        })
    }

    /// The random numbers that a row samples with; `seed` is that of the options.
    pub(crate) fn draws(&self, row: usize, seed: u64) -> Draws {
        let (ids, mask) = (self.source(row), self.row_mask(row));
        // Padding is not part of a source: the same text gets the same numbers wherever its padding is.
        let visible = ids.iter().zip(mask).filter(|(_, visible)| **visible != 0).map(|(id, _)| *id);
        Draws::new(self.seeds[row].unwrap_or(seed), self.indices[row], visible)
    }

    /// The expected length of each row's target, where the caller gave one.
    pub(crate) fn progress_totals(&self) -> &[Option<usize>] {
        &self.totals
    }

    /// The number of sources.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The tokens of each source, padding included.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The tokens of all sources, concatenated.
    pub fn ids(&self) -> &[i64] {
        &self.ids
    }

    /// The masks of all sources, 0 or 1, concatenated.
    pub fn mask(&self) -> &[i64] {
        &self.mask
    }

    /// The tokens of one source as the caller gave it, without added padding.
    pub fn source(&self, row: usize) -> &[i64] {
        &self.ids[row * self.length..][..self.given[row]]
    }

    /// The mask of one source as the caller gave it.
    pub fn row_mask(&self, row: usize) -> &[i64] {
        &self.mask[row * self.length..][..self.given[row]]
    }

    /// The decoder prompts, start token included.
    pub(crate) fn prompts(&self, start: i64) -> Prompts {
        match &self.prompts {
            None => Prompts { length: 1, ids: vec![start; self.rows] },
            Some(prompts) if prompts.length == 0 => Prompts { length: 1, ids: vec![start; self.rows] },
            Some(prompts) if prompts.ids.chunks(prompts.length).any(|prompt| prompt[0] == start) => prompts.clone(),
            Some(prompts) => Prompts {
                length: prompts.length + 1,
                ids: prompts.ids.chunks(prompts.length).flat_map(|prompt| [&[start], prompt].concat()).collect(),
            },
        }
    }

    /// Refuses sources without any token.
    pub(crate) fn check_given(&self) -> Result<(), Error> {
        match self.given.iter().position(|&given| given == 0) {
            None => Ok(()),
            Some(row) => Err(Error::input(format!("input_ids[{row}]"), "at least one token", "none")),
        }
    }

    /// Refuses sources of padding alone, which have no meaning for most models.
    pub(crate) fn check_visible(&self) -> Result<(), Error> {
        match self.mask.chunks(self.length).position(|row| row.iter().all(|&visible| visible == 0)) {
            None => Ok(()),
            Some(row) => {
                Err(Error::input(format!("input_ids[{row}]"), "at least one token that is not padding", "none"))
            }
        }
    }

    /// Checks what depends on the sizes of the model: tokens against its vocabularies, the length of the sources, and
    /// the width of hidden states.
    pub(crate) fn check(&self, facts: &Facts) -> Result<(), Error> {
        let width = facts.encoder.hidden_size;
        if let Some(found) = self.states.as_ref().map(|states| states.shape()[2]).filter(|&found| found != width) {
            let expected = format!("states of width {width} (encoder.hidden_size)");
            return Err(Error::input("encoder_outputs", expected, format!("width {found}")));
        }
        let longest = facts.encoder.max_position_embeddings;
        if self.length > longest {
            let expected = format!("at most {longest} tokens a row (encoder.max_position_embeddings)");
            return Err(Error::input("input_ids", expected, format!("{} tokens", self.length)));
        }
        check_ids("input_ids", self.length, &self.ids, facts.encoder.vocab_size)?;
        self.check_images(facts)?;
        match &self.prompts {
            Some(prompts) => check_ids("decoder_input_ids", prompts.length, &prompts.ids, facts.decoder.vocab_size),
            None => Ok(()),
        }
    }
}

/// The hidden states of joined batches, if they have any.
fn joined_states(batches: &[Batch]) -> Result<Option<Array3<f32>>, Error> {
    let all: Vec<&Array3<f32>> = batches.iter().filter_map(|batch| batch.states.as_ref()).collect();
    let Some(first) = all.first() else { return Ok(None) };
    let width = first.shape()[2];
    if all.len() < batches.len() || all.iter().any(|states| states.shape()[2] != width) {
        return Err(Error::input(
            "encoder_outputs",
            "states of one width for all rows of a joined batch",
            "states of other widths or none",
        ));
    }
    let length = batches.iter().map(|batch| batch.length).max().unwrap_or(0);
    let mut joined = Array3::zeros([batches.iter().map(|batch| batch.rows).sum(), length, width]);
    let mut row = 0;
    for states in all {
        let end = row + states.shape()[0];
        joined.slice_mut(s![row..end, ..states.shape()[1], ..]).assign(states);
        row = end;
    }
    Ok(Some(joined))
}

fn check_ids(field: &str, length: usize, ids: &[i64], vocab_size: usize) -> Result<(), Error> {
    match ids.iter().position(|&id| usize::try_from(id).map_or(true, |id| id >= vocab_size)) {
        None => Ok(()),
        Some(at) => Err(Error::input(
            format!("{field}[{}][{}]", at / length, at % length),
            format!("a token id below {vocab_size}, the size of the vocabulary"),
            ids[at].to_string(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(result: Result<Batch, Error>) -> String {
        result.expect_err("the batch is malformed").to_string()
    }

    #[test]
    fn sources_are_padded_on_the_right_and_masked() {
        let batch = Batch::padded(&[vec![5, 6, 7], vec![8]], 9).expect("well-formed");
        assert_eq!(batch.ids(), [5, 6, 7, 8, 9, 9]);
        assert_eq!(batch.mask(), [1, 1, 1, 1, 0, 0]);
        assert_eq!((batch.source(1), batch.row_mask(1)), ([8].as_slice(), [1].as_slice()));
    }

    #[test]
    fn a_batch_is_filled_up_behind() {
        let states = Array3::from_shape_fn([2, 2, 1], |(row, at, _)| (10 * row + at) as f32);
        let batch = Batch::padded(&[vec![5, 6], vec![7]], 0).expect("well-formed");
        let batch = batch.with_encoder_outputs(states).expect("of this batch");
        let wide = batch.widened(3, 3, 4);
        assert_eq!((wide.rows(), wide.length()), (3, 3));
        assert_eq!(wide.ids(), [5, 6, 4, 7, 0, 4, 7, 0, 4]);
        assert_eq!(wide.mask(), [1, 1, 0, 1, 0, 0, 1, 0, 0]);
        assert_eq!((wide.source(1), wide.row_mask(2)), ([7].as_slice(), [1].as_slice()));
        let states: Vec<f32> = wide.encoder_outputs().expect("there were some").iter().copied().collect();
        assert_eq!(states, [0.0, 1.0, 0.0, 10.0, 11.0, 0.0, 10.0, 11.0, 0.0]);
        assert_eq!(batch.widened(1, 1, 4), batch, "no fewer than there are");
        let prompts = Prompts { length: 2, ids: vec![1, 2, 3, 4] };
        assert_eq!(prompts.clone().widened(3), Prompts { length: 2, ids: vec![1, 2, 3, 4, 3, 4] });
        assert_eq!(prompts.clone().widened(1), prompts);
    }

    #[test]
    fn joined_rows_keep_their_own_padding_and_no_more() {
        let batches = vec![
            Batch::masked(&[[5, 0]], &[[1, 0]]).expect("well-formed"),
            Batch::masked(&[[6, 7, 8], [6, 6, 6]], &[[1, 1, 1], [0, 0, 1]]).expect("well-formed"),
        ];
        let batch = Batch::joined(batches, 9).expect("well-formed");
        assert_eq!(batch.ids(), [5, 0, 9, 6, 7, 8, 6, 6, 6]);
        assert_eq!(batch.mask(), [1, 0, 0, 1, 1, 1, 0, 0, 1]);
        assert_eq!((batch.source(0), batch.source(1)), ([5, 0].as_slice(), [6, 7, 8].as_slice()));
    }

    #[test]
    fn rows_with_the_same_prompt_can_be_joined_and_others_cannot() {
        let batch = |prompt: &[i64]| {
            Batch::padded(&[[5, 6]], 0).and_then(|batch| batch.with_decoder_input_ids(&[prompt])).expect("well-formed")
        };
        let joined = Batch::joined(vec![batch(&[7, 8]), batch(&[7, 8])], 0).expect("they are the same");
        assert_eq!(joined.prompts(2), Prompts { length: 3, ids: vec![2, 7, 8, 2, 7, 8] });
        let empty = Batch::joined(vec![batch(&[]), Batch::padded(&[[9]], 0).expect("well-formed")], 0);
        assert_eq!(empty.expect("an empty prompt is none").prompts(2), Prompts { length: 1, ids: vec![2, 2] });
        for other in [batch(&[7]), batch(&[2, 8]), Batch::padded(&[[9]], 0).expect("well-formed")] {
            let message = error(Batch::joined(vec![batch(&[7, 8]), other], 0));
            assert!(message.starts_with("decoder_input_ids: expected the same prompt for all rows"), "{message}");
        }
    }

    #[test]
    fn a_row_draws_the_same_in_any_batch_and_with_any_padding() {
        let alone = Batch::masked(&[[6, 7]], &[[1, 1]]).expect("well-formed").with_seed(3);
        let padded = Batch::masked(&[[0, 6, 7]], &[[0, 1, 1]]).expect("well-formed").with_seed(3);
        let other = Batch::padded(&[vec![5], vec![6, 7]], 0).expect("well-formed").with_seed(4);
        let joined = Batch::joined(vec![other.clone(), padded], 0).expect("well-formed");
        assert_eq!(joined.draws(2, 9), alone.draws(0, 8));
        assert_eq!((joined.draws(0, 9), joined.draws(1, 9)), (other.draws(0, 8), other.draws(1, 8)));
        assert_ne!(other.with_seed(3).draws(1, 9), alone.draws(0, 9), "another place in its request");
        let unseeded = Batch::padded(&[[6, 7]], 0).expect("well-formed");
        assert_eq!(unseeded.draws(0, 3), alone.draws(0, 8));
    }

    #[test]
    fn a_piece_is_what_its_rows_would_be_without_the_others() {
        let states = Array3::from_shape_fn([3, 3, 1], |(row, at, _)| (10 * row + at) as f32);
        let batch = Batch::padded(&[vec![5], vec![6, 7], vec![8, 9, 4]], 0).expect("well-formed");
        let batch = batch.with_encoder_outputs(states).expect("of this batch").with_seed(3);
        let piece = batch.piece(0..2);
        assert_eq!((piece.ids(), piece.mask()), ([5, 0, 6, 7].as_slice(), [1, 0, 1, 1].as_slice()));
        let states = piece.encoder_outputs().expect("it has them");
        assert_eq!(states.iter().copied().collect::<Vec<f32>>(), [0.0, 1.0, 10.0, 11.0]);
        // In its place, with its seed.
        assert_eq!(batch.piece(1..3).draws(1, 9), batch.draws(2, 9));
        assert_eq!(batch.piece(0..3), batch);
    }

    #[test]
    fn states_are_joined_with_their_sources() {
        let batch = |length: usize, value: f32| {
            let batch = Batch::padded(&[vec![5; length]], 0).expect("well-formed");
            batch.with_encoder_outputs(Array3::from_elem([1, length, 2], value)).expect("of this batch")
        };
        let joined = Batch::joined(vec![batch(1, 3.0), batch(2, 4.0)], 0).expect("well-formed");
        let states = joined.encoder_outputs().expect("both have them");
        assert_eq!(states.iter().copied().collect::<Vec<f32>>(), [3.0, 3.0, 0.0, 0.0, 4.0, 4.0, 4.0, 4.0]);

        let without = Batch::padded(&[[5]], 0).expect("well-formed");
        let mixed = Batch::joined(vec![batch(1, 3.0), without.clone()], 0);
        assert!(error(mixed).starts_with("encoder_outputs: expected states of one width"));
        let other = without.with_encoder_outputs(Array3::zeros([1, 2, 2]));
        assert_eq!(
            error(other),
            "encoder_outputs: expected states of 1 rows of 1 tokens, as input_ids has, found shape [1, 2, 2]"
        );
    }

    #[test]
    fn any_mask_value_but_zero_is_visible() {
        let batch = Batch::masked(&[[5, 6, 7]], &[[0, -1, 2]]).expect("well-formed");
        assert_eq!(batch.mask(), [0, 1, 1]);
    }

    #[test]
    fn malformed_batches_are_refused_by_field_and_row() {
        let none: [Vec<i64>; 0] = [];
        let rows = |lengths: &[usize]| lengths.iter().map(|&length| vec![1; length]).collect::<Vec<_>>();
        let cases = [
            (error(Batch::padded(&none, 0)), "input_ids: expected at least one row, found none"),
            (error(Batch::masked(&rows(&[2, 3]), &rows(&[2, 3]))), "input_ids[1]: expected 2 entries, as many as"),
            (error(Batch::masked(&rows(&[2, 2]), &rows(&[2, 1]))), "attention_mask[1]: expected 2 entries, as many as"),
            (error(Batch::masked(&rows(&[2, 2]), &rows(&[2]))), "attention_mask: expected 2 rows, as many as"),
            (error(Batch::masked(&rows(&[0]), &rows(&[1]))), "attention_mask[0]: expected 0 entries, as many as"),
            (error(Batch::flat(2, vec![1; 3], vec![1; 3])), "input_ids: expected a multiple of 2 entries"),
            (error(Batch::flat(2, vec![1; 4], vec![1; 3])), "attention_mask: expected 4 entries, as many as"),
        ];
        for (found, expected) in cases {
            assert!(found.starts_with(expected), "{found}\n{expected}");
        }
    }

    #[test]
    fn sources_of_padding_alone_are_told_from_those_with_tokens() {
        let rows = |lengths: &[usize]| lengths.iter().map(|&length| vec![1; length]).collect::<Vec<_>>();
        for (batch, row) in [
            (Batch::padded(&rows(&[2, 0]), 0), 1),
            (Batch::padded(&rows(&[0]), 0), 0),
            (Batch::masked(&rows(&[0]), &rows(&[0])), 0),
            (Batch::masked(&rows(&[1, 1]), &[[1], [0]]), 1),
        ] {
            let batch = batch.expect("well-formed");
            let error = batch.check_visible().expect_err("a source of padding").to_string();
            assert_eq!(error, format!("input_ids[{row}]: expected at least one token that is not padding, found none"));
            assert_eq!(batch.piece(row..row + 1).length(), 1);
        }
        let batch = Batch::padded(&rows(&[2, 0]), 9).expect("well-formed").with_own_padding(3, 9);
        assert_eq!((batch.ids(), batch.mask()), ([1, 1, 9, 9, 9, 9].as_slice(), [1, 1, 0, 0, 0, 0].as_slice()));
        assert_eq!(batch.piece(1..2).length(), 3, "padding of its own stays");
    }

    #[test]
    fn the_start_token_is_added_unless_a_row_begins_with_it() {
        let batch = |prompts: &[[i64; 2]; 2]| {
            let batch = Batch::padded(&[[5], [6]], 0).expect("well-formed");
            batch.with_decoder_input_ids(prompts).expect("well-formed").prompts(2)
        };
        assert_eq!(batch(&[[7, 8], [9, 2]]), Prompts { length: 3, ids: vec![2, 7, 8, 2, 9, 2] });
        assert_eq!(batch(&[[7, 8], [2, 9]]), Prompts { length: 2, ids: vec![7, 8, 2, 9] });
        let none = Batch::padded(&[[5], [6]], 0).expect("well-formed");
        assert_eq!(none.prompts(2), Prompts { length: 1, ids: vec![2, 2] });
        let empty: [[i64; 0]; 2] = [[], []];
        let empty = none.with_decoder_input_ids(&empty).expect("an empty prompt is none");
        assert_eq!(empty.prompts(2), Prompts { length: 1, ids: vec![2, 2] });
    }

    #[test]
    fn tokens_outside_the_vocabulary_are_refused_by_row_and_position() {
        let config = r#"{"model_type": "t5gemma", "encoder": {"vocab_size": 10, "max_position_embeddings": 3},
                         "decoder": {"vocab_size": 8}}"#;
        let config = t5gemma_graphs::config::Config::parse(config).expect("a minimal config").facts();
        let source = |ids: &[i64]| Batch::padded(&[vec![1], ids.to_vec()], 0).expect("well-formed");
        assert!(source(&[9]).check(&config).is_ok());
        for (ids, expected) in [
            (vec![1, 10], "input_ids[1][1]: expected a token id below 10, the size of the vocabulary, found 10"),
            (vec![-1], "input_ids[1][0]: expected a token id below 10, the size of the vocabulary, found -1"),
            (
                vec![1; 4],
                "input_ids: expected at most 3 tokens a row (encoder.max_position_embeddings), found 4 tokens",
            ),
        ] {
            assert_eq!(source(&ids).check(&config).expect_err(expected).to_string(), expected);
        }
        let prompted = source(&[1]).with_decoder_input_ids(&[[2, 7], [2, 8]]).expect("well-formed");
        let error = prompted.check(&config).expect_err("8 is outside").to_string();
        assert!(error.starts_with("decoder_input_ids[1][1]: expected a token id below 8"), "{error}");
    }
}
