//! The JSONL contract: a request a line in, a result a line out, in order. Reading lines, what a request may hold, and how
//! requests become batches; what is done with a batch is the command's.

use std::borrow::Borrow;
use std::io::{self, BufRead, Read};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use crate::files::{self, shown};
use crate::packing::{Packing, Sources};
use crate::tensors::Tensors;
use anyhow::{Context, Result, bail, ensure};
use ndarray::{Array3, Ix2, Ix3};
use serde_json::{Map, Value, json};
use t5gemma_runtime::{Batch, Cancellation, CrossAttentions, Encoder, Logprobs, Model, Tokenizer};

/// A request as it stands on its line.
pub struct Request {
    /// `id`, or the line's number from 0 where there is none.
    pub id: Value,
    /// The sources as token ids.
    pub sources: Vec<Vec<i64>>,
    /// `attention_mask`, of the shape of `sources`; all ones where it is not given.
    pub mask: Vec<Vec<i64>>,
    /// `decoder_input_ids` or `decoder_text`, a row for each source.
    pub prompts: Option<Vec<Vec<i64>>>,
    /// `options`.
    pub options: Map<String, Value>,
    /// `target` or `target_ids`, a row for each source.
    pub targets: Vec<Vec<i64>>,
    /// What its rows draw from if they sample.
    pub seed: Option<u64>,
    /// What the encoder made of the sources before.
    pub states: Option<Array3<f32>>,
}

/// A line that is not a request: its `id` as far as it can be told, and why.
pub struct Refused {
    pub id: Value,
    pub reason: String,
}

/// A model as far as reading requests needs it.
pub trait Reader {
    /// The model's tokenizer, for requests with text.
    fn tokenizer(&self) -> Result<&Tokenizer, t5gemma_runtime::Error>;

    /// Tokenizes conversations, for requests with messages; `None` where a command does not take them.
    fn chat(&self) -> Option<&dyn Conversations> {
        None
    }

    /// The token that ends a target.
    fn end(&self) -> Option<i64> {
        None
    }

    /// Tokens of a source at most.
    fn longest_source(&self) -> usize;

    /// Tokens of a target at most.
    fn longest_target(&self) -> usize {
        0
    }
}

/// A model whose requests may be conversations.
pub trait Conversations {
    /// Whether a text is the user's turn of a conversation too.
    fn takes_texts(&self) -> bool;

    /// The token ids of a conversation.
    fn tokens(&self, messages: &[Value]) -> Result<Vec<i64>>;
}

impl Reader for Model {
    fn tokenizer(&self) -> Result<&Tokenizer, t5gemma_runtime::Error> {
        Model::tokenizer(self)
    }

    fn longest_source(&self) -> usize {
        self.facts().encoder.max_position_embeddings
    }

    fn end(&self) -> Option<i64> {
        self.generation_config().eos_token_id.first().copied()
    }

    fn longest_target(&self) -> usize {
        self.facts().decoder.max_position_embeddings
    }
}

impl Reader for Encoder {
    fn tokenizer(&self) -> Result<&Tokenizer, t5gemma_runtime::Error> {
        Encoder::tokenizer(self)
    }

    fn longest_source(&self) -> usize {
        self.facts().encoder.max_position_embeddings
    }
}

/// Bytes of a line at most; what is longer is answered by an error and not kept.
const LONGEST_LINE: usize = 256 << 20;

/// Bytes of a token, so many that no text consists of longer ones.
const LONGEST_TOKEN: usize = 256;

/// What requests may hold besides sources.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Sources only, which are cut where they are too long or not.
    Encode { truncates: bool },
    /// Sources, decoder prompts and generation options.
    Generate,
    /// Sources, decoder prompts and targets, whose texts are followed by the end token or not.
    Score { eos: bool },
}

