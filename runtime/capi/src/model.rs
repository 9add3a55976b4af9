//! Models: opened, described, generated with, scored by.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use serde_json::{Value, json};
use t5gemma_runtime::{Batch, ChatTemplate, Controls, Draws, Model, OpenOptions};

use crate::call::{Call, Role, t5g_call};
use crate::encoder::{Shape, put_states, t5g_states};
use crate::error::{Failure, fallible, free};
use crate::handle::{Handle, Object};
use crate::input::{Out, Record, Text};
use crate::onnxruntime;
use crate::options::{check_device, generation_options, open_options, t5g_generation_options, t5g_open_options};
use crate::result::Answers;
use crate::sources::{Reader, list, t5g_sources, t5g_targets};
use crate::tokenizer::{Reading, Written};

/// A `t5g_model`.
pub struct Opened {
    pub model: Arc<Model>,
    path: PathBuf,
    options: OpenOptions,
    chat: OnceLock<Result<ChatTemplate, Failure>>,
}

impl Object for Opened {
    const NAME: &'static str = "t5g_model";
}

impl Opened {
    fn chat(&self) -> Result<&ChatTemplate, Failure> {
        let open = || ChatTemplate::open(&self.path).map_err(Failure::from);
        self.chat.get_or_init(open).as_ref().map_err(Failure::clone)
    }

    /// The model on each of the devices: itself on its own, once, and copies opened as it was.
    pub fn copies(&self, devices: &[i64]) -> Result<Vec<Arc<Model>>, Failure> {
        let mut own = Some(self.model.clone());
        let open = |(at, &device): (usize, &i64)| {
            let name = format!("options.devices[{at}]");
            let refused = || Failure::argument(&name, "the number of a device", device.to_string());
            let mut options = self.options.clone();
            options.provider.device = u32::try_from(device).map_err(|_| refused())?;
            check_device(&options, &name)?;
            if options.provider.device == self.options.provider.device
                && let Some(own) = own.take()
            {
                return Ok(own);
            }
            Ok(Arc::new(Model::open_with(&self.path, &options)?))
        };
        devices.iter().enumerate().map(open).collect()
    }

    /// Reads sources for this model, and what a call makes of them.
    pub fn read<T>(&self, work: impl FnOnce(&Reader) -> Result<T, Failure>) -> Result<T, Failure> {
        work(&Reader {
            tokenizer: &|| self.model.tokenizer(),
            chat: &|| self.chat(),
            pad_token_id: self.model.generation_config().pad_token_id,
            hidden_size: self.model.config().encoder.hidden_size,
        })
    }
}

