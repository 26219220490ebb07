//! The two programs in here, and how each of them starts and ends.

use crate::{exit_on_panic, fail, publish, report, run, signals};
use std::{ffi::OsStr, path::Path, process::exit};

/// What this process is. The two share all but their options and their story: about nine tenths of the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    Qconsume,
    Qpublish,
}

impl Program {
    /// The one of this name, with or without the path to it; qconsume unless it is qpublish's.
    #[must_use]
    pub fn called(name: Option<&OsStr>) -> Self {
        match name.and_then(|name| Path::new(name).file_name()) {
            Some(name) if name == "qpublish" => Self::Qpublish,
            _ => Self::Qconsume,
        }
    }

    /// Parse, run, print one error, exit.
    pub fn main(self) -> ! {
        // First of all: as PID 1 a signal without a handler would be lost.
        let held = signals::hold();
        if self == Self::Qpublish {
            report::set_program_name("qpublish");
        }
        exit_on_panic();
        debug_assert!(held.is_ok());
        let arguments = std::env::args_os();
        let status = match self {
            Self::Qconsume => run(arguments),
            Self::Qpublish => publish::run(arguments),
        };
        // Not by returning: see `block_on`.
        exit(status.unwrap_or_else(|error| fail(&error)).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_decides() {
        for (name, program) in [
            (Some("qpublish"), Program::Qpublish),
            (Some("/usr/bin/qpublish"), Program::Qpublish),
            (Some("./qpublish"), Program::Qpublish),
            (Some("qconsume"), Program::Qconsume),
            (Some("/qpublish/qconsume"), Program::Qconsume),
            (Some("my-qpublish"), Program::Qconsume),
            (Some(""), Program::Qconsume),
            (None, Program::Qconsume),
        ] {
            assert_eq!(Program::called(name.map(OsStr::new)), program, "{name:?}");
        }
    }
}
