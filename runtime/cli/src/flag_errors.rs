//! Library errors in terms of the command line: fields and options become flags, and the error a [`Usage`] error.

use serde_json::{Map, Value};
use t5gemma_runtime::options::OptionProblem;
use t5gemma_runtime::{Error, OptionError};

use crate::exit::Usage;
use crate::options::{GenerationFlags, as_flag, has_flag, in_flags};

/// The error of an option that a flag may have set.
pub fn of_flags(error: &OptionError, flags: &GenerationFlags) -> Usage {
    let name = match flags.gives(&error.option) {
        true => as_flag(&error.option),
        false => format!("generation_config.json: {}", error.option),
    };
    Usage(match &error.problem {
        OptionProblem::Expected(expected) => format!("{name}: expected {}, found {}", in_flags(expected), error.found),
        OptionProblem::Requires(required) => match in_flags(required) {
            // A flag without a value means true.
            flag if required.ends_with(" true") => format!("{name} requires {flag}"),
            required => format!("{name} requires {required} (got {})", in_flags(&error.found)),
        },
        _ => error.to_string().replacen(&error.option, &name, 1),
    })
}

/// Why a request fails, naming an option as it was given: in the request or as a flag.
pub fn of_request(error: &Error, options: &Map<String, Value>, flags: &GenerationFlags) -> String {
    match &as_option(error, |name| options.contains_key(name) || flags.gives(name)) {
        Some(error) if options.contains_key(&error.option) => format!("options.{error}"),
        Some(error) if flags.gives(&error.option) => of_flags(error, flags).to_string(),
        _ => error.to_string(),
    }
}

/// Why no text can be answered, if a flag is the cause.
pub fn of_texts(error: &Error, flags: &GenerationFlags) -> Option<Usage> {
    let error = as_option(error, |name| flags.gives(name)).filter(|error| flags.gives(&error.option))?;
    Some(of_flags(&error, flags))
}

/// The error as one about an option. Violated size limits of the model are reported as input errors; `max_length` there
/// stands for either length option.
fn as_option(error: &Error, gives: impl Fn(&str) -> bool) -> Option<OptionError> {
    match error {
        Error::Options(error) => Some(error.clone()),
        Error::Input { field, expected, found } if field == "max_length" => {
            let option = if gives("max_new_tokens") { "max_new_tokens" } else { "max_length" };
            let problem = OptionProblem::Expected(expected.clone());
            Some(OptionError { option: option.to_string(), problem, found: found.clone() })
        }
        Error::Input { field, expected, found } if has_flag(field) => {
            let problem = OptionProblem::Expected(expected.clone());
            Some(OptionError { option: field.clone(), problem, found: found.clone() })
        }
        _ => None,
    }
}

/// An error of opening a model.
pub fn of_opening(error: Error) -> anyhow::Error {
    match &error {
        Error::Input { field, expected, found } => match field.as_str() {
            "threads" | "device" | "provider" | "provider option" => {
                let flag = as_flag(&field.replace(' ', "_"));
                Usage(format!("{flag}: expected {expected}, found {found}")).into()
            }
            _ => error.into(),
        },
        Error::Requires { field, value, requirement } => {
            let flag = as_flag(&field.replace(' ', "_"));
            Usage(format!("{flag} {value} requires {requirement}")).into()
        }
        _ => error.into(),
    }
}

/// An error of an adapter that cannot be loaded.
pub fn of_adapter(error: Error) -> anyhow::Error {
    match error {
        Error::Input { expected, found, .. } => Usage(format!("--adapter: expected {expected}, found {found}")).into(),
        Error::Unsupported { what, remedy } => {
            Usage(format!("--adapter: {what}; {}", remedy.replace("lora_inputs", "--lora-inputs"))).into()
        }
        error => error.into(),
    }
}

/// An error of a model that cannot be calibrated, with the flag of the export that it needs.
pub fn of_calibration(error: Error) -> anyhow::Error {
    match error {
        Error::Unsupported { what, .. } => anyhow::anyhow!("{what}; export the model with --observe"),
        error => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use t5gemma_runtime::GenerationConfig;

    use super::*;

    #[test]
    fn errors_speak_of_what_was_typed() {
        let cases = [
            (json!({"temperature": 0.5}), "--temperature requires --do-sample"),
            (json!({"length_penalty": 0.5}), "--length-penalty requires --num-beams above 1 (got 1)"),
            (
                json!({"num_return_sequences": 2}),
                "--num-return-sequences requires --num-beams of at least 2, --do-sample or --return-alternatives",
            ),
            (json!({"num_beams": "x"}), "--num-beams: expected an integer of at least 1, found \"x\""),
        ];
        for (given, expected) in cases {
            let flags = GenerationFlags::of(given.as_object().expect("an object").clone());
            let error =
                GenerationConfig::default().with_json(given.as_object().expect("an object")).expect_err(expected);
            assert_eq!(of_flags(&error, &flags).to_string(), expected);
        }
    }

    #[test]
    fn an_option_is_named_where_it_was_given() {
        let (flags, none) =
            (GenerationFlags::of(json!({"seed": 3}).as_object().expect("an object").clone()), json!({}));
        let none = none.as_object().expect("an object");
        let given = json!({"seed": 3});
        let error =
            GenerationConfig::default().with_json(given.as_object().expect("an object")).expect_err("greedy").into();
        let other = GenerationFlags::default();
        assert_eq!(
            of_request(&error, given.as_object().expect("an object"), &other),
            "options.seed requires do_sample true (got false)"
        );
        assert_eq!(of_request(&error, none, &flags), "--seed requires --do-sample");
        assert_eq!(of_request(&error, none, &other), "seed requires do_sample true (got false)");
    }
}
