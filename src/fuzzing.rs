//! What the targets of tests/fuzz reach beyond the public items: there with `--cfg fuzzing` only, which cargo-fuzz sets.

pub use crate::{
    broker::fuzzing::{Delivered, Request, answer, message},
    command::environment,
    publish::records,
    report::log_lines,
};
