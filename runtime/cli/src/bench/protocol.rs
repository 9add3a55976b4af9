//! Request file in, response file out, so that one benchmark harness can compare several runtimes. The request defines
//! the cases, their operations and repeats; the harness evaluates the times.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Map, Value, json};
use t5gemma_protocol::{abbreviated, parse_object};
use t5gemma_runtime::{Batch, Cancellation, Error, Limits, Model};

use super::Case;
use super::machine::{Processors, now_ns};
use crate::exit::Outcome;
use crate::exit::Usage;
use crate::files;
use crate::opening::Opening;
use crate::progress::counter;
use crate::stderr::note;
use crate::tensors::{Aside, write_text};

/// The version of requests and responses.
const PROTOCOL: u64 = 1;
/// A run is repeated if other processes used more than this share of the machine.
const MOST_FOREIGN: f64 = 0.08;

/// Runs the cases of the file `request` and writes the file `response`.
pub fn run(mut opening: Opening, request: &Path, response: &Path, cancel: &Cancellation) -> Result<Outcome> {
    let text = files::read_text(request)?;
    let request = Request::parse(&text).with_context(|| request.display().to_string())?;
    // Fail before computing anything if the file cannot be written.
    let file = Aside::create(response)?;
    opening.runtime.threads = request.threads;
    opening.limits = Limits::NONE;
    let model = opening.open().map_err(|error| match error.downcast::<Usage>() {
        // The request sets the number of threads, not a flag.
        Ok(usage) if request.threads.is_some() => anyhow!("{}", usage.to_string().trim_start_matches('-')),
        Ok(usage) => usage.into(),
        Err(error) => error,
    })?;
    let loaded = now_ns();
    let first = &request.cases[0];
    let case = request.case(first, &model).with_context(|| format!("cases[0] ({})", first.id))?;
    case.generate(&model, 1, cancel)?;
    let first_token = now_ns();

    let mut gate = request.gate;
    let mut outcome = Outcome::Done;
    let done = counter("cases", false);
    let mut cases = Vec::with_capacity(request.cases.len());
    for planned in &request.cases {
        let mut result = Map::from_iter([("id".to_string(), planned.id.clone())]);
        result.extend(["encode", "ttft", "generate"].map(|op| (op.to_string(), json!([]))));
        let run = request.case(planned, &model).and_then(|case| run_case(&model, planned, &case, &mut gate, cancel));
        match run {
            Ok(fields) => result.extend(fields),
            Err(error) if matches!(error.downcast_ref(), Some(Error::Cancelled)) => return Err(error),
            Err(error) => {
                done.suspend(|| note!("t5gemma: case {}: {error:#}", planned.id));
                result.insert("error".into(), format!("{error:#}").into());
                outcome = Outcome::SomeFailed;
            }
        }
        cases.push(Value::Object(result));
        done.inc(1);
    }
    done.finish_and_clear();
    let manifest = model.manifest();
    let response = json!({
        "protocol": PROTOCOL,
        "peer": "t5gemma",
        "version": format!("t5gemma {}", env!("CARGO_PKG_VERSION")),
        "notes": format!("{}, {}", manifest.target, manifest.dtype),
        "load": {"loaded_ns": loaded, "first_token_ns": first_token},
        "cases": cases,
    });
    write_text(file, &response.to_string())?;
    Ok(outcome)
}

