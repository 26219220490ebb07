//! Which of the crate's two programs this process runs.

use std::{ffi::OsStr, path::Path, sync::OnceLock};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    Qconsume,
    Qpublish,
}

static CURRENT: OnceLock<Program> = OnceLock::new();

impl Program {
    /// Takes the first word of the command line, with or without a path. It means qconsume unless it is `qpublish`.
    pub fn called(name: Option<&OsStr>) -> Self {
        match name.and_then(|name| Path::new(name).file_name()) {
            Some(name) if name == "qpublish" => Self::Qpublish,
            _ => Self::Qconsume,
        }
    }

    pub fn set_current(self) {
        let _ = CURRENT.set(self);
    }

    /// Qconsume if [`Program::set_current`] was never called, as in unit tests.
    pub fn current() -> Self {
        CURRENT.get().copied().unwrap_or(Self::Qconsume)
    }

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
