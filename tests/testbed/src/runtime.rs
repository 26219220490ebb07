//! The one thread on which everything asynchronous of the testbed runs.

use std::sync::LazyLock;
use tokio::runtime::{Builder, Handle, Runtime};

/// Its thread lives as long as the process, so a connection opened by one test's thread goes on working after that thread
/// has ended.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    let mut runtime = Builder::new_multi_thread();
    runtime.worker_threads(1).enable_all();
    runtime.build().expect("a tokio runtime for the testbed")
});

pub(crate) fn handle() -> &'static Handle {
    RUNTIME.handle()
}

/// Runs a future of lapin's or tokio's to its end, with the testbed's runtime driving it.
pub fn block_on<F: Future>(future: F) -> F::Output {
    RUNTIME.block_on(future)
}
