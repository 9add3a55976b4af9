//! Server-sent events: an answer that a task writes piece by piece. The task ends when its client leaves, and waits when
//! the client reads slowly. Comments keep quiet connections open.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::Value;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::app::App;
use crate::failure::Failure;

/// Pieces that wait for a slow reader; the task waits then.
const BUFFERED: usize = 16;
/// After this much silence comes a comment.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Where the task writes.
#[derive(Clone, Debug)]
pub struct Out {
    pieces: Sender<Bytes>,
    /// How long a client may read nothing.
    patience: Duration,
}

/// The client has left.
#[derive(Clone, Copy, Debug)]
pub struct ClientLeft;

impl Out {
    /// Writes an event with JSON.
    ///
    /// # Errors
    /// The client has left.
    pub async fn json(&self, value: &Value) -> Result<(), ClientLeft> {
        self.data(&value.to_string()).await
    }

    /// Writes an event with a line of text.
    ///
    /// # Errors
    /// The client has left.
    pub async fn data(&self, line: &str) -> Result<(), ClientLeft> {
        self.raw(format!("data: {line}\n\n")).await
    }

    /// Writes text as it is.
    ///
    /// # Errors
    /// The client has left, or reads nothing.
    pub async fn raw(&self, text: String) -> Result<(), ClientLeft> {
        match tokio::time::timeout(self.patience, self.pieces.send(text.into())).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(ClientLeft),
        }
    }
}

/// Why a task ends early.
#[derive(Debug)]
pub enum Stop {
    /// The client has left.
    ClientLeft,
    /// The request failed.
    Failed(Failure),
}

impl From<ClientLeft> for Stop {
    fn from(_: ClientLeft) -> Stop {
        Stop::ClientLeft
    }
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Stop {
        Stop::Failed(failure)
    }
}

impl From<t5gemma_runtime::Error> for Stop {
    fn from(error: t5gemma_runtime::Error) -> Stop {
        Stop::Failed(error.into())
    }
}

/// Server-sent events that `task` writes. If it fails, `error` makes the last event.
pub fn events<F, R>(app: &Arc<App>, task: F, error: fn(&Failure) -> Value) -> Response
where
    F: FnOnce(Out) -> R,
    R: Future<Output = Result<(), Stop>> + Send + 'static,
{
    let body = written(app, task, move |failure| format!("data: {}\n\n", error(failure)), Some(": keep-alive\n\n"));
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    (headers, body).into_response()
}

/// JSON lines that `task` writes. If it fails, `error` makes the last one.
pub fn lines<F, R>(app: &Arc<App>, task: F, error: impl Fn(&Failure) -> Value + Send + 'static) -> Response
where
    F: FnOnce(Out) -> R,
    R: Future<Output = Result<(), Stop>> + Send + 'static,
{
    let body = written(app, task, move |failure| format!("{}\n", error(failure)), None);
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    (headers, body).into_response()
}

fn written<F, R>(
    app: &Arc<App>,
    task: F,
    error: impl Fn(&Failure) -> String + Send + 'static,
    keep_alive: Option<&'static str>,
) -> Body
where
    F: FnOnce(Out) -> R,
    R: Future<Output = Result<(), Stop>> + Send + 'static,
{
    let (send, receive) = channel(BUFFERED);
    let (out, app) = (Out { pieces: send, patience: app.config.limits.read_timeout }, app.clone());
    let work = task(out.clone());
    tokio::spawn(async move {
        let has_left = tokio::select! {
            // Dropping the work ends its request.
            () = out.pieces.closed() => true,
            ended = work => match ended {
                Ok(()) => false,
                Err(Stop::ClientLeft) => true,
                Err(Stop::Failed(failure)) => {
                    app.metrics.refused(failure.reason.name());
                    out.raw(error(&failure)).await.is_err()
                }
            },
        };
        if has_left {
            app.metrics.disconnected.fetch_add(1, Ordering::Relaxed);
        }
    });
    Body::from_stream(stream::unfold(receive, move |receive| next(receive, keep_alive)))
}

async fn next(
    mut receive: Receiver<Bytes>,
    keep_alive: Option<&'static str>,
) -> Option<(Result<Bytes, std::convert::Infallible>, Receiver<Bytes>)> {
    let piece = match keep_alive {
        None => receive.recv().await?,
        Some(comment) => match tokio::time::timeout(KEEP_ALIVE, receive.recv()).await {
            Ok(piece) => piece?,
            Err(_) => Bytes::from_static(comment.as_bytes()),
        },
    };
    Some((Ok(piece), receive))
}
