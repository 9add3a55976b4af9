//! `t5gemma encode`: writes encoder hidden states, or one vector per text, to a file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use clap::builder::PossibleValuesParser;
use ndarray::{Array2, ArrayD, Axis, s};
use t5gemma_protocol::TokenizedRequest;
use t5gemma_runtime::{Cancellation, Encoder, Error, Pooling};

use crate::exit::Outcome;
use crate::exit::{bail_usage, ensure_usage};
use crate::images::{ImageArguments, WithFiles};
use crate::opening::{ModelArguments, Opening, RuntimeArguments};
use crate::packing::Packing;
use crate::progress::counter;
use crate::requests::{Kind, Refused, Requests};
use crate::stderr::note;
use crate::tensors::{Aside, Numbers, write_npy, write_safetensors};

/// Write hidden states or embeddings of texts to a file
///
/// The texts are the arguments or, without any, the lines of stdin; a text's id is its number, from 0. With --jsonl,
/// each line of stdin is a request {"id"?, "text" | "input_ids", "attention_mask"?, "images"? | "pixel_values"?,
/// "pan_and_scan"?} with fields as for `t5gemma generate`, and blank lines are skipped. If a request fails, the reason is on stderr; a .safetensors file is written without it, a .npy file is not written at
/// all, because its rows have no ids.
///
/// The model may be a generation model, or one exported with --task feature-extraction.
#[derive(clap::Args)]
#[command(after_long_help = FILES)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Texts to encode [default: the lines of stdin]
    #[arg(value_name = "TEXT", help_heading = None::<&str>)]
    texts: Vec<String>,
    /// Read requests as JSON lines
    #[arg(long, help_heading = "Input", conflicts_with = "texts")]
    jsonl: bool,
    #[command(flatten)]
    images: ImageArguments,
    /// Maximum length of a source in tokens; longer sources fail without --truncation
    #[arg(long, value_name = "N", help_heading = "Input", value_parser = clap::value_parser!(u32).range(1..))]
    max_length: Option<u32>,
    /// Truncate longer sources on the right to --max-length
    #[arg(long, help_heading = "Input", requires = "max_length")]
    truncation: bool,
    /// Pad sources to the longest of their request, or to --max-length
    #[arg(long, value_name = "TO", help_heading = "Input", value_enum, default_value = "longest")]
    padding: Padding,
    /// File to write: .safetensors or .npy
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    output: PathBuf,
    /// Pool the hidden states of each source into one vector [default: the model's]
    ///
    /// The mean over all tokens, or the state of the first or last token.
    #[arg(
        long,
        value_name = "METHOD",
        help_heading = "Output",
        value_parser = PossibleValuesParser::new(Pooling::ALL.map(Pooling::name))
    )]
    pooling: Option<String>,
    /// L2-normalize the pooled vectors
    #[arg(long, help_heading = "Output")]
    normalize: bool,
    #[command(flatten)]
    packing: Packing,
    #[command(flatten)]
    runtime: RuntimeArguments,
}

const FILES: &str = r#"Tensors of a .safetensors file, for each request:
  ID.last_hidden_state   float32 [rows, source tokens, hidden size];
                         ID.hidden_states.N for a model exported with
                         --hidden-layer N; meaningless at padding positions
  ID.input_ids           int64 [rows, source tokens]
  ID.attention_mask      int64 [rows, source tokens]
  ID.sentence_embedding  float32 [rows, hidden size]; with --pooling, the only one

A .npy file holds the rows of all requests in order. They must be of equal length: pooled, padded to --max-length, or from a single request. Unless pooled, their attention mask is written to NAME.attention_mask.npy.

Examples:
  Write one embedding for each line of a file:
    t5gemma encode model --pooling mean --normalize -o vectors.npy < texts.txt

  Encode once, generate twice:
    t5gemma encode model -o states.safetensors < texts.txt
    t5gemma generate model --encoder-outputs states.safetensors
    t5gemma generate model --encoder-outputs states.safetensors --num-beams 4"#;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Padding {
    Longest,
    #[value(name = "max_length")]
    MaxLength,
}

