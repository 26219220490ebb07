//! `soak`: thousands of messages, dozens of workers, every fault at random, and the books about it.

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