/// Runs the operations of a case and returns the fields of its result.
fn run_case(
    model: &Model,
    planned: &Planned,
    case: &Case,
    gate: &mut Gate,
    cancel: &Cancellation,
) -> Result<Map<String, Value>> {
    let mut fields = Map::new();
    for &(op, repeats) in &planned.ops {
        op.run(model, case, op.warm_up(case), cancel)?;
        let (mut runs, mut last) = (Vec::new(), None);
        let mut undisturbed = 0;
        while undisturbed < repeats && (runs.len() as u64) < repeats.saturating_mul(planned.tries) {
            if !gate.has_time() && runs.len() as u64 >= repeats {
                break;
            }
            gate.wait(cancel)?;
            let before = Processors::now();
            let run = op.run(model, case, case.tokens, cancel)?;
            let foreign = Processors::now().zip(before).map(|(after, before)| after.foreign_since(&before));
            undisturbed += u64::from(foreign.is_none_or(|foreign| foreign < MOST_FOREIGN));

            let mut fields = json!({"start_ns": run.start, "end_ns": run.end});
            if let Some(foreign) = foreign {
                fields["foreign"] = foreign.into();
            }
            if op == Op::Generate {
                fields["steps_ns"] = json!(run.steps);
            }
            runs.push(fields);
            last = Some(run);
        }
        fields.insert(op.name().into(), runs.into());
        if let (Op::Generate, Some(run)) = (op, last) {
            let best: Vec<_> = run.rows.iter().filter_map(|hypotheses| hypotheses.first()).collect();
            fields.insert("ids".into(), best.iter().map(|hypothesis| json!(hypothesis.tokens)).collect());
            let scores: Option<Vec<f32>> = best.iter().map(|hypothesis| hypothesis.score).collect();
            fields.insert("scores".into(), json!(scores));
        }
    }
    Ok(fields)
}

/// An operation to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    /// Token ids to the encoder's hidden states.
    Encode,
    /// Everything for one new token.
    FirstToken,
    /// Everything for all new tokens.
    Generate,
}

impl Op {
    fn name(self) -> &'static str {
        match self {
            Op::Encode => "encode",
            Op::FirstToken => "ttft",
            Op::Generate => "generate",
        }
    }

    /// Number of tokens to generate in the warm-up run.
    fn warm_up(self, case: &Case) -> usize {
        case.tokens.min(2)
    }

    fn run(self, model: &Model, case: &Case, tokens: usize, cancel: &Cancellation) -> Result<super::Generated, Error> {
        match self {
            Op::Encode => {
                let start = now_ns();
                model.encode(&case.batch, cancel)?;
                Ok(super::Generated { start, end: now_ns(), steps: Vec::new(), rows: Vec::new() })
            }
            Op::FirstToken => case.generate(model, 1, cancel),
            Op::Generate => case.generate(model, tokens, cancel),
        }
    }
}

/// Waits until other processes leave the machine idle.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Gate {
    /// Maximum share of the machine in use.
    busy: f64,
    /// Maximum seconds to wait before a run.
    max_wait: f64,
    /// Seconds left for all runs.
    total_wait: f64,
}

impl Gate {
    fn has_time(&self) -> bool {
        self.total_wait > 0.0
    }

    fn wait(&mut self, cancel: &Cancellation) -> Result<(), Error> {
        let start = Instant::now();
        while self.has_time() && start.elapsed().as_secs_f64() < self.max_wait {
            let Some(before) = Processors::now() else { return Ok(()) };
            let looked = Instant::now();
            thread::sleep(Duration::from_millis(120));
            let is_quiet = Processors::now().is_none_or(|after| after.busy_since(&before) <= self.busy);
            if !is_quiet {
                thread::sleep(Duration::from_millis(100));
            }
            self.total_wait -= looked.elapsed().as_secs_f64();
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            if is_quiet {
                break;
            }
        }
        Ok(())
    }
}

/// A request, checked as far as possible without a model.
#[derive(Debug, PartialEq)]
struct Request {
    threads: Option<usize>,
    /// The token ids default to the model's.
    decoder_start_token_id: Option<i64>,
    eos_token_id: Option<i64>,
    pad_token_id: Option<i64>,
    gate: Gate,
    /// Never empty.
    cases: Vec<Planned>,
}

/// A case of a request.
#[derive(Debug, PartialEq)]
struct Planned {
    id: Value,
    sources: Vec<Vec<i64>>,
    num_beams: usize,
    tokens: usize,
    /// In order, each with its number of timed runs.
    ops: Vec<(Op, u64)>,
    /// Disturbed runs are repeated, up to this multiple of the number of runs.
    tries: u64,
}