/// Runs the command.
pub fn run(arguments: Arguments, cancel: &Cancellation) -> Result<Outcome> {
    let extension = arguments.output.extension().and_then(|extension| extension.to_str());
    let npy = match extension {
        Some("npy") => true,
        Some("safetensors") => false,
        _ => bail_usage!(
            "--output: expected a name that ends in .safetensors or .npy, found {}",
            arguments.output.display()
        ),
    };
    ensure_usage!(
        arguments.padding == Padding::Longest || arguments.max_length.is_some(),
        "--padding max_length requires --max-length N"
    );
    // Fail before computing anything if the file cannot be written.
    let file = Aside::create(&arguments.output)?;
    let Arguments { model, runtime, .. } = arguments;
    let mut opening = Opening::new(model, runtime);
    opening.limits = arguments.packing.limits();
    let encoder = opening.open_encoder()?;
    let own = encoder.features()?;
    let wanted = arguments.pooling.as_deref();
    let pooling = Pooling::ALL.into_iter().find(|known| Some(known.name()) == wanted).unwrap_or(own.pooling);
    ensure_usage!(
        pooling != Pooling::None || !arguments.normalize,
        "--normalize requires --pooling mean, first or last (only a model exported with --normalize normalizes unpooled states)"
    );
    let longest = encoder.facts().encoder.max_position_embeddings;
    if let (Padding::MaxLength, Some(length)) = (arguments.padding, arguments.max_length) {
        ensure_usage!(
            length as usize <= longest,
            "--max-length: expected at most {longest} with --padding max_length (encoder.max_position_embeddings), found \
             {length}"
        );
    }
    let encoding = Encoding {
        encoder: &encoder,
        cancel,
        max_length: arguments.max_length.map(|length| length as usize),
        truncation: arguments.truncation,
        padding: arguments.padding,
        pooling,
        normalize: arguments.normalize,
    };

    let mut outcome = Outcome::Done;
    let mut encoded: Vec<Encoded> = Vec::new();
    let mut ids = std::collections::BTreeSet::new();
    let done = counter("encoded", false);
    let kind = Kind::Encode { truncates: arguments.truncation };
    let with_files = WithFiles(&encoder);
    let read = Requests::open(&arguments.texts, arguments.jsonl, kind, &with_files);
    let mut read = read.with_images(arguments.images.fields());
    loop {
        let group = read.next_group(&arguments.packing, cancel)?;
        if group.is_empty() {
            break;
        }
        let group = group.into_iter().map(|request| {
            let mut request = request?;
            match encoding.fit(&mut request) {
                _ if !ids.insert(request.id.name()) => {
                    Err((request, "id: expected a unique id, found a repeated one".to_string()))
                }
                Err(error) => Err((request, error.to_string())),
                Ok(()) => return Ok(request),
            }
            .map_err(|(request, reason)| Refused { id: request.id, reason })
        });
        let group: Vec<_> = group.collect();
        let answers = match arguments.packing.is_by_tokens() {
            true => {
                arguments.packing.run(group, |_, _| true, |pack| encoding.answers(pack.into_iter().map(Ok).collect()))
            }
            false => encoding.answers(group),
        };
        for answer in answers? {
            match answer {
                Ok(one) => {
                    encoded.push(one);
                    done.inc(1);
                }
                Err(refused) => {
                    done.suspend(|| note!("t5gemma: request {}: {}", refused.id, refused.reason));
                    outcome = Outcome::SomeFailed;
                }
            }
        }
    }
    let output = output_name(&encoder, pooling);
    if !npy {
        write_safetensors(file, named(encoded, &output))?;
        return Ok(outcome);
    }
    // Rows of an array are identified only by position, which a missing row would shift.
    ensure!(outcome == Outcome::Done, "{}: not written because a request failed", arguments.output.display());
    let masks = (pooling == Pooling::None).then(|| stacked(encoded.iter().map(|one| &one.mask))).transpose()?;
    let states = stacked(encoded.iter().map(|one| &one.output))?;
    if let Some(masks) = masks {
        write_npy(Aside::create(&arguments.output.with_extension("attention_mask.npy"))?, &Numbers::Whole(masks))?;
    }
    write_npy(file, &Numbers::Floats(states))?;
    Ok(outcome)
}

/// The tensors written for a request.
struct Encoded {
    name: String,
    /// Hidden states `[rows, length, hidden]` or vectors `[rows, hidden]`.
    output: ArrayD<f32>,
    /// `[rows, length]`
    ids: ArrayD<i64>,
    /// `[rows, length]`
    mask: ArrayD<i64>,
}

struct Encoding<'a> {
    encoder: &'a Encoder,
    cancel: &'a Cancellation,
    max_length: Option<usize>,
    truncation: bool,
    padding: Padding,
    pooling: Pooling,
    normalize: bool,
}

