//! Accepts connections and ends them: HTTP/1.1 and HTTP/2 on one port, with TLS or without, with bounds on headers, streams,
//! connections and idle time, until the server is told to end.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::Sleep;

use crate::app::App;

/// Bytes of a request's headers.
const HEADER_BYTES: usize = 64 << 10;
/// Requests at once on one HTTP/2 connection.
const STREAMS: u32 = 512;
/// How often an HTTP/2 connection is asked whether it still lives, and how long the answer may take.
const PING: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));
/// After how much silence, how often and how many times a connection is asked by TCP whether it still lives.
const KEEP_ALIVE: (Duration, Duration, u32) = (Duration::from_secs(30), Duration::from_secs(10), 3);
/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Serves `router` on `listener` until `end` says true; then lets the connections finish what they do.
pub(crate) async fn serve(listener: TcpListener, router: Router, app: Arc<App>, mut end: watch::Receiver<bool>) {
    let limits = &app.config.limits;
    let connections = Arc::new(Semaphore::new(limits.max_connections));
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(limits.header_timeout).max_buf_size(HEADER_BYTES);
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
        prepare(&stream, limits.read_timeout);
        let (builder, router, app, end) = (builder.clone(), router.clone(), app.clone(), end.clone());
        tokio::spawn(async move {
            app.metrics.connections.fetch_add(1, Ordering::Relaxed);
            let patience = app.config.limits.header_timeout;
            match &app.config.tls {
                None => connection(&builder, stream, patience, router, end).await,
                Some(tls) => {
                    if let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE, tls.acceptor().accept(stream)).await {
                        connection(&builder, stream, patience, router, end).await;
                    }
                }
            }
            app.metrics.connections.fetch_sub(1, Ordering::Relaxed);
            drop(permit);
        });
    }
}

/// Sets the options of a socket. One that has some of them not is served all the same.
fn prepare(stream: &TcpStream, read_timeout: Duration) {
    // Tokens are small and must not wait for more.
    let _ = stream.set_nodelay(true);
    let socket = SockRef::from(stream);
    let (idle, interval, retries) = KEEP_ALIVE;
    let keep_alive = TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(retries);
    let _ = socket.set_tcp_keepalive(&keep_alive);
    // Ends connections whose client reads nothing, or has gone without a word, while something is written to it.
    #[cfg(target_os = "linux")]
    let _ = socket.set_tcp_user_timeout(Some(read_timeout));
    #[cfg(not(target_os = "linux"))]
    let _ = read_timeout;
}

async fn connection(
    builder: &Builder<TokioExecutor>,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    patience: Duration,
    router: Router,
    mut end: watch::Receiver<bool>,
) {
    let stream = Begun { stream, seen: 0, end: Some(Box::pin(tokio::time::sleep(patience))) };
    let mut serving = pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
    tokio::select! {
        // A connection that breaks is its client's matter.
        _ = serving.as_mut() => return,
        _ = end.wait_for(|&end| end) => {}
    }
    serving.as_mut().graceful_shutdown();
    let _ = serving.await;
}

/// What an HTTP/2 connection begins with.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A connection that must say in time whether it is HTTP/1 or HTTP/2: only then do hyper's own timers run.
struct Begun<S> {
    stream: S,
    /// How much of the preface has come.
    seen: usize,
    /// None once it is clear.
    end: Option<Pin<Box<Sleep>>>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Begun<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(context, buffer);
        let Some(end) = &mut this.end else { return read };
        if read.is_pending() {
            ready!(end.as_mut().poll(context));
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let come = &buffer.filled()[before..];
        let expected = &PREFACE[this.seen..];
        let common = come.len().min(expected.len());
        this.seen += common;
        if come[..common] != expected[..common] || this.seen == PREFACE.len() {
            this.end = None;
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Begun<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
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
