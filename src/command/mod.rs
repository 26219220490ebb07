//! The only part that knows processes.

mod feed;
mod find;
mod reap;
mod spawn;
mod supervise;

pub use find::{Executable, find};
pub use reap::Reaper;
pub use spawn::{Command, Variable};
pub use supervise::{Limits, OnLost, Outcome, Process, Target, supervise};
