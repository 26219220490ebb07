//! The thread on which the testbed's asynchronous code runs.

use std::sync::LazyLock;
use tokio::runtime::{Builder, Handle, Runtime};

/// Lives as long as the process, so a connection that one test's thread has opened still works after that thread has
/// ended.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    let mut runtime = Builder::new_multi_thread();
    runtime.worker_threads(1).enable_all();
    runtime.build().expect("a tokio runtime for the testbed")
});

pub(crate) fn handle() -> &'static Handle {
    RUNTIME.handle()
}

/// Runs a future to its end on the testbed's runtime.
pub fn block_on<F: Future>(future: F) -> F::Output {
    RUNTIME.block_on(future)
}
