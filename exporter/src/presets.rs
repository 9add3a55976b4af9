//! The configurations of Google's checkpoints, to measure a size without downloading its weights.

/// Name and `config.json` of each size, of T5Gemma and then of T5Gemma 2. Names have the encoder first.
pub const PRESETS: &[(&str, &str)] = &[
    ("s-s", include_str!("../presets/s-s.json")),
    ("b-b", include_str!("../presets/b-b.json")),
    ("l-l", include_str!("../presets/l-l.json")),
    ("ml-ml", include_str!("../presets/ml-ml.json")),
    ("xl-xl", include_str!("../presets/xl-xl.json")),
    ("2b-2b", include_str!("../presets/2b-2b.json")),
    ("9b-2b", include_str!("../presets/9b-2b.json")),
    ("9b-9b", include_str!("../presets/9b-9b.json")),
    ("270m-270m", include_str!("../presets/270m-270m.json")),
    ("1b-1b", include_str!("../presets/1b-1b.json")),
    ("4b-4b", include_str!("../presets/4b-4b.json")),
];

/// The `config.json` of a size in [`PRESETS`].
pub fn preset(name: &str) -> Option<&'static str> {
    PRESETS.iter().find(|(known, _)| *known == name).map(|(_, config)| *config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use t5gemma_graphs::config::Config;

    #[test]
    fn every_preset_is_a_valid_config() {
        for (name, config) in PRESETS {
            Config::parse(config).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }
}
