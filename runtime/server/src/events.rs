//! `Events`: the messages of one request to an engine, awaited. The only file that talks to the engine.

use std::fmt;

use t5gemma_runtime::{Canceller, Engine, Error, Message, Request};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// The messages of a request. Dropping it ends the request in the engine.
pub struct Events {
    received: UnboundedReceiver<Message>,
    canceller: Canceller,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

impl Events {
    /// Submits a request. The caller's thread checks it and compiles its constraints, which may take long.
    ///
    /// # Errors
    /// Those of [`Engine::submit_to`].
    pub fn submit(engine: &Engine, request: Request) -> Result<Events, Error> {
        // Bounded by the length of the targets: one message for each token and two for each row.
        let (send, received) = unbounded_channel();
        let sink = move |message| {
            // Whoever no longer receives has cancelled.
            let _ = send.send(message);
        };
        Ok(Events { received, canceller: engine.submit_to(request, sink)? })
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
