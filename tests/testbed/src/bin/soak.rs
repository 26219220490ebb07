//! `soak`: thousands of messages, dozens of workers, every fault at random, and the books about it.

use std::process::ExitCode;
use testbed::soak;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(plan) = soak::command_plan(&args) {
        // What the workers under test run is this same program.
        return soak::command(plan);
    }
    match soak::Options::parse(&args).and_then(|options| soak::run(&options)) {
        Ok(report) => {
            print!("{report}");
            if report.passed() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::from(2)
        }
    }
}
