//! `t5gemma serve`: models over HTTP and gRPC. The server itself is a crate of its own; here are its flags and signals.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use t5gemma_runtime::{EngineOptions, OpenOptions, Provider, ProviderConfig};
use t5gemma_server::{Config, Drain, Keys, Limits, ModelConfig, ServeError, Server, Tls, Traces, log};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use crate::exit::{Outcome, bail_usage};
use crate::flag_errors;
use crate::opening::RuntimeArguments;

/// Serve models over HTTP and gRPC
///
/// Clients of OpenAI's API, Text Generation Inference, Text Embeddings Inference and the Open Inference Protocol (KServe,
/// Triton) find their paths on one port. Models that generate, embed and classify can be served side by side. SIGTERM ends
/// the server once everything accepted has been answered; a second signal ends it at once.
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES, mut_arg("warm_up", |argument| argument.hide(true)))]
pub struct Arguments {
    /// Model folders written by t5gemma-export; each has the name of its folder
    #[arg(value_name = "MODEL", required_unless_present = "named")]
    models: Vec<PathBuf>,
    /// Serve the model in FOLDER as NAME; may be repeated
    #[arg(long = "model", id = "named", value_name = "NAME=FOLDER", help_heading = "Model", value_parser = named)]
    named: Vec<(String, PathBuf)>,
    /// Load the PEFT LoRA adapter in DIR as NAME; may be repeated
    ///
    /// With several models, MODEL/NAME=DIR. Requests choose an adapter by the option `adapter`.
    #[arg(long, value_name = "NAME=DIR", help_heading = "Model", value_parser = named)]
    adapter: Vec<(String, PathBuf)>,
    /// Verify the hashes of the weights files before serving
    #[arg(long, help_heading = "Model")]
    check_weights: bool,
    /// What clients of Hugging Face's API get from a model that generates [default: text-generation]
    ///
    /// `summarization` and `translation` give the answers their names.
    #[arg(long, value_name = "TASK", help_heading = "Model", value_parser = ["text-generation", "summarization", "translation"])]
    pipeline_tag: Option<String>,
    /// Address to listen on
    ///
    /// Use 0.0.0.0 with --api-keys, and with --tls-certificate or a proxy that encrypts.
    #[arg(long, value_name = "ADDRESS", help_heading = "Network", default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on; 0 for a free one, which is printed
    #[arg(long, value_name = "PORT", help_heading = "Network", default_value_t = 8000)]
    port: u16,
    /// Port of its own for metrics, health and the repository API
    #[arg(long, value_name = "PORT", help_heading = "Network")]
    admin_port: Option<u16>,
    /// File with the keys that requests need, one a line
    ///
    /// Requests have a key in the header `Authorization: Bearer KEY`. Health needs none. Limits may follow a key on its
    /// line: `tenant=NAME`, `max-requests=N` at once, and `priority=high|normal|low` at most. SIGHUP reads the file again.
    #[arg(long, value_name = "FILE", help_heading = "Network")]
    api_keys: Option<PathBuf>,
    /// Encrypt by TLS with the certificates in FILE (PEM), the server's first; SIGHUP reads them again
    #[arg(long, value_name = "FILE", help_heading = "Network", requires = "tls_key")]
    tls_certificate: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, value_name = "FILE", help_heading = "Network", requires = "tls_certificate")]
    tls_key: Option<PathBuf>,
    /// Seconds that the headers of a request may take to arrive, and for which a connection may be idle
    #[arg(long, value_name = "SECONDS", help_heading = "Network", default_value_t = 75.0, value_parser = seconds)]
    header_timeout: f64,
    /// Seconds for which a client may read nothing of its answer
    #[arg(long, value_name = "SECONDS", help_heading = "Network", default_value_t = 60.0, value_parser = seconds)]
    read_timeout: f64,
    /// Maximum number of open connections
    #[arg(long, value_name = "N", help_heading = "Limits", default_value_t = Limits::default().max_connections)]
    max_connections: usize,
    /// Maximum number of accepted and unfinished requests; more are refused with status 429
    #[arg(long, value_name = "N", help_heading = "Limits", default_value_t = Limits::default().max_requests)]
    max_requests: usize,
    /// Maximum number of their rows: sources times beams or returned targets
    #[arg(long, value_name = "N", help_heading = "Limits", default_value_t = Limits::default().max_rows)]
    max_waiting_rows: usize,
    /// Maximum number of their source tokens
    #[arg(long, value_name = "N", help_heading = "Limits", default_value_t = Limits::default().max_source_tokens)]
    max_waiting_tokens: usize,
    /// Maximum number of rows of one request
    #[arg(long, value_name = "N", help_heading = "Limits", default_value_t = Limits::default().max_request_rows)]
    max_request_rows: usize,
    /// Maximum number of sources of one request
    #[arg(long, value_name = "N", help_heading = "Limits", default_value_t = Limits::default().max_request_sources)]
    max_request_sources: usize,
    /// Maximum length of a request's body in bytes
    #[arg(long, value_name = "BYTES", help_heading = "Limits", default_value_t = Limits::default().max_body_bytes)]
    max_body_bytes: usize,
    /// Maximum number of images of one request, crops included
    #[arg(long, value_name = "N", help_heading = "Limits", default_value_t = Limits::default().max_request_images)]
    max_request_images: usize,
    /// Maximum number of images of the accepted and unfinished requests
    #[arg(long, value_name = "N", help_heading = "Limits", default_value_t = Limits::default().max_images)]
    max_waiting_images: usize,
    /// Maximum number of pixels of an image
    #[arg(long, value_name = "N", help_heading = "Limits", default_value_t = Limits::default().max_image_pixels)]
    max_image_pixels: usize,
    /// Maximum time of a request in seconds
    ///
    /// Requests set shorter ones by the field `timeout` or the header `X-Request-Timeout`.
    #[arg(long, value_name = "SECONDS", help_heading = "Limits", default_value_t = 600.0, value_parser = seconds)]
    request_timeout: f64,
    /// Maximum number of generated tokens of requests that do not say
    ///
    /// By default the model's, or 20; for chat completions the model's, or 1024.
    #[arg(long, value_name = "N", help_heading = "Limits", value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: Option<u32>,
    /// Maximum number of target rows in flight of each model
    #[arg(long, value_name = "N", help_heading = "Runtime", default_value_t = EngineOptions::default().max_rows)]
    max_rows: usize,
    /// Maximum bytes of keys, values and logits that they may come to need
    #[arg(long, value_name = "BYTES", help_heading = "Runtime", default_value_t = EngineOptions::default().max_bytes)]
    max_bytes: usize,
    #[command(flatten)]
    runtime: RuntimeArguments,
    /// Log as JSON, with a line for each request
    #[arg(long, help_heading = "Operation")]
    log_json: bool,
    /// Names of metrics: `t5gemma`, or also those of vLLM for its dashboards and autoscalers
    #[arg(long, value_name = "NAMES", help_heading = "Operation", default_value = "t5gemma", value_parser = ["t5gemma", "vllm"])]
    metrics_names: String,
    /// Seconds for which requests are still taken after SIGTERM, until load balancers send no more
    #[arg(long, value_name = "SECONDS", help_heading = "Operation", default_value_t = 0.0, value_parser = seconds)]
    drain_delay: f64,
    /// Seconds that accepted requests have after that
    #[arg(long, value_name = "SECONDS", help_heading = "Operation", default_value_t = 60.0, value_parser = seconds)]
    drain_seconds: f64,
}

