//! What a search costs of itself: candidates to beams, parents and hypotheses, 128 steps long. `make bench` runs it.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use serde_json::json;
use t5gemma_runtime::GenerationConfig;
use t5gemma_runtime::search::{Candidate, Progress, Search};

const STEPS: usize = 128;
const EOS: i64 = 1;

/// Candidates of one step, best first; every eighth ends its target.
fn candidates(search: &Search, step: usize) -> Vec<Candidate> {
    let (width, count) = (search.width(), search.candidates());
    let candidate = |rank: usize| Candidate {
        parent: (rank * 7 + step) % width,
        token: if (rank + step) % 8 == 7 { EOS } else { 10 + (rank * 31 + step * 17) as i64 % 1000 },
        score: -(step as f32) - 0.01 * rank as f32,
    };
    (0..count).map(candidate).collect()
}

fn advance(c: &mut Criterion) {
    let mut group = c.benchmark_group(format!("{STEPS} steps"));
    for num_beams in [1, 4, 16, 64] {
        // Without an end, so that greedy search and all widths go the whole way.
        let request = json!({"num_beams": num_beams, "max_new_tokens": STEPS, "early_stopping": "never",
            "length_penalty": 5.0});
        let mut request = request.as_object().expect("written above").clone();
        if num_beams == 1 {
            request.retain(|name, _| name == "max_new_tokens");
        }
        let mut options = GenerationConfig::default().with_json(&request).expect("written above");
        if num_beams == 1 {
            options.eos_token_id.clear();
        }
        let search = Search::new(&options, &[2]);
        let steps: Vec<Vec<Candidate>> = (0..STEPS).map(|step| candidates(&search, step)).collect();
        let run = |search: Search| {
            let mut search = search;
            let taken = steps.iter().take_while(|step| search.advance(black_box(step)) == Progress::Continue).count();
            assert_eq!(taken, STEPS - 1, "the search goes the whole way");
            search.finish()
        };
        group.bench_function(format!("num_beams {num_beams}"), |bencher| {
            bencher.iter_batched(|| search.clone(), run, BatchSize::SmallInput);
        });
    }
}

criterion_group!(benches, advance);
criterion_main!(benches);