impl Request {
    /// Makes a request of a text, which is a line of stdin or an argument. `number` counts them from 0.
    pub fn of_text(text: &[u8], number: usize, kind: Kind, model: &dyn Reader) -> Result<Request, Refused> {
        let refused = |reason| Refused { id: number.into(), reason };
        if text.len() > LONGEST_LINE {
            return Err(refused(too_long()));
        }
        let text = str::from_utf8(text).map_err(|error| refused(files::not_utf8(text, &error)))?;
        let fields = Map::from_iter([("text".to_string(), text.into())]);
        // A text's tokens are the command's business, its field a request's.
        let reason = |error: anyhow::Error| {
            let reason = format!("{error:#}");
            reason.strip_prefix("input_ids: ").or(reason.strip_prefix("text: ")).unwrap_or(&reason).to_string()
        };
        Request::of_fields(fields, number.into(), kind, model).map_err(|error| refused(reason(error)))
    }

    /// Reads a line. `number` counts lines from 0.
    pub fn parse(line: &[u8], number: usize, kind: Kind, model: &dyn Reader) -> Result<Request, Refused> {
        let mut id = Value::from(number);
        Request::read(line, &mut id, kind, model).map_err(|error| Refused { id, reason: format!("{error:#}") })
    }

    fn read(line: &[u8], id: &mut Value, kind: Kind, model: &dyn Reader) -> Result<Request> {
        ensure!(line.len() <= LONGEST_LINE, too_long());
        let line = str::from_utf8(line).map_err(|error| anyhow::Error::msg(files::not_utf8(line, &error)))?;
        let mut fields = files::object(line)?;
        match fields.remove("id") {
            None | Some(Value::Null) => {}
            // Beyond 2^53, a number is not what was written.
            Some(Value::Number(given)) if given.is_f64() && given.as_f64().is_none_or(|id| id.abs() >= EXACT) => {
                bail!("id: expected a number of fewer digits, or a string, found {given}")
            }
            Some(given @ (Value::String(_) | Value::Number(_))) => *id = given,
            Some(other) => bail!("id: expected a string or a number, found {}", shown(&other)),
        }
        Request::of_fields(fields, id.clone(), kind, model)
    }

