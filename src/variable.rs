//! An environment variable of the command.

use std::ffi::OsString;

/// An environment variable to set, or, without a value, to remove.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    pub name: &'static str,
    pub value: Option<OsString>,
}
