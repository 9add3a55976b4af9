//! `adapter_config.json`: the modules that an adapter changes, their ranks and scales. Field by field, as PEFT reads them;
//! a field that changes results and is not supported is refused.

use std::collections::{BTreeMap, BTreeSet};

use regex::Regex;
use serde_json::{Map, Value};

use super::Spelling;
use crate::config::ConfigError;
use crate::json::shown;

/// What a module is to PEFT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleKind {
    /// A linear layer.
    Linear,
    /// The output head or a classifier, which `all-linear` leaves out.
    Head,
    /// An embedding.
    Embedding,
}

type Result<T> = std::result::Result<T, ConfigError>;

fn invalid(field: &str, expected: impl Into<String>, found: impl Into<String>) -> ConfigError {
    ConfigError { field: field.into(), expected: expected.into(), found: found.into() }
}

/// The settings of a LoRA adapter.
#[derive(Debug)]
pub struct AdapterConfig {
    rank: u64,
    alpha: f64,
    use_rslora: bool,
    /// By pattern, in the order of the file: the first that matches a module counts.
    rank_pattern: Vec<(Regex, f64)>,
    alpha_pattern: Vec<(Regex, f64)>,
    target: Modules,
    exclude: Option<Modules>,
    modules_to_save: Vec<Regex>,
    layers: Option<LayerFilter>,
    /// The rows of embeddings that `trainable_token_indices` names.
    token_indices: Option<TokenIndices>,
    /// What PEFT calls modules, which patterns are written for.
    spelling: Spelling,
    /// Whether modules have magnitudes.
    pub use_dora: bool,
    /// Whether modules have biases of their own.
    pub lora_bias: bool,
    /// Fields without effect here, for people.
    pub ignored: Vec<String>,
}

/// A set of modules.
#[derive(Debug)]
enum Modules {
    AllLinear,
    /// Names, or ends of names.
    Names(Vec<String>),
    /// The whole name matches.
    Pattern(Regex),
}

/// A restriction to layers by index.
#[derive(Debug)]
struct LayerFilter {
    indices: Vec<u64>,
    /// Each has the index as its first group.
    patterns: Vec<Regex>,
}

#[derive(Debug)]
enum TokenIndices {
    /// Of the encoder's embedding.
    Rows(Vec<usize>),
    /// By the end of a module's name.
    ByModule(Vec<(String, Vec<usize>)>),
}

/// Fields that say how an adapter was trained, saved or shown.
const WITHOUT_EFFECT: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// Fields of variants of LoRA that compute something else.
const UNSUPPORTED: &[&str] = &[
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];

/// Initializations that change the base weights before training.
const CHANGES_BASE: &[&str] = &["pissa", "olora", "corda", "loftq", "lora_ga"];

