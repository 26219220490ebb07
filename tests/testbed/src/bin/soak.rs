//! `soak`: thousands of messages, dozens of workers, random faults, and a record of what happened to each message.

use clap::Parser;
use std::process::ExitCode;
use testbed::soak::{self, Options, Role};

fn main() -> anyhow::Result<ExitCode> {
    let options = Options::parse();
    if let Some(Role::Command(plan)) = options.role {
        return Ok(plan.carry_out());
    }
    let report = soak::run(&options)?;
    print!("{report}");
    Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
