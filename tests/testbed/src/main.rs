//! `testbed broker`: finds or starts a RabbitMQ for people and scripts.

use anyhow::{Context, Result, bail};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};
use testbed::Broker;

const USAGE: &str = "usage: testbed broker [-- COMMAND [ARG]...]
broker: Finds or starts a RabbitMQ. With a COMMAND, runs it with BROKER_URL set and ends with its status. Without one, prints
BROKER_URL=... and stays until its standard input ends, or until it gets SIGINT or SIGTERM.";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("testbed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<u8> {
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["broker"] => {
            let broker = Broker::find()?;
            println!("BROKER_URL={}", broker.url());
            std::io::stdout().flush()?;
            // A signal simply kills us: the watchdog then removes the broker.
            std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
            Ok(0)
        }
        ["broker", "--", command, rest @ ..] => {
            let broker = Broker::find()?;
            let status = Command::new(command)
                .args(rest)
                .env("BROKER_URL", broker.url())
                .status()
                .with_context(|| format!("cannot run {command}"))?;
            let code = status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
            Ok(u8::try_from(code).unwrap_or(1))
        }
        _ => bail!("{USAGE}"),
    }
}
