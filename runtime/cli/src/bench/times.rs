//! `Times`: quantiles of measured times.

use serde_json::{Value, json};

/// Times in milliseconds, sorted; never empty.
pub struct Times(Vec<f64>);

impl Times {
    /// `None` if there are no times.
    pub fn of(mut times: Vec<f64>) -> Option<Times> {
        times.sort_by(f64::total_cmp);
        (!times.is_empty()).then_some(Times(times))
    }

    /// The smallest time that at least a fraction `share` of all times do not exceed.
    pub fn quantile(&self, share: f64) -> f64 {
        let rank = (share * self.0.len() as f64).ceil() as usize;
        self.0[rank.clamp(1, self.0.len()) - 1]
    }

    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    pub fn json(&self) -> Value {
        let [min, median, p90, p99] = self.row();
        json!({"min": min, "median": median, "p90": p90, "p99": p99, "count": self.0.len()})
    }

    /// The values of [`Times::COLUMNS`].
    pub fn row(&self) -> [f64; 4] {
        [self.0[0], self.median(), self.quantile(0.9), self.quantile(0.99)]
    }

    pub const COLUMNS: [&str; 4] = ["min", "median", "p90", "p99"];
}

/// Bytes for people.
pub fn megabytes(bytes: u64) -> String {
    format!("{:.0} MB", bytes as f64 / 1e6)
}

/// The time between two moments in nanoseconds.
pub fn milliseconds(from: u64, to: u64) -> f64 {
    (to - from) as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_times_that_were_measured() {
        let times = |count: u32| Times::of((1..=count).rev().map(f64::from).collect()).expect("some times");
        assert_eq!(times(1).row(), [1.0, 1.0, 1.0, 1.0]);
        assert_eq!(times(2).row(), [1.0, 1.0, 2.0, 2.0]);
        assert_eq!(times(100).row(), [1.0, 50.0, 90.0, 99.0]);
        assert_eq!(times(1000).quantile(1.0), 1000.0);
        assert!(Times::of(Vec::new()).is_none());
    }
}
