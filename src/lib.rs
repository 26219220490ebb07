//! `qconsume -- COMMAND` takes exactly one message from `$QUEUE` on `$BROKER_URL`, pipes it to COMMAND on standard
//! input, acknowledges it only after COMMAND has exited with success, and exits with COMMAND's status, so that one
//! pod completes one unit of work.
//!
//! [`worker`] is the story; [`verdict`] decides, without I/O; [`broker`] is the only part that knows lapin,
//! [`command`] the only one that knows processes. [`publish`] is qpublish, which fills a queue.

#![deny(unsafe_code)]

pub mod broker;
pub mod cli;
mod clock;
pub mod command;
pub mod exit;
mod program;
pub mod publish;
pub mod report;
pub mod signals;
pub mod verdict;
pub mod worker;

use anyhow::Context;
use cli::{Options, Request};
use exit::Exit;
pub use program::Program;
use std::{ffi::OsString, future::Future, io::Write};

// musl's own asks the kernel for every page, a hundred times in a run with one small message: ten percent of its time.
#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

/// Runs qconsume with this command line, and returns the exit status.
///
/// # Errors
/// What ended the run before the command could, or instead of it: an [`exit::Failure`], or else a defect.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> anyhow::Result<u8> {
    let arguments: Vec<_> = arguments.into_iter().collect();
    match cli::parse(&arguments)? {
        Request::Run(options) => work(*options),
        Request::Show(text) => {
            show(&text);
            Ok(0)
        }
    }
}

// Its future is large, and so is what clap needs: they needn't be on the stack together.
#[inline(never)]
fn work(options: Options) -> anyhow::Result<u8> {
    report::start(options.output.clone());
    block_on(async {
        let signals = signals::Signals::install()
            .map_err(|error| exit::Failure::system("can't handle signals", &error))?;
        Ok(worker::work(options, signals).await?)
    })?
}

/// Drives a future on this thread alone: a command dies with the thread that started it.
///
/// # Errors
/// When the system has no more to give.
pub fn block_on<T>(future: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("can't start")?;
    let output = runtime.block_on(future);
    // Dropping it would wait for a name look-up that nobody needs any more; the process ends soon.
    std::mem::forget(runtime);
    Ok(output)
}

/// The status that this error ends the process with, after it was printed.
#[must_use]
pub fn fail(error: &anyhow::Error) -> u8 {
    let exit = error
        .downcast_ref::<exit::Failure>()
        .map_or(Exit::Software, |failure| failure.exit);
    report::failure(format!("{error:#}"), exit);
    exit.status()
}

/// Writes to standard output, which may be closed.
pub fn show(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// A panic is a defect: says so, and ends with 70 wherever it happens, so that nothing goes on half done.
pub fn exit_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        report::failure(format!("defect, please report it: {panic}"), Exit::Software);
        std::process::exit(Exit::Software.status().into());
    }));
}
