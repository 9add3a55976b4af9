//! Sources that need more memory than there is.

use std::sync::Arc;

use t5gemma_exporter::Export;
use t5gemma_graphs::Target;
use t5gemma_graphs::task::{Features, Task};
use t5gemma_runtime::{
    Batch, Cancellation, Controls, Encoder, Engine, EngineOptions, Limits, Model, OpenOptions, Request,
};

use crate::common::{exported_as, exported_for};

#[test]
fn a_source_that_needs_more_memory_than_there_is_is_refused_with_the_figures() {
    for (name, target) in
        [("tiny-balanced", Target::Portable), ("tiny-balanced", Target::Cpu), ("t2-balanced", Target::Cpu)]
    {
        let path = exported_for(name, target);
        let open = |bytes| {
            let options = OpenOptions::default().limits(Limits::default().max_source_bytes(bytes));
            Model::open_with(&path, &options).expect("the model opens")
        };
        let batch = |length| Batch::padded(&[vec![5; 2], vec![5; length]], 0).expect("valid");
        let encode = |model: &Model, length| model.encode(&batch(length), &Cancellation::new());
        // The figure in the message is the limit.
        let model = open(200_000);
        let error = encode(&model, 150).expect_err("too long").to_string();
        let longest = error.strip_prefix("input_ids: expected at most ").and_then(|rest| rest.split(' ').next());
        let longest: usize = longest.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{error}"));
        assert!(error.contains("tokens a row, which need about 0.0 GiB of memory, found 150 tokens, which"), "{error}");
        assert!((10..150).contains(&longest), "{error}");
        encode(&model, longest).expect("it fits");
        let refused = encode(&model, longest + 1).expect_err("one too many").to_string();

        let options = model.generation_config().clone();
        let batch = batch(longest + 1);
        let generated = model.generate_batch(&batch, &options, Controls::default()).map(drop);
        let scored = model.score(&batch, &[vec![5], vec![5]], 0, &Cancellation::new()).map(drop);
        let engine = Engine::new(Arc::new(model), EngineOptions::default()).expect("an engine");
        let submitted = engine.submit(Request::new(batch.clone(), options.clone())).map(drop);
        for result in [generated, scored, submitted] {
            assert_eq!(result.expect_err("one too many").to_string(), refused, "{name}");
        }
        // What is computed already needs no memory to compute.
        let states = encode(&open(usize::MAX), longest + 1).expect("it fits");
        let encoded = batch.with_encoder_outputs(states).expect("states of the batch");
        open(200_000).generate_batch(&encoded, &options, Controls::default()).expect("generates");
    }
    let task = Task::FeatureExtraction(Features::default());
    let features = exported_as("tiny-balanced", "features", Export::default().task(task));
    let limits = Limits::default().max_source_bytes(10_000);
    let encoder = Encoder::open_with(features, &OpenOptions::default().limits(limits)).expect("the model opens");
    let batch = Batch::padded(&[vec![5; 90]], 0).expect("valid");
    let error = encoder.encode(&batch, &Cancellation::new()).expect_err("too long").to_string();
    assert!(error.contains("found 90 tokens, which need about"), "{error}");
}
