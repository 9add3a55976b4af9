//! Reference tensors that do not match the model or each other.

use std::fs;

use safetensors::serialize;
use safetensors::tensor::{Dtype, TensorView};

use super::{check_all, refused};
use crate::common::{exported, run};

/// Integer and float tensors, in addition to the source `[5, 6, 7]`, and the expected error.
struct Case {
    name: &'static str,
    whole: &'static [(&'static str, &'static [usize], &'static [i64])],
    floats: &'static [(&'static str, &'static [usize])],
    says: &'static str,
}

const FORCED: (&str, &[usize], &[i64]) = ("dec.b.forced_ids", &[1, 2], &[5, 6]);

#[test]
fn verify_names_the_tensor_that_does_not_fit() {
    let cases = [
        Case { name: "nothing", whole: &[], floats: &[], says: "--golden: expected reference tensors, found none" },
        Case {
            name: "sources outside the vocabulary",
            whole: &[("in.c.input_ids", &[1, 1], &[200]), ("in.c.attention_mask", &[1, 1], &[1])],
            floats: &[],
            says: "input_ids[0][0]: expected a token id below 200, the size of the vocabulary, found 200",
        },
        Case {
            name: "sources without a mask",
            whole: &[("in.c.input_ids", &[1, 1], &[5])],
            floats: &[],
            says: "in.c.attention_mask: expected a tensor, found none",
        },
        Case {
            name: "hidden states of another rank",
            whole: &[],
            floats: &[("enc.b.last_hidden_state", &[3])],
            says: "enc.b.last_hidden_state: expected shape [1, 3, 24], as the model computes it, found [3]",
        },
        Case {
            name: "logits of another vocabulary",
            whole: &[],
            floats: &[("dec.b.first.logits", &[1, 1, 3])],
            says: "dec.b.first.logits: expected shape [1, 1, 200], as the model computes it, found [1, 1, 3]",
        },
        Case {
            name: "logits of no position",
            whole: &[],
            floats: &[("dec.b.first.logits", &[1, 0, 200])],
            says: "dec.b.first.logits: expected shape [1, 1, 200], as the model computes it, found [1, 0, 200]",
        },
        Case {
            name: "targets for other rows",
            whole: &[("dec.b.forced_ids", &[2, 2], &[5, 6, 7, 8])],
            floats: &[],
            says: "dec.b.forced_ids: expected shape [1, 2], as the model computes it, found [2, 2]",
        },
        Case {
            name: "fewer logits than targets",
            whole: &[FORCED],
            floats: &[("dec.b.forced_logits", &[1, 1, 200])],
            says: "dec.b.forced_logits: expected shape [1, 2, 200], as the model computes it, found [1, 1, 200]",
        },
        Case {
            name: "a prompt longer than the targets",
            whole: &[FORCED],
            floats: &[("dec.b.prefill.logits", &[1, 4, 200])],
            says: "dec.b.prefill.logits: expected 1 to 3 positions, at most one more than in dec.b.forced_ids, found shape [1, 4",
        },
        Case {
            name: "a prompt of one axis",
            whole: &[FORCED],
            floats: &[("dec.b.prefill.logits", &[4])],
            says: "dec.b.prefill.logits: expected 1 to 3 positions, at most one more than in dec.b.forced_ids, found shape [4]",
        },
        Case {
            name: "a prompt of nothing",
            whole: &[FORCED],
            floats: &[("dec.b.prefill.logits", &[1, 0, 200])],
            says: "dec.b.prefill.logits: expected 1 to 3 positions, at most one more than in dec.b.forced_ids, found shape [1, 0",
        },
    ];
    let model = exported("tiny-untied");
    check_all(
        &cases,
        |case| case.name,
        |case| {
            let folder = tempfile::tempdir().expect("a temporary folder can be made");
            let golden = folder.path().join("golden.safetensors");
            let sources: [(&str, &[usize], &[i64]); 2] =
                [("in.b.input_ids", &[1, 3], &[5, 6, 7]), ("in.b.attention_mask", &[1, 3], &[1, 1, 1])];
            let whole = sources.iter().chain(case.whole).map(|(name, shape, numbers)| {
                let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
                (*name, Dtype::I64, shape.to_vec(), bytes)
            });
            let floats = case
                .floats
                .iter()
                .map(|(name, shape)| (*name, Dtype::F32, shape.to_vec(), vec![0; shape.iter().product::<usize>() * 4]));
            let all: Vec<_> = whole.chain(floats).collect();
            let views = all.iter().map(|(name, dtype, shape, bytes)| {
                (*name, TensorView::new(*dtype, shape.clone(), bytes).expect("shapes fit"))
            });
            fs::write(&golden, serialize(views, None).expect("tensors can be written")).expect("writable");
            let arguments = ["verify".as_ref(), model.as_path(), "--golden".as_ref(), &golden];
            refused(&run("t5gemma", arguments, ""), &[case.says])
        },
    );
}