impl AdapterConfig {
    /// Reads the fields of `adapter_config.json`.
    ///
    /// # Errors
    /// The first field that is missing, malformed, or of another kind of adapter.
    pub fn parse(mut fields: Map<String, Value>) -> Result<AdapterConfig> {
        let kind = fields.remove("peft_type").unwrap_or_default();
        if kind != "LORA" {
            return Err(invalid("peft_type", "LORA", shown(&kind)));
        }
        for &name in UNSUPPORTED {
            if let Some(value) = fields.remove(name).filter(is_given) {
                return Err(invalid(name, "none (this variant of LoRA is not supported)", shown(&value)));
            }
        }
        let init = fields.remove("init_lora_weights").unwrap_or_default();
        if let Some(init) = init.as_str().filter(|init| CHANGES_BASE.iter().any(|name| init.starts_with(name))) {
            let expected = "an initialization that leaves the base model as it was (save the adapter with \
                            path_initial_model_for_weight_conversion)";
            return Err(invalid("init_lora_weights", expected, format!("{init:?}")));
        }
        let mut ignored = Vec::new();
        if flag(&mut fields, "fan_in_fan_out")? {
            ignored.push("fan_in_fan_out".to_string());
        }
        WITHOUT_EFFECT.iter().for_each(|&name| drop(fields.remove(name)));

        let rank = fields.remove("r").unwrap_or(8.into());
        let rank =
            rank.as_u64().filter(|&rank| rank > 0).ok_or_else(|| invalid("r", "an integer from 1", shown(&rank)))?;
        let alpha = fields.remove("lora_alpha").unwrap_or(8.into());
        let alpha = alpha.as_f64().ok_or_else(|| invalid("lora_alpha", "a number", shown(&alpha)))?;
        let indices = match fields.remove("layers_to_transform").filter(is_given_or_zero) {
            None => None,
            Some(Value::Number(index)) => Some(integers("layers_to_transform", &Value::Array(vec![index.into()]))?),
            Some(value) => Some(integers("layers_to_transform", &value)?),
        };
        let patterns = strings(&mut fields, "layers_pattern")?;
        let layers = indices.map(|indices| LayerFilter::new(indices, &patterns)).transpose()?;
        let mut target = match fields.remove("target_modules").filter(|value| !value.is_null()) {
            Some(value) => Some(Modules::parse("target_modules", &value)?),
            None => None,
        };
        // `mlp.gate_proj.weight` names the module of a parameter.
        let parameters = strings(&mut fields, "target_parameters")?;
        let of_parameters = parameters.iter().filter_map(|name| Some(name.strip_suffix(".weight")?.to_string()));
        let of_parameters: Vec<String> = of_parameters.collect();
        if of_parameters.len() < parameters.len() {
            return Err(invalid("target_parameters", "names that end in .weight", format!("{parameters:?}")));
        }
        if !of_parameters.is_empty() {
            target = match target {
                None => Some(Modules::Names(of_parameters)),
                Some(Modules::Names(names)) => Some(Modules::Names([names, of_parameters].concat())),
                Some(_) => return Err(invalid("target_parameters", "none with a pattern of target_modules", "both")),
            };
        }
        let token_indices = match fields.remove("trainable_token_indices").filter(|value| !value.is_null()) {
            None => None,
            Some(Value::Object(by_module)) => {
                let rows = by_module.into_iter().map(|(module, rows)| Ok((module, rows_of(&rows)?)));
                Some(TokenIndices::ByModule(rows.collect::<Result<_>>()?))
            }
            Some(value) => Some(TokenIndices::Rows(rows_of(&value)?)),
        };
        let target = match target {
            Some(target) => target,
            None if token_indices.is_some() => Modules::Names(Vec::new()),
            None => return Err(invalid("target_modules", "module names or a pattern", "null")),
        };
        if layers.is_some() && !matches!(target, Modules::Names(_)) {
            return Err(invalid("layers_to_transform", "none with a pattern of target_modules", "both"));
        }
        let exclude = match fields.remove("exclude_modules").filter(is_given) {
            Some(value) => Some(Modules::parse("exclude_modules", &value)?),
            None => None,
        };
        let modules_to_save = strings(&mut fields, "modules_to_save")?.into_iter();
        let modules_to_save =
            modules_to_save.map(|name| pattern("modules_to_save", &format!(r"^(?:|.*\.){name}(?:$|\..*)")));
        let config = AdapterConfig {
            rank,
            alpha,
            use_rslora: flag(&mut fields, "use_rslora")?,
            rank_pattern: patterns_of(&mut fields, "rank_pattern")?,
            alpha_pattern: patterns_of(&mut fields, "alpha_pattern")?,
            target,
            exclude,
            modules_to_save: modules_to_save.collect::<Result<_>>()?,
            layers,
            token_indices,
            spelling: Spelling::default(),
            use_dora: flag(&mut fields, "use_dora")?,
            lora_bias: flag(&mut fields, "lora_bias")?,
            ignored: Vec::new(),
        };
        ignored.extend(fields.into_iter().filter(|(_, value)| is_given(value)).map(|(name, _)| name));
        Ok(AdapterConfig { ignored, ..config })
    }

    /// The settings with this spelling of modules' names, that of the adapter's tensors.
    pub fn spelled(self, spelling: &Spelling) -> AdapterConfig {
        AdapterConfig { spelling: spelling.clone(), ..self }
    }