    /// Reads the fields besides `id`.
    fn of_fields(mut fields: Map<String, Value>, id: Value, kind: Kind, model: &dyn Reader) -> Result<Request> {
        let mut take = |name: &str| fields.remove(name).filter(|value| !value.is_null());
        let chat = model.chat().filter(|_| kind == Kind::Generate);
        let messages = if chat.is_some() { take("messages") } else { None };
        let (text, ids, mask) = (take("text"), take("input_ids"), take("attention_mask"));
        let mut take_if = |is_taken: bool, name: &str| if is_taken { take(name) } else { None };
        let (decodes, generates) = (!matches!(kind, Kind::Encode { .. }), kind == Kind::Generate);
        let prompts = (take_if(decodes, "decoder_text"), take_if(decodes, "decoder_input_ids"));
        let targets = (take_if(!generates && decodes, "target"), take_if(!generates && decodes, "target_ids"));
        let options = take_if(generates, "options");
        if let Some((name, _)) = fields.iter().next() {
            let known = match kind {
                Kind::Generate => {
                    "id, text, messages, input_ids, attention_mask, decoder_text, decoder_input_ids and options"
                }
                Kind::Score { .. } => {
                    "id, text, input_ids, attention_mask, target, target_ids, decoder_text and decoder_input_ids"
                }
                Kind::Encode { .. } => "id, text, input_ids and attention_mask",
            };
            bail!("expected only the fields {known}, found {}", shown(&name.as_str().into()));
        }
        let longest = match kind {
            Kind::Encode { truncates: true } => usize::MAX,
            _ => model.longest_source(),
        };
        let tokens = |text: &str| -> Result<Vec<i64>> {
            check_size("text", text, longest)?;
            Ok(model.tokenizer()?.encode(text)?)
        };
        let sources = match (text, ids, messages, chat) {
            (Some(text), None, None, chat) => texts("text", &text)?
                .into_iter()
                .map(|text| match chat.filter(|chat| chat.takes_texts()) {
                    Some(chat) => chat.tokens(&[json!({"role": "user", "content": text})]),
                    None => tokens(text),
                })
                .collect::<Result<Vec<_>>>()?,
            (None, Some(ids), None, _) => rows("input_ids", &ids)?,
            (None, None, Some(Value::Array(messages)), Some(chat)) => vec![chat.tokens(&messages)?],
            (None, None, Some(other), _) => bail!("messages: expected a list of messages, found {}", shown(&other)),
            (None, None, None, Some(_)) => bail!("expected text, messages or input_ids, found none of them"),
            (None, None, None, None) => bail!("expected text or input_ids, found neither"),
            (Some(_), Some(_), None, _) => bail!("expected text or input_ids, found both"),
            (_, _, Some(_), _) => bail!("expected messages alone, found text or input_ids beside them"),
        };
        let mask = match mask {
            Some(mask) => rows("attention_mask", &mask)?,
            None => sources.iter().map(|source| vec![1; source.len()]).collect(),
        };
        let written = |field: &str, value: &Value| {
            let encode = |text: &str| -> Result<Vec<i64>> {
                check_size(field, text, model.longest_target())?;
                Ok(model.tokenizer()?.encode_target(text)?)
            };
            texts(field, value)?.into_iter().map(encode).collect::<Result<Vec<_>>>()
        };
        let prompts = match prompts {
            (None, None) => None,
            (Some(text), None) => {
                let prompts = written("decoder_text", &text)?;
                if let Some(other) = prompts.iter().find(|prompt| prompt.len() != prompts[0].len()) {
                    bail!(
                        "decoder_text: expected texts of equally many tokens, or a request for each, found {} and {} \
                         tokens",
                        prompts[0].len(),
                        other.len()
                    );
                }
                Some(prompts)
            }
            (None, Some(ids)) => Some(rows("decoder_input_ids", &ids)?),
            (Some(_), Some(_)) => bail!("expected decoder_text or decoder_input_ids, found both"),
        };
        let targets = match (targets, kind) {
            ((Some(text), None), _) => {
                let eos = model.end().filter(|_| kind == Kind::Score { eos: true });
                let mut targets = written("target", &text)?;
                targets.iter_mut().for_each(|target| target.extend(eos));
                targets
            }
            ((None, Some(ids)), _) => rows("target_ids", &ids)?,
            ((Some(_), Some(_)), _) => bail!("expected target or target_ids, found both"),
            ((None, None), Kind::Score { .. }) => bail!("expected target or target_ids, found neither"),
            ((None, None), _) => Vec::new(),
        };
        if matches!(kind, Kind::Score { .. }) && targets.len() != sources.len() {
            bail!("target: expected {} rows, one for each source, found {}", sources.len(), targets.len());
        }
        let options = match options {
            None => Map::new(),
            Some(Value::Object(options)) => options,
            Some(other) => bail!("options: expected an object of generation options, found {}", shown(&other)),
        };
        let request = Request { id, sources, mask, prompts, options, targets, seed: None, states: None };
        // What the library refuses of this request alone is known before it is put in a batch with others.
        batch(std::slice::from_ref(&request), 0)?;
        Ok(request)
    }

    /// Source tokens that take part.
    pub fn source_tokens(&self) -> usize {
        self.mask.iter().flatten().filter(|&&visible| visible != 0).count()
    }
}

impl Sources for Request {
    fn rows(&self) -> usize {
        self.sources.len()
    }

    fn length(&self) -> usize {
        self.sources.iter().map(Vec::len).max().unwrap_or(0)
    }
}

/// Refuses a text that is much too long, of which the tokens need not be made to know it.
pub fn check_size(field: &str, text: &str, longest: usize) -> Result<()> {
    let bytes = text.len();
    ensure!(bytes / LONGEST_TOKEN <= longest, "{field}: expected at most {longest} tokens, found {bytes} bytes");
    Ok(())
}

