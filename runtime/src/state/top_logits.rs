//! Expands the top logits of each row, which are all that a graph for a device returns if no more is needed, to full
//! rows, so that readers of logits need no second form of them.

/// The greatest logits of a row.
pub(super) struct TopLogits<'a> {
    /// In descending order.
    pub scores: &'a [f32],
    /// The token of each score.
    pub tokens: &'a [i64],
    /// The log-sum-exp of the whole row.
    pub log_sum_exp: f32,
}

/// Fills `row` such that its greatest logits are those of `top`; all others are equal and below them, and the
/// log-sum-exp of the row is that of `top`, as far as float32 allows.
pub(super) fn expand(top: &TopLogits, row: &mut [f32]) {
    let &TopLogits { scores, tokens, log_sum_exp } = top;
    let (Some(&greatest), Some(&least)) = (scores.first(), scores.last()) else { return row.fill(f32::NAN) };
    let relative = |score: f32| (f64::from(score) - f64::from(greatest)).exp();
    let rest = relative(log_sum_exp) - scores.iter().map(|&score| relative(score)).sum::<f64>();
    let others = row.len().saturating_sub(scores.len()).max(1) as f64;
    let each = if rest > 0.0 { f64::from(greatest) + (rest / others).ln() } else { f64::from(least) - 30.0 };
    // NaN and infinity must not get lost: callers check rows for them.
    let is_finite = log_sum_exp.is_finite() && scores.iter().all(|score| score.is_finite());
    row.fill(if is_finite { (each as f32).min(least.next_down()) } else { f32::NAN });
    for (&token, &score) in tokens.iter().zip(scores) {
        if let Some(logit) = usize::try_from(token).ok().and_then(|token| row.get_mut(token)) {
            *logit = score;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log_sum_exp(row: &[f32]) -> f64 {
        row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln()
    }

    #[test]
    fn a_row_keeps_its_greatest_and_its_sum() {
        let noise = |token: usize| ((token * 7919) % 1009) as f32 / 100.0 - 5.0;
        let cases: [(&str, Vec<f32>, usize); 5] = [
            ("many others", (0..1000).map(noise).collect(), 8),
            ("one other", (0..9).map(noise).collect(), 8),
            ("none", (0..8).map(noise).collect(), 8),
            ("all alike", vec![1.5; 64], 8),
            ("one far above", (0..64).map(|token| if token == 9 { 30.0 } else { -30.0 }).collect(), 4),
        ];
        for (name, row, count) in cases {
            let mut order: Vec<usize> = (0..row.len()).collect();
            order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
            order.truncate(count);
            let scores: Vec<f32> = order.iter().map(|&token| row[token]).collect();
            let tokens: Vec<i64> = order.iter().map(|&token| token as i64).collect();
            let mut found = vec![0.0; row.len()];
            let top = TopLogits { scores: &scores, tokens: &tokens, log_sum_exp: log_sum_exp(&row) as f32 };
            expand(&top, &mut found);
            assert!((log_sum_exp(&found) - log_sum_exp(&row)).abs() < 1e-5, "{name}");
            for (token, &score) in found.iter().enumerate() {
                if order.contains(&token) {
                    assert_eq!(score, row[token], "{name}: {token}");
                } else {
                    assert!(score.is_finite() && score < scores[count - 1], "{name}: {token}");
                }
            }
        }
    }

    #[test]
    fn nan_and_infinity_stay_visible() {
        for (scores, log_sum_exp) in
            [([f32::NAN, 1.0], 2.0), ([2.0, 1.0], f32::NAN), ([f32::INFINITY, 1.0], f32::INFINITY)]
        {
            let mut row = [0.0; 8];
            expand(&TopLogits { scores: &scores, tokens: &[3, 4], log_sum_exp }, &mut row);
            assert!(row.iter().any(|score| !score.is_finite()), "{scores:?} {log_sum_exp}");
        }
    }
}