/// How many tokens of a batch take part.
pub fn source_tokens(batch: &Batch) -> usize {
    batch.mask().iter().filter(|&&visible| visible != 0).count()
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_open(
    path: Text,
    options: Record<t5g_open_options>,
    model: Out<Handle<Opened>>,
) -> Handle<Failure> {
    fallible(|| {
        let place = model.check("model")?;
        let (path, options) = (PathBuf::from(path.required("path")?), open_options(options)?);
        onnxruntime::prepare();
        let model = Arc::new(Model::open_with(&path, &options)?);
        place.put(Handle::new(Opened { model, path, options, chat: OnceLock::new() }));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_describe(model: Handle<Opened>, json: Out<Handle<Written>>) -> Handle<Failure> {
    fallible(|| {
        let (place, opened) = (json.check("json")?, model.get("model")?);
        let (model, options) = (&*opened.model, opened.model.generation_config());
        let (manifest, config) = (model.manifest(), model.config());
        let described = json!({
            "path": opened.path.to_string_lossy(),
            "task": manifest.task.name(),
            "target": manifest.target,
            "dtype": manifest.dtype.to_string(),
            "parameters": manifest.parameters,
            "exporter": manifest.exporter,
            "source_vocab_size": config.encoder.vocab_size,
            "target_vocab_size": config.decoder.vocab_size,
            "hidden_size": config.encoder.hidden_size,
            "max_source_length": config.encoder.max_position_embeddings,
            "max_target_length": config.decoder.max_position_embeddings,
            "decoder_start_token_id": options.decoder_start_token_id,
            "eos_token_id": options.eos_token_id,
            "pad_token_id": options.pad_token_id,
            "labels": Value::Null,
            "elsewhere": model.fallbacks().iter().map(ToString::to_string).collect::<Vec<_>>(),
        });
        place.put(Written::handle(described.to_string()));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_tokenizer(model: Handle<Opened>, tokenizer: Out<Handle<Reading>>) -> Handle<Failure> {
    fallible(|| {
        let (place, opened) = (tokenizer.check("tokenizer")?, model.get("model")?);
        place.put(Handle::new(Reading(opened.model.tokenizer()?.clone())));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_chat(model: Handle<Opened>, messages: Text, text: Out<Handle<Written>>) -> Handle<Failure> {
    fallible(|| {
        let (place, opened) = (text.check("text")?, model.get("model")?);
        let messages = list(messages.required("messages")?, "messages")?;
        place.put(Written::handle(opened.chat()?.apply(&messages)?));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_warm_up(model: Handle<Opened>, call: Record<t5g_call>) -> Handle<Failure> {
    fallible(|| {
        let opened = model.get("model")?;
        let call = Call::read(call)?.of(Role::Encodes)?;
        call.run_in_one_step(|cancel| opened.model.warm_up(cancel))?;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_free(model: Handle<Opened>) -> i32 {
    free(model, "model")
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_generate(
    model: Handle<Opened>,
    sources: Record<t5g_sources>,
    options: Record<t5g_generation_options>,
    call: Record<t5g_call>,
    result: Out<Handle<Answers>>,
) -> Handle<Failure> {
    fallible(|| {
        let (place, opened) = (result.check("result")?, model.get("model")?);
        let model = &*opened.model;
        let (call, given) = (Call::read(call)?, generation_options(options)?);
        let mut options = call.add_to(model.generation_config().with_json(&given)?, &Arc::default());
        if options.do_sample {
            options.seed = Some(options.seed.unwrap_or_else(Draws::random_seed));
        }
        let batch = opened.read(|reader| reader.batch(sources))?;
        let mut pieces = call.watch(model, batch.rows())?;
        let rows = call.run(|cancel| {
            let rows =
                model.generate_batch(&batch, &options, Controls::default().streamer(&mut pieces).cancellation(cancel));
            pieces.finish(rows)
        })?;
        let seed = options.seed.filter(|_| options.do_sample);
        place.put(Handle::new(Answers::new(opened.share(), rows, seed, source_tokens(&batch))));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_score(
    model: Handle<Opened>,
    sources: Record<t5g_sources>,
    targets: Record<t5g_targets>,
    top_logprobs: usize,
    call: Record<t5g_call>,
    result: Out<Handle<Answers>>,
) -> Handle<Failure> {
    fallible(|| {
        let (place, opened) = (result.check("result")?, model.get("model")?);
        let call = Call::read(call)?.of(Role::Scores)?;
        let end = opened.model.generation_config().eos_token_id.first().copied();
        let output_attentions = targets.get("targets")?.output_attentions()?;
        let (batch, targets) = opened.read(|reader| {
            let batch = reader.batch(sources)?;
            let targets = reader.targets(targets, batch.rows(), end)?;
            Ok((batch, targets))
        })?;
        if output_attentions {
            opened.model.check_cross_attentions()?;
        }
        let shown = call.shown();
        let found = call.run(|cancel| {
            let scored =
                opened.model.score_with_progress(&batch, &targets, top_logprobs, &mut || shown.step(), cancel)?;
            let told = |(logprobs, attended): (_, Option<_>)| (logprobs, attended.filter(|_| output_attentions));
            Ok(scored.into_iter().map(told).collect())
        })?;
        place.put(Handle::new(Answers::scored(opened.share(), targets, found, source_tokens(&batch))));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_encode(
    model: Handle<Opened>,
    sources: Record<t5g_sources>,
    call: Record<t5g_call>,
    states: Record<t5g_states>,
) -> Handle<Failure> {
    fallible(|| {
        let (place, opened) = (states.get("states")?, model.get("model")?);
        let call = Call::read(call)?.of(Role::Encodes)?;
        let batch = opened.read(|reader| reader.batch(sources))?;
        let shape = Shape::of(&batch, batch.length(), opened.model.config().encoder.hidden_size);
        put_states(states, place, shape, &batch, || {
            let found = call.run_in_one_step(|cancel| opened.model.encode(&batch, cancel))?;
            Ok(found.into_iter().collect())
        })
    })
}