/// Default number of timed runs of an operation, and default of `tries`.
const RUNS: u64 = 3;

/// Whether a text is a request.
pub fn check(text: &str) -> Result<()> {
    Request::parse(text).map(drop)
}

impl Request {
    fn parse(text: &str) -> Result<Request> {
        let document = Value::Object(parse_object(text)?);
        let mut top = Fields::of("", &document)?;
        let protocol = top.required("protocol")?.whole(0)?;
        ensure!(protocol == PROTOCOL, "protocol: expected {PROTOCOL}, found {protocol}");
        let threads = top.optional("threads").map(|threads| threads.whole(1)).transpose()?;
        let mut token = |name| top.optional(name).map(|id| id.whole(0)).transpose();
        let [start, eos, pad] = [token("decoder_start_token_id")?, token("eos_token_id")?, token("pad_token_id")?];
        let gate = match top.optional("gate") {
            None => Gate::default(),
            Some(gate) => {
                let mut gate = Fields::of(&gate.path, gate.value)?;
                let mut number = |name, absent: f64| gate.optional(name).map_or(Ok(absent), |field| field.number());
                let (busy, max_wait, total_wait) =
                    (number("busy", 1.0)?, number("max_wait_s", 0.0)?, number("total_wait_s", 0.0)?);
                gate.nothing_else()?;
                Gate { busy, max_wait, total_wait }
            }
        };
        let cases = top.required("cases")?;
        let listed = cases.list()?;
        ensure!(!listed.is_empty(), "cases: expected at least one, found none");
        let cases = listed.into_iter().map(Planned::parse).collect::<Result<Vec<_>>>()?;
        // For other runtimes: where their models are, and when they were started.
        for name in ["model", "paths", "t0_ns"] {
            top.optional(name);
        }
        top.nothing_else()?;
        let id = |id: Option<u64>| id.map(|id| id as i64);
        Ok(Request {
            threads: threads.map(|threads| threads as usize),
            decoder_start_token_id: id(start),
            eos_token_id: id(eos),
            pad_token_id: id(pad),
            gate,
            cases,
        })
    }

    /// The case to run: plain greedy or beam search.
    fn case(&self, planned: &Planned, model: &Model) -> Result<Case> {
        let mut options = Case::options(model, planned.num_beams);
        options.decoder_start_token_id = self.decoder_start_token_id.unwrap_or(options.decoder_start_token_id);
        if let Some(eos) = self.eos_token_id {
            options.eos_token_id = vec![eos];
        }
        options.pad_token_id = self.pad_token_id.unwrap_or(options.pad_token_id);
        let batch = Batch::padded(&planned.sources, options.pad_token_id)?;
        Case::new(model, batch, options, planned.tokens)
    }
}

impl Planned {
    fn parse(field: Field) -> Result<Planned> {
        let mut fields = Fields::of(&field.path, field.value)?;
        let id = fields.required("id")?.value.clone();
        let rows = fields.required("src")?.list()?;
        let row = |row: &Field| row.list()?.iter().map(|id| Ok(id.whole(0)? as i64)).collect::<Result<Vec<_>>>();
        let sources = rows.iter().map(row).collect::<Result<Vec<_>>>()?;
        let num_beams = fields.required("beams")?.whole(1)? as usize;
        let tokens = fields.required("gen")?.whole(1)? as usize;
        let tries = fields.optional("tries").map_or(Ok(RUNS), |tries| tries.whole(1))?;
        let repeats = fields.optional("repeats");
        let mut repeats = repeats.map(|repeats| Fields::of(&repeats.path, repeats.value)).transpose()?;
        let mut number = |op: Op| match repeats.as_mut().and_then(|repeats| repeats.optional(op.name())) {
            Some(number) => number.whole(1),
            None => Ok(RUNS),
        };
        // Accepted for operations that are not requested too: a harness gives every case the same numbers.
        let all = [Op::Encode, Op::FirstToken, Op::Generate];
        let numbers = [number(all[0])?, number(all[1])?, number(all[2])?];
        if let Some(repeats) = repeats {
            repeats.nothing_else()?;
        }
        let ops = fields.required("ops")?.list()?;
        let ops = ops.iter().map(|op| match all.iter().position(|known| op.value == known.name()) {
            Some(known) => Ok((all[known], numbers[known])),
            None => Err(op.unlike("encode, ttft or generate")),
        });
        let ops = ops.collect::<Result<Vec<_>>>()?;
        fields.nothing_else()?;
        Ok(Planned { id, sources, num_beams, tokens, ops, tries })
    }
}

