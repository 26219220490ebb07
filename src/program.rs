//! The two programs in here: they share all but their options and what they do.

use std::{ffi::OsStr, path::Path};

/// What this process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Takes messages.
    Qconsume,
    /// Publishes messages.
    Qpublish,
}

impl Program {
    /// The one of this name, with or without the path to it; qconsume unless it is qpublish's.
    pub fn called(name: Option<&OsStr>) -> Self {
        match name.and_then(|name| Path::new(name).file_name()) {
            Some(name) if name == "qpublish" => Self::Qpublish,
            _ => Self::Qconsume,
        }
    }

    /// Its name.
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
