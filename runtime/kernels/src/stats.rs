//! Statistics of soft-capped logits, computed in parallel while the logits are in the cache: each row's log-sum-exp,
//! and the maximum of each block.

use std::sync::{Mutex, PoisonError};

use crate::error::Error;
use crate::isa::dispatch;
use crate::log_softmax::LogSumExp;
use crate::logits::LogitsStats;
use crate::math::{TanhStats, tanh_with_stats};
use crate::parallel::{ParallelFor, SharedSlice, part};

/// With a greater cap, the exponential of the least logit relative to the cap would not be a normal float32.
const GREATEST_CAP: f32 = 40.0;
/// Blocks of a row in a task.
const TASK_BLOCKS: usize = 16;

/// Where kernels leave the statistics of a run's logits, for its caller.
#[derive(Debug, Default)]
pub struct StatsCell(Mutex<Option<LogitsStats>>);

impl StatsCell {
    pub fn set(&self, stats: LogitsStats) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(stats);
    }

    /// Takes the statistics out.
    pub fn take(&self) -> Option<LogitsStats> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Computes the log-sum-exp of `cap · tanh(x)`, relative to the cap, which no logit exceeds.
#[derive(Clone, Copy, Debug)]
pub struct Softcap {
    /// Logits in a row.
    width: usize,
    /// `None` without a cap, or with one that is out of range.
    cap: Option<f32>,
}

impl Softcap {
    pub fn new(width: usize, cap: Option<f64>) -> Softcap {
        let cap = cap.map(|cap| cap as f32).filter(|cap| (f32::MIN_POSITIVE..=GREATEST_CAP).contains(cap));
        Softcap { width, cap }
    }

    /// Whether log-sum-exps can be computed.
    pub fn is_supported(&self) -> bool {
        self.cap.is_some()
    }

    /// Writes `tanh(x)` to `y`, and returns statistics of `cap` times it if its last axis is that of logits.
    pub fn tanh(
        &self,
        x: &[f32],
        y: &mut [f32],
        last_axis: usize,
        parallel_for: ParallelFor,
    ) -> Result<Option<LogitsStats>, Error> {
        if x.is_empty() {
            return Ok(None);
        }
        match self.cap.filter(|_| self.width == last_axis) {
            Some(cap) => tanh_of_rows(x, Some(y), self.width, cap, parallel_for).map(Some),
            None => tanh_of_rows(x, Some(y), x.len(), 1.0, parallel_for).map(|_| None),
        }
    }

    /// The log-sum-exps of `cap · tanh(x)` for rows `x [rows, width]`.
    #[cfg(target_arch = "x86_64")]
    pub fn log_sum_exps(&self, x: &[f32], width: usize, parallel_for: ParallelFor) -> Result<Vec<LogSumExp>, Error> {
        Ok(tanh_of_rows(x, None, width, self.cap_or_one(), parallel_for)?.into_log_sum_exps())
    }

    /// The part of a row's log-sum-exp that some numbers contribute.
    #[cfg(target_arch = "x86_64")]
    pub fn partial(&self, x: &[f32]) -> PartialLogSumExp {
        PartialLogSumExp::of(x, None, self.cap_or_one())
    }

    /// The log-sum-exp of a row of these parts.
    #[cfg(target_arch = "x86_64")]
    pub fn combine(&self, parts: &[PartialLogSumExp]) -> LogSumExp {
        combine(parts, self.cap_or_one())
    }

    #[cfg(target_arch = "x86_64")]
    fn cap_or_one(&self) -> f32 {
        self.cap.unwrap_or(1.0)
    }
}

/// The contribution of a part of a row to its log-sum-exp.
#[derive(Clone, Copy, Default)]
pub struct PartialLogSumExp {
    max: f32,
    /// The sum of `exp(logit − cap)`.
    exp_sum: f64,
}

impl PartialLogSumExp {
    /// Of `cap · tanh(x)`; `tanh(x)` is written to `to` if there is one.
    fn of(x: &[f32], to: Option<&mut [f32]>, cap: f32) -> PartialLogSumExp {
        let TanhStats { max, exp_sum } = tanh_of_block(x, to, cap);
        PartialLogSumExp { max: max * cap, exp_sum: exp_sum.into() }
    }
}

fn combine(parts: &[PartialLogSumExp], cap: f32) -> LogSumExp {
    let max = parts.iter().map(|part| part.max).fold(f32::NEG_INFINITY, f32::max);
    let sum = parts.iter().map(|part| part.exp_sum).sum::<f64>();
    LogSumExp { max, log_sum: (sum.ln() + f64::from(cap) - f64::from(max)) as f32 }
}

