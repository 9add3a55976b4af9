//! `StopText`: cuts a text before the first stop string, as OpenAI's API does, while it arrives piece by piece.

/// A text that ends before the first stop string.
#[derive(Clone, Debug, Default)]
pub struct StopText {
    stops: Vec<String>,
    /// The end of the text that may be the beginning of a stop string.
    held: String,
    has_stopped: bool,
}

impl StopText {
    /// No text yet.
    pub fn new(stops: &[String]) -> StopText {
        StopText { stops: stops.to_vec(), ..StopText::default() }
    }

    /// Takes the next piece and returns the text that is certain to stay.
    pub fn push(&mut self, piece: &str) -> String {
        if self.has_stopped {
            return String::new();
        }
        self.held.push_str(piece);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.has_stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let may_begin = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        let end = self.held.char_indices().map(|(at, _)| at).find(may_begin).unwrap_or(self.held.len());
        let rest = self.held.split_off(end);
        std::mem::replace(&mut self.held, rest)
    }

    /// The text that was held back, once no more comes.
    pub fn finish(self) -> String {
        self.held
    }
}

/// The text before the first stop string.
pub fn cut(text: &str, stops: &[String]) -> String {
    let mut stop = StopText::new(stops);
    let start = stop.push(text);
    start + &stop.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_ends_before_a_stop_string() {
        // Stop strings, pieces, what is certain after each piece, and the rest.
        let cases = [
            (vec![], vec!["a", "b"], vec!["a", "b"], ""),
            (vec!["x"], vec!["ab", "cxd", "e"], vec!["ab", "c", ""], ""),
            (vec!["END"], vec!["aE", "N", "D b"], vec!["a", "", ""], ""),
            (vec!["END"], vec!["aE", "Nx"], vec!["a", "ENx"], ""),
            (vec!["END"], vec!["aEN"], vec!["a"], "EN"),
            (vec!["bc", "b"], vec!["abc"], vec!["a"], ""),
            (vec!["é!"], vec!["caf", "é"], vec!["caf", ""], "é"),
        ];
        for (stops, pieces, expected, rest) in cases {
            let stops: Vec<String> = stops.iter().map(|stop| stop.to_string()).collect();
            let mut stop = StopText::new(&stops);
            let found: Vec<String> = pieces.iter().map(|piece| stop.push(piece)).collect();
            assert_eq!(found, expected, "{stops:?} {pieces:?}");
            assert_eq!(stop.finish(), rest, "{stops:?} {pieces:?}");
        }
    }
}