/// An object whose fields are taken one by one; those left over are unknown.
struct Fields<'a> {
    path: String,
    left: Vec<(&'a String, &'a Value)>,
}

/// A value and its path.
struct Field<'a> {
    path: String,
    value: &'a Value,
}

impl<'a> Fields<'a> {
    fn of(path: &str, value: &'a Value) -> Result<Fields<'a>> {
        match value {
            Value::Object(fields) => Ok(Fields { path: path.to_string(), left: fields.iter().collect() }),
            value if path.is_empty() => bail!("expected a JSON object, found {}", abbreviated(value)),
            value => Err(Field { path: path.to_string(), value }.unlike("an object")),
        }
    }

    fn optional(&mut self, name: &str) -> Option<Field<'a>> {
        let at = self.left.iter().position(|(known, _)| *known == name)?;
        Some(Field { path: self.path_of(name), value: self.left.remove(at).1 }).filter(|field| !field.value.is_null())
    }

    fn required(&mut self, name: &str) -> Result<Field<'a>> {
        self.optional(name).with_context(|| format!("{}: missing", self.path_of(name)))
    }

    fn nothing_else(&self) -> Result<()> {
        match self.left.first() {
            Some((name, _)) => bail!("{}: unknown field", self.path_of(name)),
            None => Ok(()),
        }
    }

    fn path_of(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) }
    }
}

impl<'a> Field<'a> {
    fn whole(&self, least: u64) -> Result<u64> {
        // At most i64::MAX, since token ids are signed.
        let number = self.value.as_i64().and_then(|number| u64::try_from(number).ok());
        number.filter(|&number| number >= least).ok_or_else(|| self.unlike(&format!("an integer of at least {least}")))
    }

    fn number(&self) -> Result<f64> {
        self.value.as_f64().filter(|number| *number >= 0.0).ok_or_else(|| self.unlike("a number of at least 0"))
    }