    /// The modules that the adapter changes by products of low rank.
    pub fn modules(&self, all: &BTreeMap<String, ModuleKind>) -> BTreeSet<String> {
        let is_target = |name: &str, kind: ModuleKind| {
            let is_excluded = self.exclude.as_ref().is_some_and(|modules| modules.contains(name, kind));
            let is_saved = self.modules_to_save.iter().any(|saved| saved.is_match(name));
            if is_excluded || is_saved || !self.target.contains(name, kind) {
                return false;
            }
            // As in PEFT, a name that is given in full counts in every layer.
            let is_exact = matches!(&self.target, Modules::Names(names) if names.iter().any(|given| given == name));
            is_exact || self.layers.as_ref().is_none_or(|layers| layers.contains(name))
        };
        let is_target = |(name, kind): &(&String, &ModuleKind)| is_target(&self.spelling.of_module(name), **kind);
        all.iter().filter(is_target).map(|(name, _)| name.clone()).collect()
    }

    /// The rank that a module must have.
    pub fn rank_of(&self, module: &str) -> u64 {
        first_match(&self.rank_pattern, &self.spelling.of_module(module)).map_or(self.rank, |rank| rank as u64)
    }

    /// The factor of a module's product.
    pub fn scale_of(&self, module: &str) -> f64 {
        let alpha = first_match(&self.alpha_pattern, &self.spelling.of_module(module)).unwrap_or(self.alpha);
        let rank = self.rank_of(module) as f64;
        alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }

    /// The rows of an embedding that the adapter replaces.
    pub fn token_rows_of(&self, module: &str) -> Option<&[usize]> {
        let module = &self.spelling.of_module(module);
        match self.token_indices.as_ref()? {
            TokenIndices::Rows(rows) => Some(rows),
            TokenIndices::ByModule(by_module) => {
                let is_of = |name: &str| module == name || module.ends_with(&format!(".{name}"));
                by_module.iter().find(|(name, _)| is_of(name)).map(|(_, rows)| rows.as_slice())
            }
        }
    }

    /// The rank and alpha of modules without their own.
    pub fn defaults(&self) -> (u64, f64) {
        (self.rank, self.alpha)
    }
}

impl Modules {
    fn parse(field: &str, value: &Value) -> Result<Modules> {
        match value {
            Value::String(text) if text.eq_ignore_ascii_case("all-linear") => Ok(Modules::AllLinear),
            Value::String(text) => Ok(Modules::Pattern(pattern(field, &format!("^(?:{text})$"))?)),
            Value::Array(names) => {
                let names = names.iter().map(|name| name.as_str().map(str::to_string));
                let names: Option<Vec<String>> = names.collect();
                names.map(Modules::Names).ok_or_else(|| invalid(field, "names", shown(value)))
            }
            _ => Err(invalid(field, "module names or a pattern", shown(value))),
        }
    }

    fn contains(&self, name: &str, kind: ModuleKind) -> bool {
        match self {
            Modules::AllLinear => kind == ModuleKind::Linear,
            Modules::Pattern(pattern) => pattern.is_match(name),
            Modules::Names(names) => names
                .iter()
                .any(|given| name == given || name.strip_suffix(given).is_some_and(|rest| rest.ends_with('.'))),
        }
    }
}

impl LayerFilter {
    fn new(indices: Vec<usize>, patterns: &[String]) -> Result<LayerFilter> {
        let patterns = match patterns {
            [] => vec![pattern("layers_pattern", r"^.*?\.[^.]*\.(\d+)\.")?],
            patterns => {
                let of_layer = |text: &String| pattern("layers_pattern", &format!(r"^(?:|.*?\.){text}\.(\d+)\."));
                patterns.iter().map(of_layer).collect::<Result<_>>()?
            }
        };
        Ok(LayerFilter { indices: indices.into_iter().map(|index| index as u64).collect(), patterns })
    }

    fn contains(&self, module: &str) -> bool {
        let found = self.patterns.iter().find_map(|pattern| pattern.captures(module));
        let index = found.and_then(|found| found.get(1)?.as_str().parse().ok());
        index.is_some_and(|index| self.indices.contains(&index))
    }
}

/// Whether a value is other than null, false or empty.
fn is_given(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(values) => !values.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    }
}

fn is_given_or_zero(value: &Value) -> bool {
    is_given(value) || value.is_number()
}