/// 2^53.
const EXACT: f64 = 9_007_199_254_740_992.0;

fn too_long() -> String {
    format!("expected a line of at most {} MiB, found a longer one", LONGEST_LINE >> 20)
}

/// One batch of the sources of several requests.
pub fn batch<R: Borrow<Request>>(requests: &[R], pad: i64) -> Result<Batch, t5gemma_runtime::Error> {
    let of_one = |request: &Request| {
        let (mut sources, mut mask) = (request.sources.clone(), request.mask.clone());
        // A row whose mask does not fit, or that is empty, is left as it is for the library to refuse by name.
        let fits = sources.iter().zip(&mask).all(|(source, mask)| source.len() == mask.len() && !source.is_empty());
        let length = sources.iter().map(Vec::len).max().unwrap_or(0);
        if fits {
            sources.iter_mut().for_each(|source| source.resize(length, pad));
            mask.iter_mut().for_each(|mask| mask.resize(length, 0));
        }
        let batch = Batch::masked(&sources, &mask)?;
        let batch = match request.seed {
            Some(seed) => batch.with_seed(seed),
            None => batch,
        };
        let batch = match &request.states {
            Some(states) => batch.with_encoder_outputs(states.clone())?,
            None => batch,
        };
        match &request.prompts {
            Some(prompts) => batch.with_decoder_input_ids(prompts),
            None => Ok(batch),
        }
    };
    Batch::joined(requests.iter().map(|request| of_one(request.borrow())).collect::<Result<_, _>>()?, pad)
}

/// Requests with the encoder results of a file that `t5gemma encode` has written, in the order of their ids: those that are
/// whole numbers first, by their values.
pub fn of_encoder_outputs(path: &Path) -> Result<Vec<Request>> {
    let file = Tensors::read(path)?;
    let names = file.names()?;
    let mut ids: Vec<&str> = names.iter().filter_map(|name| name.strip_suffix(".last_hidden_state")).collect();
    if ids.is_empty() {
        bail!("{}: expected tensors ID.last_hidden_state, found {}", path.display(), names.join(", "));
    }
    ids.sort_by_key(|id| (id.parse::<u64>().map_or((1, 0), |number| (0, number)), id.to_string()));
    let request = |id: &str| {
        let wrong = |what: &str, expected: &str| format!("{}: {id}.{what}: expected {expected}", path.display());
        let states = file.floats(&format!("{id}.last_hidden_state"))?;
        let states = states.and_then(|states| states.into_dimensionality::<Ix3>().ok());
        let states = states.with_context(|| wrong("last_hidden_state", "[rows, tokens, hidden size]"))?;
        let rectangle = |what: &str| -> Result<Vec<Vec<i64>>> {
            let numbers = file.whole(&format!("{id}.{what}"))?.and_then(|ids| ids.into_dimensionality::<Ix2>().ok());
            let numbers = numbers.filter(|numbers| numbers.shape() == &states.shape()[..2]);
            let expected = format!("int64 of shape {:?}, as its last_hidden_state has", &states.shape()[..2]);
            let numbers = numbers.with_context(|| wrong(what, &expected))?;
            Ok(numbers.outer_iter().map(|row| row.to_vec()).collect())
        };
        // The tokens are not read again, but some options look at them.
        let (sources, mask) = (rectangle("input_ids")?, rectangle("attention_mask")?);
        let (options, id) = (Map::new(), id.parse::<u64>().map_or_else(|_| id.into(), Value::from));
        let states = Some(states);
        Ok(Request { id, sources, mask, prompts: None, options, targets: Vec::new(), seed: None, states })
    };
    ids.into_iter().map(request).collect()
}

/// The fields of a result that log-probabilities become.
pub fn logprobs(found: &Logprobs) -> Map<String, Value> {
    let mut fields = Map::from_iter([
        ("logprob".to_string(), found.sum().into()),
        ("logprobs".to_string(), found.tokens.clone().into()),
    ]);
    if !found.top.is_empty() {
        fields.insert("top_logprobs".into(), json!(found.top));
    }
    fields
}