const EXAMPLES: &str = r#"Examples:
  Serve a model and ask it:
    t5gemma serve model &
    curl http://127.0.0.1:8000/generate -H 'Content-Type: application/json' \
      -d '{"inputs": "Translate to German: Good morning.", "parameters": {"max_new_tokens": 30}}'

  Serve two models, with keys, for other machines:
    t5gemma serve --model translate=model --model embed=encoder --host 0.0.0.0 --api-keys keys.txt

Exit status:
  0    ended by a signal, everything accepted was answered
  1    failure, or requests were cut off
  2    invalid arguments
  130  ended by a second signal"#;

fn named(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, folder)) if !name.is_empty() && !folder.is_empty() => Ok((name.to_string(), folder.into())),
        _ => Err(format!("expected NAME=FOLDER, found {text}")),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=1e8).contains(&seconds) => Ok(seconds),
        _ => Err(format!("expected a number of seconds, found {text}")),
    }
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<Outcome> {
    log::as_json(arguments.log_json);
    let config = config(&arguments)?;
    let server = match Server::new(config) {
        Ok(server) => server,
        Err(ServeError::Config(problem)) => bail_usage!("{problem}"),
        Err(error) => return Err(error.into()),
    };
    // The models have threads of their own.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(64)
        .enable_all()
        .build()
        .context("cannot start threads")?;
    let served = runtime.block_on(serve(&server, &arguments));
    // A model that is still being opened cannot be interrupted.
    runtime.shutdown_timeout(Duration::from_millis(100));
    match served {
        Ok(()) => Ok(Outcome::Done),
        Err(error) => Err(error),
    }
}

