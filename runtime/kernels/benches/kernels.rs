//! Throughput of the CPU kernels, on one thread, in multiply-adds: quantized and float32 matrix multiplication, the
//! coarse pass over a head, attention. `make bench` runs it.

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use t5gemma_kernels::bench;

/// Rows of activations: a step, its beams, a batch, its beams, a source, an image.
const ROWS: [usize; 6] = [1, 4, 8, 32, 512, 4096];
/// Weights that stay in the caches, a head that does not, and two matrices of a vision tower.
const SHAPES: [[usize; 2]; 4] = [[1024, 512], [256_000, 512], [1152, 1152], [1152, 4304]];

fn matmul(c: &mut Criterion) {
    for [n, k] in SHAPES {
        let mut group = c.benchmark_group(format!("matmul by {n} x {k}"));
        // A whole source by the head would take seconds a run.
        for rows in ROWS.into_iter().filter(|rows| rows * n <= 16 << 20) {
            let shape = [rows, n, k];
            group.throughput(Throughput::Elements((rows * n * k) as u64));
            for (bits, block_size) in [(8, 128), (4, 32), (4, 128)] {
                group.bench_function(format!("int{bits} by {block_size}, {rows} rows"), |bencher| {
                    bencher.iter(bench::quantized_int16(shape, bits, block_size));
                });
                group.bench_function(format!("int{bits} by {block_size} in an encoder, {rows} rows"), |bencher| {
                    bencher.iter(bench::quantized_int8(shape, bits, block_size));
                });
                #[cfg(target_arch = "x86_64")]
                if let Some(mut coarse) = bench::coarse(shape, bits, block_size).filter(|_| rows <= 32) {
                    group.bench_function(format!("int{bits} by {block_size}, coarse, {rows} rows"), |bencher| {
                        bencher.iter(&mut coarse);
                    });
                }
            }
            #[cfg(target_arch = "x86_64")]
            if let Some(mut float32) = bench::float32(shape) {
                group.bench_function(format!("float32, {rows} rows"), |bencher| bencher.iter(&mut float32));
            }
        }
        group.finish();
    }
}

fn attention(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention head");
    // Heads of a decoder's or encoder's layers, and of a vision tower's.
    for (length, dim, window) in [(64, 64, None), (512, 64, None), (4096, 64, Some(512)), (4096, 72, None)] {
        let pairs = length * window.map_or(length, |window| 2 * window + 1);
        group.throughput(Throughput::Elements((2 * pairs * dim) as u64));
        let name = window.map_or(String::new(), |window| format!(" within {window}"));
        group.bench_function(format!("{length} tokens of {dim}{name}"), |bencher| {
            bencher.iter(bench::attention(length, dim, window));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(1));
    targets = matmul, attention
}
criterion_main!(benches);
