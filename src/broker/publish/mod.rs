//! Publishing messages, each of them confirmed.

pub(super) mod confirms;
pub(super) mod options;
pub(super) mod publisher;
