//! The exit statuses that are qconsume's own: an interface for `podFailurePolicy`, so they never change.

use std::{fmt, io};

/// Why qconsume itself, not the command, ended the run.
///
/// The numbers come from sysexits.h (64 to 78) and from timeout(1), env(1) and the shell (124 to 127).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Usage: options, or a malformed or empty `BROKER_URL` or `QUEUE`. Retrying doesn't help.
    Usage = 64,
    /// No message within `--wait`; of qpublish's, an input that can't be read.
    Empty = 66,
    /// The broker was not reachable within `--connect-timeout`. Retrying helps.
    Unavailable = 69,
    /// A defect in qconsume.
    Software = 70,
    /// The system is short of processes, memory or descriptors (`EX_OSERR`): nothing was run. Retrying helps.
    OsError = 71,
    /// The delivery was lost, or its acknowledgement not confirmed: the message may come again. Of qpublish's, messages
    /// that the broker has not confirmed.
    Lost = 75,
    /// The broker refused the credentials, or a permission. Retrying doesn't help.
    NoPermission = 77,
    /// Configuration: no such queue or virtual host, unreadable certificate, exclusive queue.
    Config = 78,
    /// `--timeout` passed.
    TimedOut = 124,
    /// The command is there but can't be executed.
    NotExecutable = 126,
    /// There is no such command.
    NotFound = 127,
}

impl Exit {
    /// The number that the process exits with.
    #[must_use]
    pub const fn status(self) -> u8 {
        self as u8
    }
}

/// The status of something that ended on a signal, as shells report it.
#[must_use]
pub const fn status_of_signal(signal: i32) -> u8 {
    // Real-time signals end at 64 on Linux, so this can't overflow.
    128 + signal as u8
}

/// Whether the system is short of processes, memory or descriptors for now, or a program's file is being written.
#[must_use]
pub fn is_shortage(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::ETXTBSY)
    )
}

/// An error that ends the run, with the status that it ends with.
#[derive(Debug)]
pub struct Failure {
    /// What the process exits with.
    pub exit: Exit,
    /// One line: what happened, to what, and what to do about it.
    pub message: String,
}

impl Failure {
    /// A system call that failed: 71 where the system is short of something, 70 otherwise.
    pub fn system(what: impl fmt::Display, error: &io::Error) -> Self {
        if is_shortage(error) {
            let message =
                format!("{what}: {error}; the system is short of it, another try may help");
            Self::new(Exit::OsError, message)
        } else {
            Self::new(Exit::Software, format!("{what}: {error}"))
        }
    }

    /// A failure with this status and message.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
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
        let all = [
            (Exit::Usage, 64),
            (Exit::Empty, 66),
            (Exit::Unavailable, 69),
            (Exit::Software, 70),
            (Exit::OsError, 71),
            (Exit::Lost, 75),
            (Exit::NoPermission, 77),
            (Exit::Config, 78),
            (Exit::TimedOut, 124),
            (Exit::NotExecutable, 126),
            (Exit::NotFound, 127),
        ];
        for (exit, status) in all {
            assert_eq!(exit.status(), status, "{exit:?}");
        }
        assert_eq!(status_of_signal(9), 137);
        assert_eq!(status_of_signal(15), 143);
        assert_eq!(status_of_signal(64), 192);
    }
}
