//! Greedy search: the best token of every step, until an end-of-sequence token or the maximum length.

use super::{Candidate, FinishReason, Hypothesis, Progress};
use crate::options::GenerationOptions;

#[derive(Clone, Debug)]
pub(super) struct Greedy {
    history: Vec<i64>,
    prompt_len: usize,
    max_length: usize,
    eos: Vec<i64>,
}

impl Greedy {
    pub(super) fn new(options: &GenerationOptions, prompt: &[i64]) -> Greedy {
        Greedy {
            history: prompt.to_vec(),
            prompt_len: prompt.len(),
            max_length: options.max_length(prompt.len()),
            eos: options.eos_token_id.clone(),
        }
    }

    pub(super) fn history(&self) -> &[i64] {
        &self.history
    }

    pub(super) fn next_tokens(&self) -> &[i64] {
        &self.history[self.history.len().saturating_sub(1)..]
    }

    pub(super) fn advance(&mut self, candidates: &[Candidate]) -> Progress {
        let token = candidates[0].token;
        self.history.push(token);
        if self.eos.contains(&token) || self.history.len() >= self.max_length {
            Progress::Done
        } else {
            Progress::Continue
        }
    }

    pub(super) fn finish(mut self) -> Hypothesis {
        let tokens = self.history.split_off(self.prompt_len);
        let finish_reason = FinishReason::of(&tokens, &self.eos);
        Hypothesis { tokens, score: None, finish_reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::EarlyStopping;
    use crate::search::Search;

    #[test]
    fn a_greedy_search_ends_at_an_eos_token_or_at_the_maximum_length() {
        // name, prompt, eos tokens, new tokens allowed, what the model says, what is generated, why it ends
        type Case = (&'static str, &'static [i64], &'static [i64], usize, &'static [i64], &'static [i64], FinishReason);
        let cases: &[Case] = &[
            ("eos is kept", &[2], &[1], 9, &[5, 6, 1, 7], &[5, 6, 1], FinishReason::Eos),
            ("any of several", &[2], &[1, 6], 9, &[5, 6, 1], &[5, 6], FinishReason::Eos),
            ("length", &[2], &[1], 3, &[5, 6, 7, 8], &[5, 6, 7], FinishReason::Length),
            ("eos at the last place", &[2], &[1], 3, &[5, 6, 1], &[5, 6, 1], FinishReason::Eos),
            ("eos in the prompt does not count", &[2, 1], &[1], 2, &[5, 6], &[5, 6], FinishReason::Length),
            ("no eos at all", &[2], &[], 2, &[1, 1], &[1, 1], FinishReason::Length),
        ];
        for &(name, prompt, eos, max_new_tokens, says, tokens, finish_reason) in cases {
            let options = GenerationOptions {
                max_new_tokens: Some(max_new_tokens),
                eos_token_id: eos.to_vec(),
                early_stopping: EarlyStopping::False,
                ..GenerationOptions::default()
            };
            let mut search = Search::new(&options, prompt);
            assert_eq!((search.width(), search.candidates(), search.parents()), (1, 1, &[0][..]), "{name}");
            assert_eq!(search.next_tokens(), &prompt[prompt.len() - 1..], "{name}");
            for (step, &token) in says.iter().enumerate() {
                let progress = search.advance(&[Candidate { parent: 0, token, score: 0.5 }]);
                assert_eq!(search.next_tokens(), [token], "{name}");
                assert_eq!(progress == Progress::Done, step + 1 == tokens.len(), "{name}: step {step}");
                if progress == Progress::Done {
                    break;
                }
            }
            assert_eq!(search.history(0)[..prompt.len()], *prompt, "{name}");
            let hypothesis = Hypothesis { tokens: tokens.to_vec(), score: None, finish_reason };
            assert_eq!(search.finish(), [hypothesis], "{name}");
        }
    }
}
