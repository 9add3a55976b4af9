//! `Events`: the messages of one request to an engine, awaited. The only file that talks to the engine.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use t5gemma_runtime::{Canceller, Engine, Error, Event, Message, Request};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// The messages of a request. Dropping it ends the request in the engine.
pub struct Events {
    received: UnboundedReceiver<Message>,
    /// Whether nobody waits for single tokens.
    skips_tokens: Arc<AtomicBool>,
    canceller: Canceller,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

impl Events {
    /// Submits a request. The caller's thread checks it and compiles its constraints, which may take long. The engine's
    /// thread calls `on_token` with the row of each token.
    ///
    /// # Errors
    /// Those of [`Engine::submit_to`].
    pub fn submit(
        engine: &Engine,
        request: Request,
        mut on_token: impl FnMut(usize) + Send + 'static,
    ) -> Result<Events, Error> {
        // Bounded by the length of the targets: one message for each token and two for each row.
        let (send, received) = unbounded_channel();
        let skips_tokens = Arc::new(AtomicBool::new(false));
        let skips = skips_tokens.clone();
        let sink = move |message| {
            if let Message::Event(Event::Token { row, .. }) = &message {
                on_token(*row);
                if skips.load(Ordering::Relaxed) {
                    return;
                }
            }
            // Whoever no longer receives has cancelled.
            let _ = send.send(message);
        };
        Ok(Events { received, skips_tokens, canceller: engine.submit_to(request, sink)? })
    }

    /// Waits for no more tokens but whole rows, so that the receiver is not woken for each: that costs more than the token.
    pub fn skip_tokens(&self) {
        self.skips_tokens.store(true, Ordering::Relaxed);
    }

    /// The next message; `None` after the last one, or if the engine is gone.
    pub async fn next(&mut self) -> Option<Message> {
        self.received.recv().await
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // No effect on a request that has ended.
        self.canceller.cancel();
    }
}
