//! A variable of the command's environment to set, or to remove if it has no value.

use std::ffi::OsString;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    pub name: &'static str,
    pub value: Option<OsString>,
}
