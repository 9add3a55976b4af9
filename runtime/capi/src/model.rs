//! Models: opening, description, generation, scores and hidden states.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use serde_json::{Value, json};
use t5gemma_runtime::{Batch, ChatTemplate, Controls, Draws, Model, OpenOptions, TargetScore};

use crate::boundary::{fallible, free};
use crate::call::{Call, Role, t5g_call};
use crate::encoder::{Shape, put_states, t5g_states};
use crate::error::t5g_error;
use crate::handle::{Handle, Object};
use crate::input::{Out, Record, Text};
use crate::onnxruntime;
use crate::options::{check_device, generation_options, open_options, t5g_generation_options, t5g_open_options};
use crate::result::{Facts, t5g_result};
use crate::sources::{Reader, list, t5g_sources, t5g_targets};
use crate::tokenizer::{t5g_text, t5g_tokenizer};

/// A `t5g_model`.
pub struct t5g_model {
    pub inner: Arc<Model>,
    path: PathBuf,
    options: OpenOptions,
    chat: OnceLock<Result<ChatTemplate, t5g_error>>,
}

impl Object for t5g_model {
    const NAME: &'static str = "t5g_model";
}

impl t5g_model {
    fn chat(&self) -> Result<&ChatTemplate, t5g_error> {
        let open = || ChatTemplate::open(&self.path).map_err(t5g_error::from);
        self.chat.get_or_init(open).as_ref().map_err(t5g_error::clone)
    }

