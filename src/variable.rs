//! An environment variable of the command.

use std::ffi::OsString;

/// An environment variable to set, or, without a value, to remove.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// Its value.
    pub value: Option<OsString>,
}
