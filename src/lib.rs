//! `qconsume -- COMMAND` takes exactly one message from `$QUEUE` on `$BROKER_URL`, pipes it to COMMAND on standard
//! input, acknowledges it only after COMMAND has exited with success, and exits with COMMAND's status, so that one
//! pod completes one unit of work.
//!
//! `worker` is one run, from top to bottom. [`verdict`] decides, without I/O. Only [`broker`] uses lapin, and only
//! `command` handles processes. [`publish`] is the other program, qpublish, which fills a queue.

#![deny(unsafe_code)]

mod abort;
mod allocator;
pub mod broker;
pub mod cli;
mod clock;
mod command;
pub mod exit;
mod program;
pub mod publish;
mod report;
pub mod settlement;
mod signals;
mod variable;
pub mod verdict;
mod worker;

/// What the fuzz targets in tests/fuzz need that isn't public otherwise. cargo-fuzz sets `--cfg fuzzing`.
#[cfg(fuzzing)]
pub mod fuzzing {
    pub use crate::{
        broker::fuzzing::{Delivered, Request, answer, message},
        command::environment,
        publish::records,
        report::log_lines,
    };
}

use cli::{Options, OutputOptions, Request};
use exit::Failure;
pub use program::Program;
use report::RunSummary;
use std::{ffi::OsString, future::Future, io::Write};

pub fn main(program: Program) -> ! {
    // Before anything else, so that no signal comes earlier.
    signals::block();
    program.set_current();
    exit_on_panic();
    let arguments: Vec<_> = std::env::args_os().collect();
    let ended = match program {
        Program::Qconsume => run(&arguments, worker::work),
        Program::Qpublish => run(&arguments, publish::publish),
    };
    report::exit(ended.unwrap_or_else(report::report_failure))
}

fn run<O: Options, F: Future<Output = Result<u8, Failure>>>(
    arguments: &[OsString],
    entry: impl FnOnce(O, signals::Signals) -> F,
) -> Result<u8, Failure> {
    match cli::parse::<O>(arguments) {
        Ok(Request::Run(options)) => {
            options.output().start();
            block_on(|signals| entry(*options, signals))
        }
        Ok(Request::Show(text)) => {
            // If standard output is closed, nobody wants the help: that is no failure.
            let _ = std::io::stdout().write_all(text.as_bytes());
            Ok(0)
        }
        Err(failure) => {
            OutputOptions::start_after_failed_parse(arguments);
            Err(failure)
        }
    }
}

/// Runs `entry` on the main thread, as `RunningCommand::start` requires.
fn block_on<F: Future<Output = Result<u8, Failure>>>(entry: impl FnOnce(signals::Signals) -> F) -> Result<u8, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::system("can't start the event loop", &error))?;
    let status = runtime.block_on(async {
        let signals = signals::install().map_err(|error| Failure::system("can't handle signals", &error))?;
        entry(signals).await
    });
    // The process ends soon. Dropping the runtime would wait for a name look-up that is still running.
    std::mem::forget(runtime);
    status
}

/// A panic on any thread ends the process, so that the other threads don't go on with half the work.
fn exit_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        let (end, text) = abort::panicked(&panic.to_string());
        let summary = RunSummary { source: end.source, ..RunSummary::without_message(end.status, text) };
        report::exit(report::report_without_options(&summary));
    }));
}
