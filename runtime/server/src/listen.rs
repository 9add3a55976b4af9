//! Accepts connections and ends them: HTTP/1.1 and HTTP/2 on one port, with bounds on headers, streams and connections,
//! until the server is told to end.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use crate::app::App;

/// How long the headers of a request may take to arrive, and a connection may be idle.
const HEADER_TIMEOUT: Duration = Duration::from_secs(75);
/// Bytes of a request's headers.
const HEADER_BYTES: usize = 64 << 10;
/// Requests at once on one HTTP/2 connection.
const STREAMS: u32 = 512;
/// How often an HTTP/2 connection is asked whether it still lives, and how long the answer may take.
const PING: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));

/// Serves `router` on `listener` until `end` says true; then lets the connections finish what they do.
pub(crate) async fn serve(listener: TcpListener, router: Router, app: Arc<App>, mut end: watch::Receiver<bool>) {
    let connections = Arc::new(Semaphore::new(app.config.limits.max_connections));
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(HEADER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(HEADER_BYTES as u32)
        .keep_alive_interval(PING.0)
        .keep_alive_timeout(PING.1);
    loop {
        let permit = tokio::select! {
            permit = connections.clone().acquire_owned() => permit.expect("nobody closes it"),
            _ = end.wait_for(|&end| end) => return,
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = end.wait_for(|&end| end) => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                pause_after(&error).await;
                continue;
            }
        };
        let (builder, router, app, end) = (builder.clone(), router.clone(), app.clone(), end.clone());
        tokio::spawn(async move {
            app.metrics.connections.fetch_add(1, Ordering::Relaxed);
            connection(&builder, stream, router, end).await;
            app.metrics.connections.fetch_sub(1, Ordering::Relaxed);
            drop(permit);
        });
    }
}

async fn connection(
    builder: &Builder<TokioExecutor>,
    stream: TcpStream,
    router: Router,
    mut end: watch::Receiver<bool>,
) {
    // Tokens are small and must not wait for more.
    let _ = stream.set_nodelay(true);
    let mut serving = pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
    tokio::select! {
        // A connection that breaks is its client's matter.
        _ = serving.as_mut() => return,
        _ = end.wait_for(|&end| end) => {}
    }
    serving.as_mut().graceful_shutdown();
    let _ = serving.await;
}

/// Waits after an error of the whole process, such as too many open files.
async fn pause_after(error: &io::Error) {
    let is_of_connection = matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused
    );
    if !is_of_connection {
        crate::log::note(&format!("no connection can be accepted now: {error}"));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}
