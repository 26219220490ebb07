//! `bench`: what qconsume costs beside amqp-consume.

use std::process::ExitCode;
use testbed::bench;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match bench::Options::parse(&args).and_then(|options| bench::run(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
