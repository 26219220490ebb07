//! What the workers of the soak run: it reads its message, writes into the book, and ends in the way that was drawn for it.

use crate::soak::books::Entry;
use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal, raise};
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The first argument of this program when it is to be the command.
const COMMAND: &str = "command";

/// Where the book is.
pub(super) const BOOK: &str = "SOAK_BOOK";

/// Which run of a worker this is.
pub(super) const RUN: &str = "SOAK_RUN";

/// The status of a command that was drawn to fail.
pub(super) const FAILURE: u8 = 3;

/// The status of a command whose input isn't what was published.
const BAD_INPUT: u8 = 4;

/// How a command shall end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// How it ends.
    pub how: How,
    /// After how long.
    pub after: Duration,
}

impl Plan {
    /// The arguments that make this program the command.
    pub(super) fn arguments(self) -> [String; 3] {
        [
            COMMAND.to_owned(),
            NAMES
                .iter()
                .find(|(how, _)| *how == self.how)
                .expect("all have one")
                .1
                .to_owned(),
            self.after.as_millis().to_string(),
        ]
    }
}

const NAMES: [(How, &str); 5] = [
    (How::Succeed, "succeed"),
    (How::Fail, "fail"),
    (How::Die, "die"),
    (How::Hang, "hang"),
    (How::HangDeaf, "hang-deaf"),
];

/// The plan, if these are the arguments of the command.
pub fn command_plan(args: &[String]) -> Option<Result<Plan>> {
    match args {
        [first, how, after] if first == COMMAND => {
            let how = NAMES
                .iter()
                .find(|(_, name)| name == how)
                .map(|(how, _)| *how);
            let plan = how.zip(after.parse().ok());
            let plan = plan.map(|(how, after)| Plan {
                how,
                after: Duration::from_millis(after),
            });
            Some(plan.context("not the plan of a command"))
        }
        _ => None,
    }
}

/// Is the command.
pub fn command(plan: Result<Plan>) -> ExitCode {
    match plan.and_then(obey) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::from(BAD_INPUT)
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
            write(Entry::BAD, u64::MAX)?;
            return Err(error);
        }
    };
    write(Entry::START, message)?;
    std::thread::sleep(plan.after);
    match plan.how {
        How::Succeed => {
            write(Entry::DONE, message)?;
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
    body.extend((0..filler).map(|at| filler_byte(message, at)));
    body
}

fn filler_byte(message: u64, at: usize) -> u8 {
    (message as usize).wrapping_mul(31).wrapping_add(at) as u8
}

/// The number of a message, of which every byte must be there.
fn number(body: &[u8]) -> Result<u64> {
    let end = body.iter().position(|byte| *byte == b'\n');
    let end = end.context("a message without its first line")?;
    let line = std::str::from_utf8(&body[..end])?;
    let (message, filler) = line
        .split_once(' ')
        .context("a message without its length")?;
    let (message, filler): (u64, usize) = (message.parse()?, filler.parse()?);
    let rest = &body[end + 1..];
    let intact = rest.len() == filler
        && rest
            .iter()
            .enumerate()
            .all(|(at, byte)| *byte == filler_byte(message, at));
    if !intact {
        bail!("message {message} has arrived damaged");
    }
    Ok(message)
}

/// One line, in one write, so that the lines of many commands don't mix.
fn write(what: &str, message: u64) -> Result<()> {
    let variable = |name: &str| std::env::var(name).with_context(|| format!("{name} is not set"));
    let mut book = OpenOptions::new().append(true).open(variable(BOOK)?)?;
    let attempt = variable("MESSAGE_ATTEMPT").unwrap_or_default();
    let line = format!("{} {} {message} {what} {attempt}\n", now(), variable(RUN)?);
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
