//! The fuzz targets without a fuzzer: over their seed corpus, which includes inputs that once failed, and over
//! reproducible mutations of it. `make fuzz` searches for new ones.

use std::fs;

#[path = "fuzz/src/lib.rs"]
mod targets;

/// The numbers of a linear congruential generator.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, count: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % count.max(1)
    }
}

/// A seed with a few bytes changed, removed, or copied in from elsewhere in it.
fn changed(seed: &[u8], numbers: &mut Numbers) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..1 + numbers.below(4) {
        let at = numbers.below(bytes.len());
        let length = numbers.below(9).min(bytes.len() - at);
        match numbers.below(5) {
            0 if !bytes.is_empty() => bytes[at] = numbers.below(256) as u8,
            1 => drop(bytes.drain(at..at + length)),
            2 => {
                let from = numbers.below(bytes.len());
                let copied = bytes[from..bytes.len().min(from + 16)].to_vec();
                bytes.splice(at..at + length, copied);
            }
            3 => drop(bytes.splice(at..at + length, *b"999999999999")),
            _ => bytes.truncate(bytes.len() - length),
        }
    }
    bytes
}

/// Runs a target over its seeds and `changes` mutations of each.
fn check_target(name: &str, changes: usize) {
    let (_, target) = targets::TARGETS.iter().find(|(target, _)| *target == name).expect("a target");
    let corpus = crate::common::tests().join("fuzz/corpus").join(name);
    let mut seeds: Vec<_> =
        fs::read_dir(&corpus).expect("it has seeds").map(|seed| seed.expect("listed").path()).collect();
    seeds.sort();
    assert!(!seeds.is_empty(), "{}", corpus.display());
    let mut numbers = Numbers(1);
    for path in seeds {
        let seed = fs::read(&path).expect("a seed can be read");
        target(&seed);
        for _ in 0..changes {
            target(&changed(&seed, &mut numbers));
        }
    }
}

macro_rules! targets {
    ($($name:ident: $changes:literal),*) => {
        $(
            #[test]
            fn $name() {
                check_target(stringify!($name), $changes);
            }
        )*

        #[test]
        fn every_target_is_run() {
            assert_eq!(targets::TARGETS.map(|(name, _)| name), [$(stringify!($name)),*]);
        }
    };
}

targets! {
    config: 300,
    checkpoint: 20,
    onnx: 300,
    model_folder: 4,
    tokenizer: 40,
    chat_template: 40,
    options: 300,
    constraints: 10,
    json_lines: 200,
    files: 100
}
