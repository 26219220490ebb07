//! `testbed broker`: finds or starts a RabbitMQ.

use anyhow::{Context, Result};
use clap::Parser;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};
use testbed::Broker;

#[derive(Parser)]
#[command(name = "testbed")]
enum Task {
    /// Find or start a RabbitMQ
    ///
    /// With a COMMAND, runs it with BROKER_URL set, and exits with its status. Without one, prints BROKER_URL=... and
    /// runs until its standard input ends, or until it gets SIGINT or SIGTERM.
    Broker {
        /// The command to run, after `--`
        #[arg(last = true)]
        command: Vec<String>,
    },
}

fn main() -> Result<ExitCode> {
    let Task::Broker { command } = Task::parse();
    let broker = Broker::find()?;
    let Some((program, arguments)) = command.split_first() else {
        println!("BROKER_URL={}", broker.url());
        std::io::stdout().flush()?;
        // If a signal kills us, the watchdog removes the broker.
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
        return Ok(ExitCode::SUCCESS);
    };
    let status = Command::new(program)
        .args(arguments)
        .env("BROKER_URL", broker.url())
        .status()
        .with_context(|| format!("cannot run {program}"))?;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    Ok(u8::try_from(code).unwrap_or(1).into())
}
