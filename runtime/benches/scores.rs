//! What choosing the tokens of a step costs: rows of 256 thousand scores to candidates. `make bench` runs it.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use serde_json::{Value, json};
use t5gemma_runtime::GenerationConfig;
use t5gemma_runtime::scores::Processors;
use t5gemma_runtime::search::Search;

const VOCAB_SIZE: usize = 256_000;
const SOURCE: [i64; 8] = [5, 6, 7, 8, 9, 10, 11, 12];

/// Scores spread as soft-capped logits are, the same ones every time.
fn logits(rows: usize) -> Vec<f32> {
    let mut state = 1u32;
    let score = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        30.0 * ((state >> 8) as f32 / (1 << 23) as f32 - 1.0).powi(3)
    };
    (0..rows * VOCAB_SIZE).map(score).collect()
}

fn candidates(c: &mut Criterion) {
    let cases: [(&str, Value); 7] = [
        ("greedy", json!({})),
        ("greedy, repetition_penalty", json!({"repetition_penalty": 1.2})),
        ("greedy, no_repeat_ngram_size", json!({"no_repeat_ngram_size": 3})),
        ("greedy, renormalize_logits", json!({"renormalize_logits": true})),
        ("4 beams", json!({"num_beams": 4})),
        ("4 beams, repetition_penalty", json!({"num_beams": 4, "repetition_penalty": 1.2})),
        ("16 beams", json!({"num_beams": 16})),
    ];
    let mut group = c.benchmark_group("candidates of a row");
    for (name, request) in cases {
        let request = request.as_object().expect("written above");
        let options = GenerationConfig::default().with_json(request).expect("written above");
        let search = Search::new(&options, &[2, 5, 6, 7]);
        let processors = Processors::new(&options, &SOURCE, 1);
        let logits = logits(search.width());
        // Processors write to the scores, so that each run has its own.
        let run = |logits: &mut Vec<f32>| black_box(processors.candidates(logits, &search));
        group.bench_function(name, |bencher| {
            bencher.iter_batched_ref(|| logits.clone(), run, BatchSize::LargeInput);
        });
    }
}

criterion_group!(benches, candidates);
criterion_main!(benches);
