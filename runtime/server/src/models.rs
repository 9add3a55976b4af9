//! `Models`: the served models by name, with their states. Loading a model again keeps the old one at work until the new
//! one is ready.

use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use t5gemma_runtime::{Error, Task};

use crate::config::{Config, ModelConfig};
use crate::failure::{Failure, Reason};
use crate::served::Served;

/// The served models, in the order of the configuration.
#[derive(Debug)]
pub struct Models {
    slots: Vec<Slot>,
}

#[derive(Debug)]
struct Slot {
    config: ModelConfig,
    state: RwLock<State>,
    /// One load at a time.
    loading: Mutex<()>,
}

/// The state of a model.
#[derive(Clone, Debug)]
pub enum State {
    /// Not open; the text says why, and is empty if nothing is wrong.
    Unloaded(String),
    /// Being opened for the first time.
    Loading,
    /// Open.
    Ready(Arc<Served>),
}

/// What a door needs a model for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Any.
    Any,
    /// Generated targets.
    Generate,
    /// A vector for a source.
    Embed,
    /// Labels for a source.
    Classify,
}

impl Purpose {
    fn suits(self, task: &Task) -> bool {
        match self {
            Purpose::Any => true,
            Purpose::Generate => *task == Task::Text2TextGeneration,
            // The encoder of a model that generates can embed as well.
            Purpose::Embed => matches!(task, Task::FeatureExtraction(_) | Task::Text2TextGeneration),
            Purpose::Classify => matches!(task, Task::TextClassification | Task::TokenClassification),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Purpose::Any => "anything",
            Purpose::Generate => "generation",
            Purpose::Embed => "embeddings",
            Purpose::Classify => "classification",
        }
    }
}

impl Models {
    /// No model is open yet.
    pub fn new(configs: &[ModelConfig]) -> Models {
        let slot = |config: &ModelConfig| Slot {
            config: config.clone(),
            state: RwLock::new(State::Loading),
            loading: Mutex::default(),
        };
        Models { slots: configs.iter().map(slot).collect() }
    }

    /// Names and states.
    pub fn states(&self) -> impl Iterator<Item = (&str, State)> {
        self.slots.iter().map(|slot| (slot.config.name.as_str(), slot.state()))
    }

    /// The models that are open.
    pub fn ready(&self) -> Vec<Arc<Served>> {
        let served = |(_, state)| match state {
            State::Ready(served) => Some(served),
            _ => None,
        };
        self.states().filter_map(served).collect()
    }

    /// Whether no model is being opened for the first time, and one is open.
    pub fn are_ready(&self) -> bool {
        let is_loading = self.states().any(|(_, state)| matches!(state, State::Loading));
        !is_loading && !self.ready().is_empty()
    }

    /// The model of a name.
    pub fn named(&self, name: &str) -> Result<Arc<Served>, Failure> {
        let Some(slot) = self.slots.iter().find(|slot| slot.config.name == name) else {
            let message = format!("no model of the name {name:?} is served");
            return Err(Failure { field: Some("model".into()), ..Failure::new(Reason::NotFound, message) });
        };
        match slot.state() {
            State::Ready(served) => Ok(served),
            State::Loading => Err(Failure::new(Reason::Unavailable, format!("{name} is being loaded")).retry_after(5)),
            State::Unloaded(_) => Err(Failure::new(Reason::Unavailable, format!("{name} is not loaded"))),
        }
    }

    /// The model of a request: the one that it names or, if it names none, the first that is for this purpose. If one
    /// model is served, it has every name: some clients make one up.
    pub fn get(&self, name: Option<&str>, purpose: Purpose) -> Result<Arc<Served>, Failure> {
        let served = match (name, &self.slots[..]) {
            (_, [only]) => self.named(&only.config.name)?,
            (Some(name), _) => self.named(name)?,
            (None, _) => {
                let suits = |served: &Arc<Served>| purpose.suits(served.task());
                let ready = self.ready();
                // An exported encoder is meant for vectors more than a model that generates.
                let exact = |served: &&Arc<Served>| purpose != Purpose::Embed || served.generator().is_none();
                match ready.iter().filter(|served| suits(served)).find(exact).or(ready.iter().find(|it| suits(it))) {
                    Some(served) => served.clone(),
                    None if !self.are_ready() => {
                        return Err(Failure::new(Reason::Unavailable, "the models are being loaded").retry_after(5));
                    }
                    None => {
                        let message = format!("no model for {} is served", purpose.name());
                        return Err(Failure::new(Reason::NotFound, message));
                    }
                }
            }
        };
        if !purpose.suits(served.task()) {
            let message =
                format!("{} is a model for {}, not for {}", served.name, served.task().name(), purpose.name());
            return Err(Failure { field: Some("model".into()), ..Failure::new(Reason::Invalid, message) });
        }
        Ok(served)
    }

    /// Opens a model, anew if it is open. Blocks as long as that takes.
    ///
    /// # Errors
    /// No model of the name, or one that does not open; an open one stays then.
    pub fn load(&self, name: &str, config: &Config) -> Result<(), LoadError> {
        let slot = self.slots.iter().find(|slot| slot.config.name == name).ok_or(LoadError::NoSuchModel)?;
        let _one = slot.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Unloaded(_) = slot.state() {
            slot.set(State::Loading);
        }
        match Served::open(&slot.config, config) {
            Ok(served) => {
                retire(slot.set(State::Ready(Arc::new(served))));
                Ok(())
            }
            Err(error) => {
                if let State::Loading = slot.state() {
                    slot.set(State::Unloaded("it does not open; the server's log says why".into()));
                }
                Err(LoadError::Runtime(error))
            }
        }
    }

    /// Closes a model once its requests have ended. Blocks while it is being loaded.
    ///
    /// # Errors
    /// No model of the name.
    pub fn unload(&self, name: &str) -> Result<(), LoadError> {
        let slot = self.slots.iter().find(|slot| slot.config.name == name).ok_or(LoadError::NoSuchModel)?;
        let _one = slot.loading.lock().unwrap_or_else(PoisonError::into_inner);
        retire(slot.set(State::Unloaded(String::new())));
        Ok(())
    }
}

/// Why a model is not loaded.
#[derive(Debug)]
pub enum LoadError {
    /// No model of the name is configured.
    NoSuchModel,
    /// It does not open.
    Runtime(Error),
}

impl Slot {
    fn state(&self) -> State {
        self.state.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, state: State) -> State {
        std::mem::replace(&mut *self.state.write().unwrap_or_else(PoisonError::into_inner), state)
    }
}

/// Closes a model once nobody uses it any more, so that requests that have found it are still answered by it.
fn retire(state: State) {
    let State::Ready(mut served) = state else { return };
    // Nobody who has asked for another state of the model waits for that.
    std::thread::spawn(move || {
        while Arc::get_mut(&mut served).is_none() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
}