/// What a target attended to, a list for each of its tokens, with a number for each of the `source` tokens that were given.
pub fn cross_attentions(found: &CrossAttentions, source: usize) -> Value {
    found.decimals().map(|row| row.into_iter().take(source).collect::<Vec<_>>()).collect()
}

/// `"…"` or `["…", "…"]`.
fn texts<'v>(field: &str, value: &'v Value) -> Result<Vec<&'v str>> {
    let list = match value {
        Value::String(text) => Some(vec![text.as_str()]),
        Value::Array(texts) => texts.iter().map(Value::as_str).collect(),
        _ => None,
    };
    list.with_context(|| format!("{field}: expected a string or a list of strings, found {}", shown(value)))
}

/// `[1, 2]` or `[[1, 2], [3, 4]]`.
fn rows(field: &str, value: &Value) -> Result<Vec<Vec<i64>>> {
    let row = |value: &Value| value.as_array()?.iter().map(Value::as_i64).collect::<Option<Vec<i64>>>();
    let rows = match value.as_array() {
        Some(list) if list.first().is_some_and(Value::is_array) => list.iter().map(row).collect(),
        Some(_) => row(value).map(|row| vec![row]),
        None => None,
    };
    rows.with_context(|| {
        format!("{field}: expected whole numbers in a list or a list of lists, found {}", shown(value))
    })
}

/// Requests from wherever a command is given them, for commands that have no use for streaming.
pub struct Requests<'a> {
    texts: std::iter::Enumerate<std::slice::Iter<'a, String>>,
    /// Where the texts are not given as arguments.
    lines: Option<Lines>,
    jsonl: bool,
    kind: Kind,
    model: &'a dyn Reader,
}

impl<'a> Requests<'a> {
    /// Reads the texts given, or stdin where there are none.
    pub fn open(texts: &'a [String], jsonl: bool, kind: Kind, model: &'a dyn Reader) -> Requests<'a> {
        let lines = match (texts.is_empty(), jsonl) {
            (false, _) => None,
            (true, true) => Some(Lines::requests()),
            (true, false) => Some(Lines::texts()),
        };
        Requests { texts: texts.iter().enumerate(), lines, jsonl, kind, model }
    }

    /// Waits for a request, and takes those that are there behind it until they are enough; none at the end.
    pub fn next_group(&mut self, packing: &Packing, cancel: &Cancellation) -> Result<Vec<Result<Request, Refused>>> {
        let mut group = Vec::new();
        let mut taken = 0;
        while taken < packing.window()
            && (group.is_empty() || self.lines.as_mut().map_or(Ok(true), |lines| lines.is_ready(packing))?)
        {
            let read = match &mut self.lines {
                None => self.texts.next().map(|(number, text)| (number, text.as_bytes().to_vec())),
                Some(lines) => lines.next(cancel)?,
            };
            let Some((number, line)) = read else { break };
            let request = match self.jsonl {
                true => Request::parse(&line, number, self.kind, self.model),
                false => Request::of_text(&line, number, self.kind, self.model),
            };
            taken += request.as_ref().map_or(1, |request| request.sources.len());
            group.push(request);
        }
        Ok(group)
    }
}

/// Reads a line without its end, and without the byte-order mark that the first may begin with. Of a line that is too long
/// no more is returned than shows it.
fn next_line(from: &mut impl BufRead, is_first: bool) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let most = LONGEST_LINE as u64 + 2;
    if from.by_ref().take(most).read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    match line.pop_if(|last| *last == b'\n') {
        Some(_) => drop(line.pop_if(|last| *last == b'\r')),
        None if line.len() as u64 == most => drop(from.skip_until(b'\n')?),
        None => drop(line.pop_if(|last| *last == b'\r')),
    }
    if is_first {
        let text = files::without_mark(&line).map_err(io::Error::other)?;
        line.drain(..line.len() - text.len());
    }
    Ok(Some(line))
}