fn config(arguments: &Arguments) -> Result<Config> {
    let mut models: Vec<ModelConfig> = Vec::new();
    for folder in &arguments.models {
        models.push(ModelConfig::new(name_of(folder)?, folder));
    }
    models.extend(arguments.named.iter().map(|(name, folder)| ModelConfig::new(name, folder)));
    let mut adapters: BTreeMap<String, Vec<(String, PathBuf)>> = BTreeMap::new();
    for (name, folder) in &arguments.adapter {
        let (model, name) = match (name.split_once('/'), &models[..]) {
            (Some((model, name)), _) => (model, name),
            (None, [only]) => (only.name.as_str(), name.as_str()),
            (None, _) => bail_usage!("--adapter: expected MODEL/NAME=DIR with several models, found {name}"),
        };
        if !models.iter().any(|served| served.name == model) {
            bail_usage!("--adapter: expected the name of a served model before /, found {model}");
        }
        adapters.entry(model.to_string()).or_default().push((name.to_string(), folder.clone()));
    }
    let models = models.into_iter().map(|model| {
        let adapters = adapters.remove(&model.name).unwrap_or_default();
        model.adapters(adapters)
    });
    let mut config = Config::new(models.collect());
    let runtime = &arguments.runtime;
    let provider = Provider::ALL.into_iter().find(|known| known.name() == runtime.provider).unwrap_or_default();
    let mut open =
        OpenOptions::default().check_weights(arguments.check_weights).provider(ProviderConfig::new(provider));
    open.provider.options = runtime.provider_option.clone();
    open.library = runtime.onnxruntime.clone();
    open.threads = runtime.threads;
    open.profile = runtime.profile.clone();
    config.open = open;
    config.devices = runtime.device.clone();
    config.engine = EngineOptions::default().max_rows(arguments.max_rows).max_bytes(arguments.max_bytes);
    config.limits.max_body_bytes = arguments.max_body_bytes;
    config.limits.max_request_rows = arguments.max_request_rows;
    config.limits.max_request_sources = arguments.max_request_sources;
    config.limits.max_requests = arguments.max_requests;
    config.limits.max_rows = arguments.max_waiting_rows;
    config.limits.max_source_tokens = arguments.max_waiting_tokens;
    config.limits.max_connections = arguments.max_connections;
    config.limits.max_request_images = arguments.max_request_images;
    config.limits.max_images = arguments.max_waiting_images;
    config.limits.max_image_pixels = arguments.max_image_pixels;
    config.limits.header_timeout = Duration::from_secs_f64(arguments.header_timeout);
    config.limits.read_timeout = Duration::from_secs_f64(arguments.read_timeout);
    config.limits.timeout = Duration::from_secs_f64(arguments.request_timeout);
    config.max_new_tokens = arguments.max_new_tokens.map(|count| count as usize);
    config.pipeline_tag = arguments.pipeline_tag.clone();
    config.vllm_metrics = arguments.metrics_names == "vllm";
    config.separate_admin = arguments.admin_port.is_some();
    if let Some(path) = &arguments.api_keys {
        config.keys = Some(Keys::read(path).map_err(anyhow::Error::msg)?);
    }
    if let (Some(certificate), Some(key)) = (&arguments.tls_certificate, &arguments.tls_key) {
        config.tls = Some(Tls::read(certificate, key).map_err(anyhow::Error::msg)?);
    }
    config.traces = Traces::from_environment().map_err(anyhow::Error::msg)?;
    Ok(config)
}

