//! `qconsume`: parse, run, print one error, exit.

use qconsume::{exit_on_panic, fail, run, signals};
use std::process::exit;

fn main() {
    // First of all: as PID 1 a signal without a handler would be lost.
    let held = signals::hold();
    exit_on_panic();
    debug_assert!(held.is_ok());
    // Not by returning: see `block_on`.
    let status = run(std::env::args_os()).unwrap_or_else(|error| fail(&error));
    exit(status.into());
}
