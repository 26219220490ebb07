//! What the workers of the soak run: it reads its message, writes into the book, and ends in the way that was drawn for it.

use crate::soak::books::What;
use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use nix::sys::signal::{SigSet, Signal, raise};
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Where the book is.
pub(super) const BOOK: &str = "SOAK_BOOK";

/// Which run of a worker this is.
pub(super) const RUN: &str = "SOAK_RUN";

/// The status of a command that was drawn to fail.
pub(super) const FAILURE: u8 = 3;

/// The status of a command whose input isn't what was published.
const BAD_INPUT: u8 = 4;

/// More than a pipe holds, in bytes.
const NOISE: usize = 100_000;

/// How a command shall end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum How {
    /// Exit 0.
    Succeed,
    /// Exit with a status of failure.
    Fail,
    /// Killed by a signal.
    Die,
    /// Not at all.
    Hang,
    /// Not at all, and deaf to TERM.
    HangDeaf,
}

/// What was drawn for one run of a worker.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Plan {
    /// How it ends
    pub(super) how: How,
    /// After so many milliseconds
    pub(super) after: u64,
    /// Writes more to standard error than a pipe holds, so it waits for a reader
    #[arg(long)]
    pub(super) noisy: bool,
}

impl Plan {
    /// The arguments that make this program the command.
    pub(super) fn arguments(self) -> Vec<String> {
        let how = self.how.to_possible_value().expect("none is left out");
        let mut arguments = vec!["command".to_owned(), how.get_name().to_owned(), self.after.to_string()];
        arguments.extend(self.noisy.then(|| "--noisy".to_owned()));
        arguments
    }

    /// Is the command.
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
        // What is blocked stays pending, which is as good as ignored.
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
            bail!("survived its own KILL");
        }
        How::Hang | How::HangDeaf => loop {
            std::thread::park();
        },
    }
}

/// A message: its number, its length, and so many bytes that follow from the number.
pub(super) fn body(message: u64, filler: usize) -> Vec<u8> {
    let mut body = format!("{message} {filler}\n").into_bytes();
    let first = (message as usize).wrapping_mul(31);
    body.extend((0..filler).map(|at| first.wrapping_add(at) as u8));
    body
}

/// The number of a message, of which every byte must be there.
fn number(arrived: &[u8]) -> Result<u64> {
    let line = arrived.split(|byte| *byte == b'\n').next();
    let line = std::str::from_utf8(line.unwrap_or_default())?;
    let (message, filler) = line.split_once(' ').context("a message without its length")?;
    let (message, filler) = (message.parse()?, filler.parse()?);
    let intact = filler < arrived.len() && arrived == body(message, filler);
    ensure!(intact, "message {message} has arrived damaged");
    Ok(message)
}

/// One line, in one write, so that the lines of many commands don't mix.
fn write(what: What, message: u64) -> Result<()> {
    let variable = |name: &str| std::env::var(name).with_context(|| format!("{name} is not set"));
    let mut book = OpenOptions::new().append(true).open(variable(BOOK)?)?;
    let attempt = variable("MESSAGE_ATTEMPT").unwrap_or_default();
    let line = format!("{} {} {message} {what:?} {attempt}\n", now(), variable(RUN)?);
    book.write_all(line.as_bytes())?;
    Ok(())
}

/// The time, in nanoseconds; comparable between the processes of one machine.
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
