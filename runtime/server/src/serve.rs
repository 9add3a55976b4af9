//! `Server`: the models and their doors, and how a process that serves them begins and ends.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io};

use axum::Router;
use t5gemma_runtime::Error;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::app::App;
use crate::config::Config;
use crate::models::LoadError;
use crate::{doors, listen, log};

/// Models and their doors.
#[derive(Clone, Debug)]
pub struct Server {
    app: Arc<App>,
}

/// Why a server does not serve.
#[derive(Debug)]
#[non_exhaustive]
pub enum ServeError {
    /// A configuration that cannot be served.
    Config(String),
    /// A model that does not open.
    Model {
        /// Its name.
        name: String,
        /// Why.
        error: Box<Error>,
    },
    /// The port cannot be used.
    Io(io::Error),
    /// Requests were still unfinished when the time for them was over.
    NotDrained {
        /// How many.
        requests: usize,
    },
}

impl fmt::Display for ServeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ServeError::Config(problem) => f.write_str(problem),
            ServeError::Model { name, error } => write!(f, "model {name}: {error}"),
            ServeError::Io(error) => error.fmt(f),
            ServeError::NotDrained { requests } => {
                write!(f, "{requests} requests were cut off, because they were not finished in time")
            }
        }
    }
}

impl std::error::Error for ServeError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ServeError::Model { error, .. } => error.source(),
            _ => None,
        }
    }
}

/// How a server ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drain {
    /// How long requests are still taken after readiness is off, so that load balancers notice.
    pub delay: Duration,
    /// How long accepted requests may take then.
    pub patience: Duration,
}

impl Server {
    /// Prepares to serve. No model is open yet.
    ///
    /// # Errors
    /// No model, two models of one name, or a name that does not fit into a path.
    pub fn new(config: Config) -> Result<Server, ServeError> {
        if config.models.is_empty() {
            return Err(ServeError::Config("expected at least one model, found none".into()));
        }
        for (at, model) in config.models.iter().enumerate() {
            let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            if model.name.is_empty() || !model.name.chars().all(is_plain) {
                let problem = format!(
                    "the name of a model: expected letters, digits, `-`, `_` and `.`, found {:?} (name it with \
                     NAME=FOLDER)",
                    model.name
                );
                return Err(ServeError::Config(problem));
            }
            if config.models[..at].iter().any(|other| other.name == model.name) {
                return Err(ServeError::Config(format!("two models have the name {}", model.name)));
            }
        }
        Ok(Server { app: App::new(config, doors::NAMES) })
    }

    /// Opens the models, one after the other. The doors answer meanwhile, and say that they are not ready.
    ///
    /// # Errors
    /// The first model that does not open.
    pub async fn load(&self) -> Result<(), ServeError> {
        for model in &self.app.config.models {
            let (app, name) = (self.app.clone(), model.name.clone());
            let loaded = tokio::task::spawn_blocking(move || app.models.load(&name, &app.config)).await;
            match loaded {
                Ok(Ok(())) => {}
                Ok(Err(LoadError::Runtime(error))) => {
                    return Err(ServeError::Model { name: model.name.clone(), error: Box::new(error) });
                }
                Ok(Err(LoadError::NoSuchModel)) => unreachable!("it is configured"),
                Err(_) => return Err(ServeError::Config(format!("model {}: opening it panicked", model.name))),
            }
        }
        Ok(())
    }

    /// The doors, for a server of your own. Health, metrics and the repository API are among them unless
    /// [`Config::separate_admin`] is set.
    pub fn router(&self) -> Router {
        doors::router(&self.app)
    }

    /// Health, metrics and the repository API alone.
    pub fn admin_router(&self) -> Router {
        doors::admin_router(&self.app)
    }

    /// Whether requests are answered.
    pub fn is_ready(&self) -> bool {
        self.app.is_ready()
    }

    /// Reads the keys and the certificate again. If that fails, the old ones stay.
    pub fn reload(&self) {
        let note = |what: &str, reloaded: Result<(), String>| match reloaded {
            Ok(()) => log::note(&format!("the {what} was read again")),
            Err(error) => log::note(&format!("the old {what} stays: {error}")),
        };
        if let Some(keys) = &self.app.config.keys {
            note("file of keys", keys.reload());
        }
        if let Some(tls) = &self.app.config.tls {
            note("certificate", tls.reload());
        }
    }

    /// Opens the models and serves them, until `end` says how to end, and everything accepted has been answered.
    ///
    /// # Errors
    /// A model that does not open; requests that are not finished in time.
    pub async fn run(
        &self,
        listener: TcpListener,
        admin: Option<TcpListener>,
        end: impl Future<Output = Drain>,
    ) -> Result<(), ServeError> {
        let (closing, closed) = watch::channel(false);
        let app = &self.app;
        let mut serving = vec![tokio::spawn(listen::serve(listener, self.router(), app.clone(), closed.clone()))];
        if let Some(admin) = admin {
            let router = self.admin_router();
            serving.push(tokio::spawn(listen::serve(admin, router, app.clone(), closed.clone())));
        }
        let mut end = std::pin::pin!(end);
        let loaded = tokio::select! {
            loaded = self.load() => loaded,
            _ = end.as_mut() => return Ok(()),
        };
        loaded?;
        log::note("ready");
        let drain = end.await;
        app.leave();
        log::note(&format!("shutting down: {} requests in flight", app.admission.requests()));
        tokio::time::sleep(drain.delay).await;
        app.admission.close();
        let drained = tokio::time::timeout(drain.patience, app.admission.idle()).await;
        // The last bytes of the last answers.
        let _ = closing.send(true);
        for serving in serving {
            let _ = serving.await;
        }
        let flushed = async {
            while app.metrics.connections.load(std::sync::atomic::Ordering::Relaxed) > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(2), flushed).await;
        if let Some(traces) = app.config.traces.clone() {
            let _ = tokio::task::spawn_blocking(move || traces.end()).await;
        }
        match drained {
            Ok(()) => Ok(()),
            Err(_) => Err(ServeError::NotDrained { requests: app.admission.requests() }),
        }
    }
}