/// Lines of stdin, read ahead on a thread of their own: whoever waits for an answer before writing on is not kept waiting,
/// and a file is read while the model runs.
pub struct Lines {
    received: Receiver<io::Result<Line>>,
    pending: Option<Line>,
}

/// A line's number from 0, and what stands on it, not necessarily UTF-8.
type Line = (usize, Vec<u8>);

impl Lines {
    /// Starts reading texts: every line is one.
    pub fn texts() -> Lines {
        Lines::read(|_| true)
    }

    /// Starts reading requests: a blank line is none, but counts.
    pub fn requests() -> Lines {
        Lines::read(|line| !line.trim_ascii().is_empty())
    }

    fn read(wanted: fn(&[u8]) -> bool) -> Lines {
        let (lines, received) = sync_channel(256);
        thread::spawn(move || {
            let mut stdin = io::stdin().lock();
            for number in 0.. {
                let line = match next_line(&mut stdin, number == 0) {
                    Ok(Some(line)) if !wanted(&line) => continue,
                    Ok(Some(line)) => Ok((number, line)),
                    Ok(None) => break,
                    Err(error) => Err(error),
                };
                let is_last = line.is_err();
                if lines.send(line).is_err() || is_last {
                    break;
                }
            }
        });
        Lines { received, pending: None }
    }

    /// The next line; waits for it, or for a cancellation.
    pub fn next(&mut self, cancel: &Cancellation) -> Result<Option<Line>> {
        if let Some(line) = self.pending.take() {
            return Ok(Some(line));
        }
        loop {
            match self.received.recv_timeout(Duration::from_millis(50)) {
                Ok(line) => return line.context("stdin cannot be read").map(Some),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) if cancel.is_cancelled() => bail!(t5gemma_runtime::Error::Cancelled),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Whether a further line is there already, or nearly so where many are to be looked through.
    pub fn is_ready(&mut self, packing: &Packing) -> Result<bool> {
        let patience = if packing.is_by_tokens() { Duration::from_millis(20) } else { Duration::ZERO };
        if self.pending.is_none()
            && let Ok(line) = self.received.recv_timeout(patience)
        {
            self.pending = Some(line.context("stdin cannot be read")?);
        }
        Ok(self.pending.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_as_on_any_system_and_begin_without_a_mark() {
        let cases: &[(&[u8], &[&[u8]])] = &[
            (b"", &[]),
            (b"\n", &[b""]),
            (b"a\nb", &[b"a", b"b"]),
            (b"a\r\nb\r\n", &[b"a", b"b"]),
            (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", &[b"a", b"\xef\xbb\xbfb"]),
            (b"\xef\xbb\xbf\n", &[b""]),
            (b"a\0b\n\xff\n", &[b"a\0b", b"\xff"]),
        ];
        for (bytes, expected) in cases {
            let mut from = *bytes;
            let mut found = Vec::new();
            while let Some(line) = next_line(&mut from, found.is_empty()).expect("reads") {
                found.push(line);
            }
            assert_eq!(found, *expected, "{bytes:?}");
        }
        let error = next_line(&mut b"\xff\xfea\0\n\0".as_slice(), true).expect_err("UTF-16");
        assert!(error.to_string().contains("UTF-16"), "{error}");
    }

    #[test]
    fn of_a_line_that_is_too_long_the_next_is_read_all_the_same() {
        let long = io::repeat(b'a').take(2 * LONGEST_LINE as u64);
        let mut from = io::BufReader::new(long.chain(b"\nb\n".as_slice()));
        let line = next_line(&mut from, true).expect("reads").expect("a line");
        assert_eq!(line.len(), LONGEST_LINE + 2);
        assert_eq!(next_line(&mut from, false).expect("reads"), Some(b"b".to_vec()));
    }
}
