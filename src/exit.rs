//! The programs' own exit statuses, which never change, as `podFailurePolicy` relies on them. Help, man pages and the
//! documentation's tables are generated from here.

use crate::program::Program;
use nix::libc;
use std::{fmt, io};

/// Up to 78 as in sysexits.h, then as in timeout(1), env(1) and the shell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Usage = 64,
    NoInput = 66,
    Unavailable = 69,
    Software = 70,
    OsError = 71,
    Unconfirmed = 75,
    NoPermission = 77,
    Config = 78,
    TimedOut = 124,
    NotExecutable = 126,
    NotFound = 127,
}

/// The status, its meaning, and whether a retry helps (empty if it depends). The meaning is `-h`'s short form, a colon,
/// and the rest of the sentence.
type Row = (Exit, &'static str, &'static str);

const USAGE: Row = (Exit::Usage, "usage: wrong options, or a malformed or empty BROKER_URL or QUEUE", "no");
const REFUSED: Row = (Exit::NoPermission, "refused: the broker refused the credentials or a permission", "no");

const QCONSUME: [Row; 11] = [
    USAGE,
    (Exit::NoInput, "no message: none came within --wait", "later"),
    (Exit::Unavailable, "unavailable: no broker, or no queue that answers, within --connect-timeout", "yes"),
    (
        Exit::Software,
        "defect: a bug in qconsume, a message that it can't decode (invalid AMQP, or headers too large or too deep), or two connections lost while a message arrived",
        "",
    ),
    (
        Exit::OsError,
        "shortage: no processes, memory or descriptors left, or the command's mount doesn't answer; the command was not run",
        "yes",
    ),
    (
        Exit::Unconfirmed,
        "unconfirmed: the delivery was lost, or the acknowledgement is not confirmed; the message may be delivered again",
        "yes",
    ),
    REFUSED,
    (Exit::Config, "configuration: no such queue or virtual host, an exclusive queue, an unreadable certificate", "no"),
    (Exit::TimedOut, "time limit: --timeout passed", ""),
    (Exit::NotExecutable, "not executable: the command can't be executed", "no"),
    (
        Exit::NotFound,
        "not found: the command, its interpreter, or the program that #!/usr/bin/env names isn't there",
        "no",
    ),
];

const QPUBLISH: [Row; 8] = [
    USAGE,
    (Exit::NoInput, "no input: a file or standard input can't be read", "no"),
    (
        Exit::Unavailable,
        "unavailable: no broker within --connect-timeout, or no reply within --timeout before the first message",
        "yes",
    ),
    (Exit::Software, "defect: a bug in qpublish", ""),
    (Exit::OsError, "shortage: no processes, memory or descriptors left", "yes"),
    (
        Exit::Unconfirmed,
        "unconfirmed: connection lost, nothing confirmed within --timeout, publishers blocked (memory or disk alarm), or queue full",
        "yes",
    ),
    REFUSED,
    (
        Exit::Config,
        "configuration: no such queue, exchange, binding or virtual host; a queue of another type than --declare asks for; a message that is too large; an unreadable certificate",
        "no",
    ),
];

impl Exit {
    pub const fn status(self) -> u8 {
        self as u8
    }
}

pub fn table(program: Program) -> Vec<(String, &'static str, &'static str)> {
    let (own, success, signal) = match program {
        Program::Qconsume => (
            &QCONSUME[..],
            "success: the command succeeded and the broker confirmed the acknowledgement",
            "signal N: ended the command, or stopped qconsume",
        ),
        Program::Qpublish => (
            &QPUBLISH[..],
            "success: the broker confirmed every message",
            "signal N: ended the run before every message was confirmed",
        ),
    };
    let mut rows = vec![("0".to_owned(), success, "")];
    rows.extend(own.iter().map(|(exit, meaning, retry)| (exit.status().to_string(), *meaning, *retry)));
    rows.push(("128+N".to_owned(), signal, ""));
    rows
}

/// As shells report it. Can't overflow, as signals end at 64 on Linux.
pub const fn status_of_signal(signal: i32) -> u8 {
    128 + signal as u8
}

pub const NO_MEMORY: &str = "memory has run out (on this node, or ulimit -v)";