fn flag(fields: &mut Map<String, Value>, name: &str) -> Result<bool> {
    match fields.remove(name) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(flag),
        Some(value) => Err(invalid(name, "true or false", shown(&value))),
    }
}

/// A text or a list of texts.
fn strings(fields: &mut Map<String, Value>, name: &str) -> Result<Vec<String>> {
    match fields.remove(name) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(text)) => Ok(vec![text]),
        Some(value) => serde_json::from_value(value.clone()).map_err(|_| invalid(name, "names", shown(&value))),
    }
}

fn integers(name: &str, value: &Value) -> Result<Vec<usize>> {
    serde_json::from_value(value.clone()).map_err(|_| invalid(name, "integers from 0", shown(value)))
}

fn rows_of(value: &Value) -> Result<Vec<usize>> {
    integers("trainable_token_indices", value)
}

/// Numbers by pattern, in the order of the file.
fn patterns_of(fields: &mut Map<String, Value>, name: &str) -> Result<Vec<(Regex, f64)>> {
    let by_pattern = match fields.remove(name) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(by_pattern)) => by_pattern,
        Some(value) => return Err(invalid(name, "an object of numbers by pattern", shown(&value))),
    };
    let entry = |(text, value): (String, Value)| {
        let field = format!("{name}[{text:?}]");
        let number = value.as_f64().filter(|number| *number > 0.0 || name == "alpha_pattern");
        let number = number.ok_or_else(|| invalid(&field, "a number above 0", shown(&value)))?;
        Ok((pattern(&field, &format!(r"^(?:.*\.)?(?:{text})$"))?, number))
    };
    by_pattern.into_iter().map(entry).collect()
}

fn pattern(field: &str, text: &str) -> Result<Regex> {
    Regex::new(text).map_err(|error| {
        let reason = error.to_string();
        let reason = reason.lines().last().unwrap_or_default().trim_start_matches("error: ").to_string();
        invalid(field, "a regular expression without look-around", reason)
    })
}