/// The name of a model's folder.
fn name_of(folder: &Path) -> Result<String> {
    // `.` and `..` have names elsewhere.
    let whole = std::path::absolute(folder).unwrap_or_else(|_| folder.to_path_buf());
    let whole = whole.canonicalize().unwrap_or(whole);
    match whole.file_name().and_then(|name| name.to_str()) {
        Some(name) => Ok(name.to_string()),
        None => {
            bail_usage!("MODEL: expected a folder with a name, found {} (use --model NAME=FOLDER)", folder.display())
        }
    }
}

async fn serve(server: &Server, arguments: &Arguments) -> Result<()> {
    let listener = listen(arguments.host, arguments.port).await?;
    let admin = match arguments.admin_port {
        Some(port) => Some(listen(arguments.host, port).await?),
        None => None,
    };
    let scheme = if arguments.tls_certificate.is_some() { "https" } else { "http" };
    log::note(&format!("listening on {scheme}://{}", listener.local_addr()?));
    if !arguments.host.is_loopback() && arguments.api_keys.is_none() {
        log::note("whoever reaches this port may use the models: --api-keys keeps others out");
    }
    if let Some(admin) = &admin {
        log::note(&format!("metrics and administration on {scheme}://{}", admin.local_addr()?));
    }
    let drain = Drain {
        delay: Duration::from_secs_f64(arguments.drain_delay),
        patience: Duration::from_secs_f64(arguments.drain_seconds),
    };
    let end = signals(server.clone(), drain)?;
    let end = async move { end.await.unwrap_or(drain) };
    server.run(listener, admin, end).await.map_err(|error| match error {
        ServeError::Model { name, error } => flag_errors::of_opening(*error).context(format!("model {name}")),
        error => error.into(),
    })
}

async fn listen(host: IpAddr, port: u16) -> Result<TcpListener> {
    let address = SocketAddr::new(host, port);
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

/// Listens for signals: the first that ends the server tells how, the second ends it at once.
fn signals(server: Server, drain: Drain) -> Result<oneshot::Receiver<Drain>> {
    let on = |kind: SignalKind| signal(kind).context("cannot listen for signals");
    let (mut term, mut interrupt, mut hangup) =
        (on(SignalKind::terminate())?, on(SignalKind::interrupt())?, on(SignalKind::hangup())?);
    let (tell, told) = oneshot::channel();
    tokio::spawn(async move {
        let mut tell = Some(tell);
        let next = async |signal: &mut Signal| signal.recv().await;
        loop {
            let how = tokio::select! {
                _ = next(&mut term) => drain,
                // Someone waits at the keyboard.
                _ = next(&mut interrupt) => Drain { delay: Duration::ZERO, ..drain },
                _ = next(&mut hangup) => {
                    server.reload();
                    continue;
                }
            };
            match tell.take() {
                Some(tell) => drop(tell.send(how)),
                None => crate::end_at_once(),
            }
        }
    });
    Ok(told)
}
