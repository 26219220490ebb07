//! Finds, starts, supervises and reaps the command: the only part that handles processes.

mod find;
mod processes;
mod reap;
mod spawn;
mod stat;
mod stdin;
mod supervise;

pub use find::find;
pub use reap::Reaper;
pub use spawn::RunningCommand;
#[cfg(fuzzing)]
pub use spawn::environment;
pub use stdin::stdin_with;
#[cfg(test)]
pub use supervise::OnLost;
pub use supervise::{Limits, Process, Target, supervise};
