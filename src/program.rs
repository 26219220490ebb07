//! The two programs in this crate.

use std::{ffi::OsStr, path::Path, sync::OnceLock};

/// The program that this process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Takes messages.
    Qconsume,
    /// Publishes messages.
    Qpublish,
}

static CURRENT: OnceLock<Program> = OnceLock::new();

impl Program {
    /// The program that this file name, with or without its path, stands for: qconsume unless it is `qpublish`.
    pub fn called(name: Option<&OsStr>) -> Self {
        match name.and_then(|name| Path::new(name).file_name()) {
            Some(name) if name == "qpublish" => Self::Qpublish,
            _ => Self::Qconsume,
        }
    }

    /// Makes it the program that this process runs.
    pub fn set_current(self) {
        let _ = CURRENT.set(self);
    }

    /// The program that this process runs: qconsume if [`Program::set_current`] was never called, as in unit tests.
    pub fn current() -> Self {
        CURRENT.get().copied().unwrap_or(Self::Qconsume)
    }

    /// Its name, as log lines and the field `source` have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qconsume => "qconsume",
            Self::Qpublish => "qpublish",
        }
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
