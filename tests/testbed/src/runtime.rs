//! The one thread on which everything asynchronous of the testbed runs.

use std::sync::{OnceLock, mpsc};
use tokio::runtime::{Builder, Handle};

/// The runtime's handle. Its thread lives as long as the process, so a connection opened by one test's thread goes on
/// working after that thread has ended.
pub(crate) fn handle() -> &'static Handle {
    static HANDLE: OnceLock<Handle> = OnceLock::new();
    HANDLE.get_or_init(|| {
        let (sender, receiver) = mpsc::channel();
        std::thread::Builder::new()
            .name("testbed".into())
            .spawn(move || {
                let runtime = Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .expect("a tokio runtime for the testbed");
                let _ = sender.send(runtime.handle().clone());
                runtime.block_on(std::future::pending::<()>());
            })
            .expect("a thread for the testbed's runtime");
        receiver.recv().expect("the testbed's runtime has started")
    })
}

/// Runs a future of lapin's or tokio's to its end, with the testbed's runtime driving it.
pub fn block_on<F: Future>(future: F) -> F::Output {
    handle().block_on(future)
}