/// Errors that may be gone at the next try: errno, what is missing, and which limit to raise. EFBIG: another
/// node may have another limit. ETXTBSY is no shortage, but it passes, too.
const SHORTAGES: [(i32, &str); 8] = [
    (
        libc::EAGAIN,
        // Also if there is no memory for a thread's stack, with glibc 2.36 and musl 1.2.
        "no more processes or threads may be started (pids limit, ulimit -u), or there is no memory for one (ulimit -v)",
    ),
    (libc::ENOMEM, NO_MEMORY),
    (libc::EMFILE, "no more files may be open in one process (ulimit -n)"),
    (libc::ENFILE, "no more files may be open on this node (fs.file-max), or no more pipes (fs.pipe-user-pages-hard)"),
    (libc::ENOSPC, "no space is left (on the file system of TMPDIR, in memory, or within fs.epoll.max_user_watches)"),
    (libc::EDQUOT, "the user's disk quota is used up (on the file system of TMPDIR)"),
    (libc::EFBIG, "the message is larger than files may be (ulimit -f)"),
    (libc::ETXTBSY, "the program's file is being written"),
];

pub fn shortage(error: &io::Error) -> Option<&'static str> {
    let code = error.raw_os_error()?;
    SHORTAGES.into_iter().find_map(|(short, words)| (short == code).then_some(words))
}

pub fn is_shortage(error: &io::Error) -> bool {
    shortage(error).is_some()
}

/// The shortage that caused a panic, by the panic's message: tokio and std panic if they get no thread or descriptor.
pub fn shortage_in_panic(panic: &str) -> Option<io::Error> {
    let shown = |code| [format!("(os error {code})"), format!("Os {{ code: {code},")];
    let is_named = |code: &i32| shown(*code).iter().any(|text| panic.contains(text));
    SHORTAGES.into_iter().map(|(code, _)| code).find(is_named).map(io::Error::from_raw_os_error)
}

#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    /// One line: what happened, to what, and what to do about it.
    pub message: String,
}

impl Failure {
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }

    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    pub fn config(message: impl Into<String>) -> Self {
        Self::new(Exit::Config, message)
    }

    /// For a failed system call of ours: 71 and what to raise if the system is short of something, otherwise a defect.
    pub fn system(what: impl fmt::Display, error: &io::Error) -> Self {
        match shortage(error) {
            Some(words) => Self::new(Exit::OsError, format!("{what}: {words}: {error}; another try may help")),
            None => Self::new(Exit::Software, format!("{what}: {error}")),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_statuses_are_those_that_policies_rely_on() {
        let numbers = QCONSUME.map(|(exit, ..)| exit.status());
        assert_eq!(numbers, [64, 66, 69, 70, 71, 75, 77, 78, 124, 126, 127]);
        assert_eq!(status_of_signal(9), 137);
        assert_eq!(status_of_signal(15), 143);
        assert_eq!(status_of_signal(64), 192);
    }

    #[test]
    fn every_meaning_has_a_short_form() {
        for program in [Program::Qconsume, Program::Qpublish] {
            for (status, meaning, _) in table(program) {
                let short = meaning.split(':').next().unwrap();
                assert!(short.len() < 16 && short != meaning, "{status} {meaning}");
            }
        }
    }

    #[test]
    fn a_shortage_is_no_defect() {
        let failure = |code| Failure::system("can't start", &io::Error::from_raw_os_error(code));
        for (code, words) in SHORTAGES {
            assert_eq!(failure(code).exit, Exit::OsError);
            let error = io::Error::from_raw_os_error(code);
            assert_eq!(failure(code).message, format!("can't start: {words}: {error}; another try may help"));
            assert!(shortage_in_panic(&format!("can't spawn thread: {error}")).is_some());
            assert!(shortage_in_panic(&format!("failed to create: {error:?}")).is_some());
        }
        let processes = "no more processes or threads may be started (pids limit, ulimit -u)";
        assert!(failure(libc::EAGAIN).message.contains(processes));
        assert_eq!(failure(libc::EINVAL).exit, Exit::Software);
        assert!(shortage_in_panic("index out of bounds (os error 1)").is_none());
    }
}
