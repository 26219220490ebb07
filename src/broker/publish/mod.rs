//! Publishing messages, each of them confirmed.

pub(super) mod properties;
pub(super) mod publisher;