    fn list(&self) -> Result<Vec<Field<'a>>> {
        let list = self.value.as_array().ok_or_else(|| self.unlike("a list"))?;
        let entry = |(index, value)| Field { path: format!("{}[{index}]", self.path), value };
        Ok(list.iter().enumerate().map(entry).collect())
    }

    fn unlike(&self, expected: &str) -> anyhow::Error {
        anyhow::anyhow!("{}: expected {expected}, found {}", self.path, abbreviated(self.value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Value {
        json!({
            "protocol": 1, "model": "s-s", "threads": 2, "paths": {"other": "folder"}, "decoder_start_token_id": 2,
            "eos_token_id": 1, "pad_token_id": 0, "t0_ns": 12345,
            "gate": {"busy": 0.25, "max_wait_s": 15, "total_wait_s": 150.5},
            "cases": [{"id": "ragged", "src": [[5, 6, 7], [8]], "beams": 4, "gen": 64, "ops": ["generate", "encode"],
                "repeats": {"encode": 5, "ttft": 3, "generate": 2}, "tries": 7}],
        })
    }

    #[test]
    fn a_request_is_read_as_it_stands() {
        let planned = Planned {
            id: "ragged".into(),
            sources: vec![vec![5, 6, 7], vec![8]],
            num_beams: 4,
            tokens: 64,
            ops: vec![(Op::Generate, 2), (Op::Encode, 5)],
            tries: 7,
        };
        let expected = Request {
            threads: Some(2),
            decoder_start_token_id: Some(2),
            eos_token_id: Some(1),
            pad_token_id: Some(0),
            gate: Gate { busy: 0.25, max_wait: 15.0, total_wait: 150.5 },
            cases: vec![planned],
        };
        assert_eq!(Request::parse(&request().to_string()).expect("well-formed"), expected);
    }

    #[test]
    fn what_may_be_left_out_has_a_meaning() {
        let shortest =
            json!({"protocol": 1, "cases": [{"id": 0, "src": [[5]], "beams": 1, "gen": 1, "ops": ["ttft"]}]});
        let request = Request::parse(&shortest.to_string()).expect("well-formed");
        assert_eq!((request.threads, request.eos_token_id, request.gate), (None, None, Gate::default()));
        assert_eq!((request.cases[0].ops.as_slice(), request.cases[0].tries), ([(Op::FirstToken, 3)].as_slice(), 3));
    }

    #[test]
    fn a_malformed_request_is_refused_by_field() {
        let changed = |pointer: &str, value: Value| {
            let mut request = request();
            let (parent, name) = pointer.rsplit_once('/').expect("a pointer has a slash");
            request.pointer_mut(parent).expect("there is such a place")[name] = value;
            request.to_string()
        };
        let cases = [
            ("".to_string(), "expected JSON: column 0: EOF"),
            ("[]".to_string(), "expected a JSON object, found []"),
            ("{}".to_string(), "protocol: missing"),
            (changed("/protocol", json!(2)), "protocol: expected 1, found 2"),
            (changed("/threads", json!(0)), "threads: expected an integer of at least 1, found 0"),
            (changed("/gate", json!(5)), "gate: expected an object, found 5"),
            (changed("/gate/busy", json!(-1)), "gate.busy: expected a number of at least 0, found -1"),
            (changed("/gate/wait", json!(1)), "gate.wait: unknown field"),
            (changed("/eos_token_id", json!([1])), "eos_token_id: expected an integer of at least 0, found [1]"),
            (changed("/cases", json!([])), "cases: expected at least one, found none"),
            (changed("/cases", json!([[]])), "cases[0]: expected an object, found []"),
            (changed("/cases/0/id", Value::Null), "cases[0].id: missing"),
            (changed("/cases/0/src", json!([5])), "cases[0].src[0]: expected a list, found 5"),
            (changed("/cases/0/src", json!([[5, "a"]])), "cases[0].src[0][1]: expected an integer of at least 0"),
            (changed("/cases/0/src", json!([[u64::MAX]])), "cases[0].src[0][0]: expected an integer of at least 0"),
            (changed("/cases/0/beams", json!(0)), "cases[0].beams: expected an integer of at least 1, found 0"),
            (changed("/cases/0/gen", json!(1.5)), "cases[0].gen: expected an integer of at least 1, found 1.5"),
            (changed("/cases/0/ops", json!(["decode"])), "cases[0].ops[0]: expected encode, ttft or generate, found"),
            (
                changed("/cases/0/repeats/encode", json!(0)),
                "cases[0].repeats.encode: expected an integer of at least 1",
            ),
            (changed("/cases/0/repeats/decode", json!(1)), "cases[0].repeats.decode: unknown field"),
            (changed("/cases/0/beam", json!(1)), "cases[0].beam: unknown field"),
            (changed("/repeats", json!(1)), "repeats: unknown field"),
        ];
        for (text, expected) in cases {
            let error = format!("{:#}", Request::parse(&text).expect_err(expected));
            assert!(error.starts_with(expected), "{error}\n{expected}");
        }
    }

    #[test]
    fn a_gate_without_time_lets_everything_through() {
        let started = Instant::now();
        let mut gate = Gate { busy: 0.0, max_wait: 60.0, total_wait: 0.0 };
        gate.wait(&Cancellation::new()).expect("nobody cancels");
        assert!(started.elapsed() < Duration::from_secs(30) && !gate.has_time());
    }
}