    /// The model on each device: itself once on its own device, and copies opened with its options.
    pub fn copies(&self, devices: &[i64]) -> Result<Vec<Arc<Model>>, t5g_error> {
        let mut own = Some(self.inner.clone());
        let open = |(at, &device): (usize, &i64)| {
            let name = format!("options.devices[{at}]");
            let refused = || t5g_error::argument(&name, "the number of a device", device.to_string());
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

    /// Runs work with a reader of sources for this model.
    pub fn read<T>(&self, work: impl FnOnce(&Reader) -> Result<T, t5g_error>) -> Result<T, t5g_error> {
        work(&Reader {
            tokenizer: &|| self.inner.tokenizer(),
            target_tokenizer: &|| self.inner.target_tokenizer(),
            chat: &|| self.chat(),
            pad_token_id: self.inner.generation_config().pad_token_id,
            facts: self.inner.facts(),
            image_settings: &|| self.inner.image_settings(),
            adapter: &|name| self.inner.adapter(name),
        })
    }
}

/// The number of source tokens that are not padding.
pub fn source_tokens(batch: &Batch) -> usize {
    batch.mask().iter().filter(|&&visible| visible != 0).count()
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_open(
    path: Text,
    options: Record<t5g_open_options>,
    model: Out<Handle<t5g_model>>,
) -> Handle<t5g_error> {
    fallible(|| {
        let place = model.check("model")?;
        let (path, options) = (PathBuf::from(path.required("path")?), open_options(options)?);
        onnxruntime::prepare();
        let inner = Arc::new(Model::open_with(&path, &options)?);
        place.put(Handle::new(t5g_model { inner, path, options, chat: OnceLock::new() }));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_describe(model: Handle<t5g_model>, json: Out<Handle<t5g_text>>) -> Handle<t5g_error> {
    fallible(|| {
        let (place, model) = (json.check("json")?, model.get("model")?);
        let (options, manifest, facts) = (model.inner.generation_config(), model.inner.manifest(), model.inner.facts());
        let described = json!({
            "path": model.path.to_string_lossy(),
            "task": manifest.task.name(),
            "target": manifest.target,
            "dtype": manifest.dtype.to_string(),
            "parameters": manifest.parameters,
            "exporter": manifest.exporter,
            "source_vocab_size": facts.encoder.vocab_size,
            "target_vocab_size": facts.decoder.vocab_size,
            "hidden_size": facts.encoder.hidden_size,
            "max_source_length": facts.encoder.max_position_embeddings,
            "max_target_length": facts.decoder.max_position_embeddings,
            "decoder_start_token_id": options.decoder_start_token_id,
            "eos_token_id": options.eos_token_id,
            "pad_token_id": options.pad_token_id,
            "labels": Value::Null,
            "elsewhere": model.inner.fallbacks().iter().map(ToString::to_string).collect::<Vec<_>>(),
        });
        place.put(t5g_text::handle(described.to_string()));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_tokenizer(
    model: Handle<t5g_model>,
    tokenizer: Out<Handle<t5g_tokenizer>>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (place, model) = (tokenizer.check("tokenizer")?, model.get("model")?);
        place.put(Handle::new(t5g_tokenizer(model.inner.tokenizer()?.clone())));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_chat(
    model: Handle<t5g_model>,
    messages: Text,
    text: Out<Handle<t5g_text>>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (place, model) = (text.check("text")?, model.get("model")?);
        let messages = list(messages.required("messages")?, "messages")?;
        place.put(t5g_text::handle(model.chat()?.apply(&messages)?));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_load_adapter(model: Handle<t5g_model>, name: Text, folder: Text) -> Handle<t5g_error> {
    fallible(|| {
        let model = model.get("model")?;
        let (name, folder) = (name.required("name")?, PathBuf::from(folder.required("folder")?));
        Ok(model.inner.load_adapter(name, folder)?)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_unload_adapter(model: Handle<t5g_model>, name: Text) -> Handle<t5g_error> {
    fallible(|| {
        let (model, name) = (model.get("model")?, name.required("name")?);
        Ok(model.inner.unload_adapter(name)?)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_adapters(model: Handle<t5g_model>, json: Out<Handle<t5g_text>>) -> Handle<t5g_error> {
    fallible(|| {
        let (place, model) = (json.check("json")?, model.get("model")?);
        place.put(t5g_text::handle(json!(model.inner.adapters()).to_string()));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_warm_up(model: Handle<t5g_model>, call: Record<t5g_call>) -> Handle<t5g_error> {
    fallible(|| {
        let model = model.get("model")?;
        let call = Call::read(call)?.of(Role::Encodes)?;
        call.run_in_one_step(|cancel| model.inner.warm_up(cancel))?;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_free(model: Handle<t5g_model>) -> i32 {
    free(model, "model")
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_generate(
    model: Handle<t5g_model>,
    sources: Record<t5g_sources>,
    options: Record<t5g_generation_options>,
    call: Record<t5g_call>,
    result: Out<Handle<t5g_result>>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (place, model) = (result.check("result")?, model.get("model")?);
        let (call, given) = (Call::read(call)?.of(Role::Generates)?, generation_options(options)?);
        let mut options = call.add_to(model.inner.generation_config().with_json(&given)?, &Arc::default());
        if options.do_sample {
            options.seed = Some(options.seed.unwrap_or_else(Draws::random_seed));
        }
        let batch = model.read(|reader| reader.batch(sources))?;
        let mut pieces = call.watch(&model.inner, batch.rows())?;
        let rows = call.run(|cancel| {
            let controls = Controls::default().streamer(&mut pieces).cancellation(cancel);
            let rows = model.inner.generate_batch(&batch, &options, controls);
            pieces.finish(rows)
        })?;
        let seed = options.seed.filter(|_| options.do_sample);
        let facts = Facts { seed, source_tokens: source_tokens(&batch), stats: None };
        place.put(Handle::new(t5g_result::new(model.inner.clone(), rows, facts)));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_score(
    model: Handle<t5g_model>,
    sources: Record<t5g_sources>,
    targets: Record<t5g_targets>,
    top_logprobs: usize,
    call: Record<t5g_call>,
    result: Out<Handle<t5g_result>>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (place, model) = (result.check("result")?, model.get("model")?);
        let call = Call::read(call)?.of(Role::Scores)?;
        let end = model.inner.generation_config().eos_token_id.first().copied();
        let output_attentions = targets.get("targets")?.output_attentions()?;
        let (batch, targets) = model.read(|reader| {
            let batch = reader.batch(sources)?;
            let targets = reader.targets(targets, batch.rows(), end)?;
            Ok((batch, targets))
        })?;
        if output_attentions {
            model.inner.check_cross_attentions()?;
        }
        let progress = call.progress();
        let found = call.run(|cancel| {
            let scored =
                model.inner.score_with_progress(&batch, &targets, top_logprobs, &mut || progress.step(), cancel)?;
            let requested = |score: TargetScore| (score.logprobs, score.cross_attentions.filter(|_| output_attentions));
            Ok(scored.into_iter().map(requested).collect())
        })?;
        place.put(Handle::new(t5g_result::scored(model.inner.clone(), targets, found, source_tokens(&batch))));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_model_encode(
    model: Handle<t5g_model>,
    sources: Record<t5g_sources>,
    call: Record<t5g_call>,
    states: Record<t5g_states>,
) -> Handle<t5g_error> {
    fallible(|| {
        let (place, model) = (states.get("states")?, model.get("model")?);
        let call = Call::read(call)?.of(Role::Encodes)?;
        let batch = model.read(|reader| reader.batch(sources))?;
        let shape = Shape::of(&batch, batch.length(), model.inner.facts().encoder.hidden_size);
        put_states(states, place, shape, &batch, || {
            let found = call.run_in_one_step(|cancel| model.inner.encode(&batch, cancel))?;
            Ok(found.into_iter().collect())
        })
    })
}