/// Writes `tanh(x)` of rows `x [rows, width]` to `y` if there is one, and returns statistics of `cap` times it.
fn tanh_of_rows(
    x: &[f32],
    y: Option<&mut [f32]>,
    width: usize,
    cap: f32,
    parallel_for: ParallelFor,
) -> Result<LogitsStats, Error> {
    let (rows, blocks) = (x.len() / width, width.div_ceil(LogitsStats::BLOCK));
    let tasks = blocks.div_ceil(TASK_BLOCKS);
    let mut partials = vec![PartialLogSumExp::default(); rows * blocks];
    let to_partials = SharedSlice::new(&mut partials);
    let y = y.map(SharedSlice::new);
    parallel_for(rows * tasks, &|task| {
        let row = task / tasks;
        for block in part(task % tasks, TASK_BLOCKS, blocks) {
            let (start, at) = (row * width, row * blocks + block);
            let in_row = part(block, LogitsStats::BLOCK, width);
            let range = start + in_row.start..start + in_row.end;
            // SAFETY: every block is computed by one task.
            unsafe {
                let to = y.map(|y| y.slice_mut(range.clone()));
                to_partials.slice_mut(at..at + 1)[0] = PartialLogSumExp::of(&x[range], to, cap);
            }
        }
    })?;
    let log_sum_exps = partials.chunks_exact(blocks).map(|partials| combine(partials, cap)).collect();
    Ok(LogitsStats::new(log_sum_exps, partials.iter().map(|partial| partial.max).collect()))
}

dispatch! {
    fn tanh_of_block(x: &[f32], to: Option<&mut [f32]>, cap: f32) -> TanhStats = tanh_with_stats
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Level;
    use crate::isa::testing::at_each_level;
    use crate::parallel::sequential;

    #[test]
    fn statistics_of_rows_are_those_of_their_definition() {
        at_each_level(Level::Generic, |level| {
            let (rows, cap) = (3, 30.0_f32);
            for width in [1, 37, 1024, 20_000] {
                let x: Vec<f32> = (0..rows * width).map(|at| ((at * 7919) % 2003) as f32 / 700.0 - 1.5).collect();
                let mut y = vec![f32::NAN; x.len()];
                let stats = |y| tanh_of_rows(&x, y, width, cap, &sequential).expect("it runs");
                let (without_y, stats) = (stats(None), stats(Some(&mut y)));
                assert_eq!(without_y, stats, "{level:?}, {width}");
                for (x, &y) in x.iter().zip(&y) {
                    assert!((f64::from(*x).tanh() - f64::from(y)).abs() < 3e-7, "{level:?}: {x}: {y}");
                }
                let logits: Vec<f32> = y.iter().map(|y| y * cap).collect();
                assert_eq!(stats, LogitsStats::of(&logits, width).rounded_as(&stats), "{level:?}, {width}");
            }
        });
    }

    #[test]
    fn nan_reaches_the_sum_of_its_row() {
        at_each_level(Level::Generic, |level| {
            let mut x = vec![0.5; 3000];
            x[2500] = f32::NAN;
            let mut y = x.clone();
            let stats = tanh_of_rows(&x, Some(&mut y), 1500, 30.0, &sequential).expect("it runs");
            let (first, second) = (stats.view().rows(0, 1), stats.view().rows(1, 1));
            assert!(first.all_finite() && !second.all_finite(), "{level:?}");
            assert!(y[2500].is_nan() && y[2499] == y[0], "{level:?}");
        });
    }

    #[test]
    fn only_rows_of_logits_have_statistics() {
        let softcap = Softcap::new(4, Some(30.0));
        let mut y = [0.0; 8];
        let tanh = |softcap: Softcap, last_axis, y: &mut [f32]| {
            softcap.tanh(&[0.5; 8], y, last_axis, &sequential).expect("it runs").map(|stats| stats.rows())
        };
        assert_eq!(tanh(softcap, 4, &mut y), Some(2));
        assert_eq!(tanh(softcap, 8, &mut y), None);
        for cap in [None, Some(50.0), Some(0.0)] {
            let softcap = Softcap::new(4, cap);
            assert!(!softcap.is_supported() && tanh(softcap, 4, &mut y).is_none(), "{cap:?}");
        }
        assert!(y.iter().all(|y| (y - 0.5_f32.tanh()).abs() < 1e-6), "{y:?}");
    }
}
