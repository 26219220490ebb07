//! `qconsume -- COMMAND` takes exactly one message from `$QUEUE` on `$BROKER_URL`, pipes it to COMMAND on standard
//! input, acknowledges it only after COMMAND has exited with success, and exits with COMMAND's status, so that one
//! pod completes one unit of work.
//!
//! [`worker`] is one run, from top to bottom; [`verdict`] decides, without I/O; [`broker`] is the only part that knows lapin,
//! [`command`] the only one that knows processes. [`publish`] is qpublish, which fills a queue.

#![deny(unsafe_code)]

mod allocator;
pub mod broker;
pub mod cli;
mod clock;
pub mod command;
pub mod exit;
mod program;
pub mod publish;
pub mod report;
pub mod settlement;
pub mod signals;
pub mod variable;
pub mod verdict;
pub mod worker;

/// What the targets of tests/fuzz need that isn't public otherwise. cargo-fuzz sets `--cfg fuzzing`.
#[cfg(fuzzing)]
pub mod fuzzing {
    pub use crate::{
        broker::fuzzing::{Delivered, Request, answer, message},
        command::environment,
        publish::records,
        report::log_lines,
    };
}

use cli::{Options, Request};
use exit::{Exit, Failure};
pub use program::Program;
use std::{ffi::OsString, future::Future, io::Write};

/// Parse, run, print one error, exit.
pub fn main(program: Program) -> ! {
    // First of all: as PID 1 a signal without a handler would be lost.
    let held = signals::hold();
    debug_assert!(held.is_ok());
    report::set_program_name(program.name());
    exit_on_panic();
    let arguments: Vec<_> = std::env::args_os().collect();
    let ended = match program {
        Program::Qconsume => run(&arguments, worker::work),
        Program::Qpublish => run(&arguments, publish::publish),
    };
    let status = ended.unwrap_or_else(|error| {
        // What nobody has given a status to is a defect.
        let failure =
            error.downcast::<Failure>().unwrap_or_else(|error| Failure::new(Exit::Software, format!("{error:#}")));
        report::failure(failure)
    });
    // Not by returning: see `block_on`.
    report::exit(status)
}

fn run<O: Options, F: Future<Output = Result<u8, Failure>>>(
    arguments: &[OsString],
    entry: impl FnOnce(O, signals::Signals) -> F,
) -> anyhow::Result<u8> {
    match cli::parse::<O>(arguments)? {
        Request::Run(options) => {
            options.output().start();
            Ok(block_on(|signals| entry(*options, signals))?)
        }
        Request::Show(text) => {
            // It may be closed.
            let _ = std::io::stdout().write_all(text.as_bytes());
            Ok(0)
        }
    }
}

/// Drives a program's asynchronous entry (`worker::work`, `publish::publish`) on this thread alone: a command dies with the thread that started it.
fn block_on<F: Future<Output = Result<u8, Failure>>>(entry: impl FnOnce(signals::Signals) -> F) -> Result<u8, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::system("can't start", &error))?;
    let status = runtime.block_on(async {
        let signals = signals::install().map_err(|error| Failure::system("can't handle signals", &error))?;
        entry(signals).await
    });
    // Dropping it would wait for a name look-up that nobody needs any more; the process ends soon.
    std::mem::forget(runtime);
    status
}

/// A panic ends the process wherever it happens, so that nothing goes on half done. It is a defect, unless the system had
/// no thread or descriptor left.
fn exit_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        let failure = match exit::shortage_behind(&panic.to_string()) {
            Some(error) => Failure::system("can't go on", &error),
            None => Failure::new(Exit::Software, format!("defect, please report it: {panic}")),
        };
        report::exit(report::failure(failure));
    }));
}