fn first_match(patterns: &[(Regex, f64)], module: &str) -> Option<f64> {
    patterns.iter().find(|(pattern, _)| pattern.is_match(module)).map(|(_, number)| *number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(fields: Value) -> Result<AdapterConfig> {
        let Value::Object(mut given) = fields else { panic!("an object") };
        given.entry("peft_type").or_insert("LORA".into());
        AdapterConfig::parse(given)
    }

    fn all() -> BTreeMap<String, ModuleKind> {
        let mut all = BTreeMap::new();
        for side in ["encoder", "decoder"] {
            all.insert(format!("model.{side}.embed_tokens"), ModuleKind::Embedding);
            for layer in 0..2 {
                for module in ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"] {
                    all.insert(format!("model.{side}.layers.{layer}.{module}"), ModuleKind::Linear);
                }
            }
        }
        all.insert("lm_head.out_proj".into(), ModuleKind::Head);
        all
    }

    fn chosen(fields: Value) -> Vec<String> {
        parse(fields).expect("valid").modules(&all()).into_iter().collect()
    }

    #[test]
    fn modules_are_chosen_as_peft_chooses_them() {
        let ends = |end: &str, layers: &[u32]| -> Vec<String> {
            let of = |side: &str| -> Vec<String> {
                layers.iter().map(|layer| format!("model.{side}.layers.{layer}.{end}")).collect()
            };
            [of("decoder"), of("encoder")].concat()
        };
        assert_eq!(chosen(json!({"target_modules": ["q_proj"]})), ends("self_attn.q_proj", &[0, 1]));
        assert_eq!(chosen(json!({"target_modules": ["proj"]})), [""; 0], "ends of names count at a dot");
        assert_eq!(chosen(json!({"target_modules": "all-linear"})).len(), 12);
        assert_eq!(chosen(json!({"target_modules": ".*encoder.*q_proj"})).len(), 2);
        assert_eq!(chosen(json!({"target_modules": "q_proj"})), [""; 0], "a pattern matches the whole name");
        assert_eq!(chosen(json!({"target_modules": ["out_proj"]})), ["lm_head.out_proj"]);
        assert_eq!(
            chosen(json!({"target_modules": ["q_proj"], "layers_to_transform": 1})),
            ends("self_attn.q_proj", &[1])
        );
        assert_eq!(
            chosen(json!({"target_modules": ["q_proj"], "layers_to_transform": 0})),
            ends("self_attn.q_proj", &[0])
        );
        let one_side =
            json!({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "encoder.layers"});
        assert_eq!(chosen(one_side), ["model.encoder.layers.0.self_attn.q_proj"]);
        let without = json!({"target_modules": ["q_proj", "o_proj"], "exclude_modules": ".*o_proj"});
        assert_eq!(chosen(without), ends("self_attn.q_proj", &[0, 1]));
        let saved = json!({"target_modules": ["embed_tokens", "out_proj"], "modules_to_save": ["lm_head"]});
        assert_eq!(chosen(saved), ["model.decoder.embed_tokens", "model.encoder.embed_tokens"]);
        assert_eq!(chosen(json!({"target_parameters": ["mlp.up_proj.weight"]})), ends("mlp.up_proj", &[0, 1]));
    }

    #[test]
    fn the_first_pattern_that_matches_counts() {
        let config = parse(json!({
            "target_modules": ["q_proj"], "r": 4, "lora_alpha": 8,
            "rank_pattern": {"q_proj": 2, "layers\\.0\\.self_attn\\.q_proj": 16},
            "alpha_pattern": {"encoder\\.layers\\.0\\.self_attn\\.q_proj": 12},
        }))
        .expect("valid");
        assert_eq!(config.rank_of("model.encoder.layers.0.self_attn.q_proj"), 2);
        assert_eq!(config.rank_of("model.encoder.layers.0.self_attn.o_proj"), 4);
        assert_eq!(config.scale_of("model.encoder.layers.0.self_attn.q_proj"), 6.0);
        assert_eq!(config.scale_of("model.encoder.layers.0.self_attn.o_proj"), 2.0);
        let stable = parse(json!({"target_modules": ["q_proj"], "r": 16, "lora_alpha": 8, "use_rslora": true}));
        assert_eq!(stable.expect("valid").scale_of("x"), 2.0);
    }

    #[test]
    fn rows_of_embeddings_are_named_by_module() {
        let list = parse(json!({"trainable_token_indices": [3, 5]})).expect("valid");
        assert_eq!(list.token_rows_of("model.encoder.embed_tokens"), Some(&[3, 5][..]));
        let by_module = parse(json!({"trainable_token_indices": {"embed_tokens": [7]}})).expect("valid");
        assert_eq!(by_module.token_rows_of("model.decoder.embed_tokens"), Some(&[7][..]));
        assert_eq!(by_module.token_rows_of("model.decoder.norm"), None);
    }

    #[test]
    fn other_adapters_are_refused_by_field() {
        for (fields, field, expected) in [
            (json!({"peft_type": "IA3", "target_modules": ["q_proj"]}), "peft_type", "LORA"),
            (json!({"target_modules": null}), "target_modules", "module names or a pattern"),
            (json!({"target_modules": 5}), "target_modules", "module names or a pattern"),
            (json!({"target_modules": ["q_proj"], "r": 0}), "r", "an integer from 1"),
            (json!({"target_modules": ["q_proj"], "use_dora": "yes"}), "use_dora", "true or false"),
            (
                json!({"target_modules": ["q_proj"], "use_qalora": true}),
                "use_qalora",
                "none (this variant of LoRA is not supported)",
            ),
            (json!({"target_modules": "(?=q)x"}), "target_modules", "a regular expression without look-around"),
            (json!({"target_modules": ["q"], "rank_pattern": {"a": "b"}}), "rank_pattern[\"a\"]", "a number above 0"),
        ] {
            let error = parse(fields.clone()).expect_err(field);
            assert_eq!((error.field.as_str(), error.expected.as_str()), (field, expected), "{fields}");
        }
        let init = parse(json!({"target_modules": ["q"], "init_lora_weights": "pissa_niter_4"}))
            .expect_err("changes the base");
        assert_eq!(init.field, "init_lora_weights");
        let config = parse(json!({"target_modules": ["q"], "fan_in_fan_out": true, "new_field": 3, "other": null}));
        assert_eq!(config.expect("valid").ignored, ["fan_in_fan_out", "new_field"]);
    }
}
