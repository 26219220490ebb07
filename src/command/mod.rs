//! The only part that knows processes.

mod find;
mod left;
mod reap;
mod spawn;
mod stdin;
mod supervise;

pub use find::find;
pub use reap::Reaper;
pub use spawn::Command;
#[cfg(fuzzing)]
pub use spawn::environment;
pub use stdin::holding;
pub use supervise::{Limits, OnLost, Process, Supervised, Target, supervise};
