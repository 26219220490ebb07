//! The command of the soak's workers: it reads its message, writes into the book, and ends as its plan says.

use crate::soak::books::What;
use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use nix::sys::signal::{SigSet, Signal, raise};
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The variable with the book's path.
pub(super) const BOOK: &str = "SOAK_BOOK";

/// The variable with the run's number.
pub(super) const RUN: &str = "SOAK_RUN";

/// The status of a command whose plan is to fail.
pub(super) const FAILURE: u8 = 3;

/// The status of a command whose message is damaged.
const BAD_INPUT: u8 = 4;

/// In bytes: more than a pipe holds.
const NOISE: usize = 100_000;

/// How a command is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum How {
    /// Exit 0.
    Succeed,
    /// Exit with a status of failure.
    Fail,
    /// Kill itself.
    Die,
    /// Never end.
    Hang,
    /// Never end, and ignore SIGTERM.
    HangDeaf,
}

/// The plan for one run of a worker's command.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Plan {
    /// How to end
    pub(super) how: How,
    /// When to end, in milliseconds
    pub(super) after: u64,
    /// Write more to standard error than a pipe holds, and so wait for a reader
    #[arg(long)]
    pub(super) noisy: bool,
}

impl Plan {
    /// The arguments that make this program carry out the plan.
    pub(super) fn arguments(self) -> Vec<String> {
        let how = self.how.to_possible_value().expect("no value is skipped");
        let mut arguments = vec!["command".to_owned(), how.get_name().to_owned(), self.after.to_string()];
        arguments.extend(self.noisy.then(|| "--noisy".to_owned()));
        arguments
    }

    /// Carries out the plan, as the command.
    pub fn carry_out(self) -> ExitCode {
        match obey(self) {
            Ok(status) => ExitCode::from(status),
            Err(error) => {
                eprintln!("soak: {error:#}");
                ExitCode::from(BAD_INPUT)
            }
        }
    }
}

fn obey(plan: Plan) -> Result<u8> {
    if plan.how == How::HangDeaf {
        // A blocked signal stays pending, which has the same effect as ignoring it.
        SigSet::from(Signal::SIGTERM).thread_block()?;
    }
    let mut body = Vec::new();
    std::io::stdin().read_to_end(&mut body)?;
    let message = match number(&body) {
        Ok(message) => message,
        Err(error) => {
            write(What::Bad, u64::MAX)?;
            return Err(error);
        }
    };
    write(What::Start, message)?;
    if plan.noisy {
        std::io::stderr().write_all(&[b'.'; NOISE])?;
    }
    std::thread::sleep(Duration::from_millis(plan.after));
    match plan.how {
        How::Succeed => {
            write(What::Done, message)?;
            Ok(0)
        }
        How::Fail => Ok(FAILURE),
        How::Die => {
            raise(Signal::SIGKILL)?;
            bail!("survived its own SIGKILL");
        }
        How::Hang | How::HangDeaf => loop {
            std::thread::park();
        },
    }
}

/// A message's body: its number, the filler's length, and the filler, which depends on the number.
pub(super) fn body(message: u64, filler: usize) -> Vec<u8> {
    let mut body = format!("{message} {filler}\n").into_bytes();
    let first = (message as usize).wrapping_mul(31);
    body.extend((0..filler).map(|at| first.wrapping_add(at) as u8));
    body
}

/// A message's number; fails if any byte is missing or wrong.
fn number(arrived: &[u8]) -> Result<u64> {
    let line = arrived.split(|byte| *byte == b'\n').next();
    let line = std::str::from_utf8(line.unwrap_or_default())?;
    let (message, filler) = line.split_once(' ').context("a message without its length")?;
    let (message, filler) = (message.parse()?, filler.parse()?);
    let intact = filler < arrived.len() && arrived == body(message, filler);
    ensure!(intact, "message {message} is damaged");
    Ok(message)
}

/// Writes a line into the book, in one write, so that lines of several commands don't mix.
fn write(what: What, message: u64) -> Result<()> {
    let variable = |name: &str| std::env::var(name).with_context(|| format!("{name} is not set"));
    let mut book = OpenOptions::new().append(true).open(variable(BOOK)?)?;
    let attempt = variable("MESSAGE_ATTEMPT").unwrap_or_default();
    let line = format!("{} {} {message} {what:?} {attempt}\n", now(), variable(RUN)?);
    book.write_all(line.as_bytes())?;
    Ok(())
}

/// The time in nanoseconds; comparable between processes.
pub(super) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_lacks_a_byte_is_noticed() {
        let whole = body(77, 300);
        assert_eq!(number(&whole).unwrap(), 77);
        assert!(number(&whole[..whole.len() - 1]).is_err());
        assert!(number(b"").is_err());
    }
}