impl Encoding<'_> {
    /// Truncates or pads a request's sources as the arguments say.
    fn fit(&self, request: &mut TokenizedRequest) -> Result<()> {
        let Some(most) = self.max_length else { return Ok(()) };
        for (row, (source, mask)) in request.sources.iter_mut().zip(&mut request.mask).enumerate() {
            ensure!(
                source.len() <= most || self.truncation,
                "input_ids[{row}]: expected at most {most} tokens (--max-length) or --truncation, found {}",
                source.len()
            );
            source.truncate(most);
            mask.truncate(most);
            if self.padding == Padding::MaxLength {
                source.resize(most, self.encoder.pad_token_id());
                mask.resize(most, 0);
            }
        }
        Ok(())
    }

    /// Encodes requests as one batch; if it fails, each alone, so that only the one at fault fails.
    fn answers(&self, group: Vec<Result<TokenizedRequest, Refused>>) -> Result<Vec<Result<Encoded, Refused>>> {
        let requests: Vec<&TokenizedRequest> = group.iter().flatten().collect();
        let mut together = match self.encode(&requests) {
            Ok(encoded) => Some(encoded.into_iter()),
            Err(Error::Cancelled) => return Err(Error::Cancelled.into()),
            Err(_) => None,
        };
        group
            .into_iter()
            .map(|request| {
                let request = match request {
                    Ok(request) => request,
                    Err(refused) => return Ok(Err(refused)),
                };
                if let Some(one) = together.as_mut().and_then(Iterator::next) {
                    return Ok(Ok(one));
                }
                match self.encode(&[&request]) {
                    Ok(mut one) => Ok(Ok(one.remove(0))),
                    Err(Error::Cancelled) => Err(Error::Cancelled.into()),
                    Err(error) => Ok(Err(Refused { id: request.id, reason: error.to_string() })),
                }
            })
            .collect()
    }

    fn encode(&self, requests: &[&TokenizedRequest]) -> Result<Vec<Encoded>, Error> {
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        let pad = self.encoder.pad_token_id();
        let batch = t5gemma_protocol::batch(requests, pad)?;
        let batch = self.encoder.pad(&batch);
        let fixed = self.encoder.features()?.fixed_length;
        let output = match self.pooling {
            Pooling::None => self.encoder.encode(&batch, self.cancel)?.into_dyn(),
            pooling if self.normalize => self.encoder.embed_normalized(&batch, pooling, self.cancel)?.into_dyn(),
            pooling => self.encoder.embed(&batch, pooling, self.cancel)?.into_dyn(),
        };
        let mut first = 0;
        let one = |request: &&TokenizedRequest| {
            let longest = request.sources.iter().map(Vec::len).max().unwrap_or(0);
            let (rows, length) = (request.sources.len(), fixed.unwrap_or(longest.max(1)));
            let mut output = output.slice_axis(Axis(0), (first..first + rows).into());
            if self.pooling == Pooling::None {
                output = output.slice_axis_move(Axis(1), (..length).into());
            }
            let rectangle = |flat: &[i64]| {
                let whole = Array2::from_shape_vec([batch.rows(), batch.length()], flat.to_vec());
                whole.map(|whole| whole.slice(s![first..first + rows, ..length]).to_owned().into_dyn())
            };
            let (ids, mask) = (rectangle(batch.ids()), rectangle(batch.mask()));
            let (ids, mask) = ids.and_then(|ids| Ok((ids, mask?))).expect("a batch is a rectangle");
            first += rows;
            Encoded { name: request.id.name(), output: output.to_owned(), ids, mask }
        };
        Ok(requests.iter().map(one).collect())
    }
}

/// The name of the output tensor.
fn output_name(encoder: &Encoder, pooling: Pooling) -> String {
    let manifest = encoder.manifest();
    let graph = manifest.graphs.get("model").or(manifest.graphs.get("encoder"));
    match (pooling, graph.and_then(|graph| graph.ports.outputs.first())) {
        (Pooling::None, Some(port)) => port.name.clone(),
        (Pooling::None, None) => "last_hidden_state".into(),
        _ => "sentence_embedding".into(),
    }
}

fn named(encoded: Vec<Encoded>, output: &str) -> BTreeMap<String, Numbers> {
    let mut tensors = BTreeMap::new();
    for Encoded { name, output: states, ids, mask } in encoded {
        if states.ndim() == 3 {
            tensors.insert(format!("{name}.input_ids"), Numbers::Whole(ids));
            tensors.insert(format!("{name}.attention_mask"), Numbers::Whole(mask));
        }
        tensors.insert(format!("{name}.{output}"), Numbers::Floats(states));
    }
    tensors
}

/// Concatenates the rows of all tensors.
fn stacked<'t, T: Clone + 't>(tensors: impl Iterator<Item = &'t ArrayD<T>>) -> Result<ArrayD<T>> {
    let views: Vec<_> = tensors.map(|tensor| tensor.view()).collect();
    ensure!(!views.is_empty(), "there is nothing to write");
    ndarray::concatenate(Axis(0), &views).ok().context(
        "rows of a .npy file must have equal length, but these differ; write .safetensors, or pass --padding max_length or --pooling",
    )
}
