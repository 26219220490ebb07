//! How a run ends that can't go on, because memory has run out or a thread has panicked.

use crate::{
    exit::{Exit, shortage, shortage_in_panic},
    program::Program,
};
use std::sync::{
    OnceLock,
    atomic::{AtomicBool, AtomicU8, Ordering::Relaxed},
};

static COMMAND_STARTED: AtomicBool = AtomicBool::new(false);

/// 0 for none.
static DEAD_LETTERED: AtomicU8 = AtomicU8::new(0);

/// The status, and whose it is.
static RESULT: OnceLock<(u8, &str)> = OnceLock::new();

/// From now on, a shortage may kill the running command: the status is 75 instead of 71.
pub fn note_command_started() {
    COMMAND_STARTED.store(true, Relaxed);
}

/// The message is settled: a shortage costs nothing, and is 71 again.
pub fn note_message_done() {
    COMMAND_STARTED.store(false, Relaxed);
}

/// With `--keep-going`: from now on this is the run's status, also if memory runs out.
pub fn note_dead_lettered(status: u8) {
    DEAD_LETTERED.store(status, Relaxed);
}

/// The run has ended with this status, and is only cleaning up. `source`: whose status it is.
pub fn note_result(status: u8, source: &'static str) {
    // Only the first one is the run's: a panic while cleaning up is reported, too.
    let _ = RESULT.set((status, source));
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    Shortage,
    Defect,
}

/// The status, whose it is, and what to say before and after the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    pub status: u8,
    pub source: &'static str,
    pub before: &'static str,
    pub after: &'static str,
}

/// Doesn't allocate.
pub fn out_of_memory() -> End {
    Stage::now().end(Reason::Shortage)
}

/// The end, and the whole text.
pub fn panicked(panic: &str) -> (End, String) {
    Stage::now().panicked(panic)
}

/// How far the run is.
#[derive(Clone, Copy, Debug, Default)]
struct Stage {
    command_started: bool,
    dead_lettered: Option<u8>,
    result: Option<(u8, &'static str)>,
}

impl Stage {
    fn now() -> Self {
        Self {
            command_started: COMMAND_STARTED.load(Relaxed),
            dead_lettered: Some(DEAD_LETTERED.load(Relaxed)).filter(|status| *status != 0),
            result: RESULT.get().copied(),
        }
    }

    fn end(self, reason: Reason) -> End {
        let (exit, after) = match reason {
            Reason::Shortage if self.command_started => (
                Exit::Unconfirmed,
                "; the command is killed if it still runs, and its message may be delivered again (not with --no-ack)",
            ),
            Reason::Shortage => (Exit::OsError, "; another try may help"),
            Reason::Defect => (Exit::Software, ""),
        };
        let ours = Program::current().name();
        match (self.result, self.dead_lettered) {
            (Some((status, source)), _) => End { status, source, before: "after the end of the run: ", after: "" },
            (None, Some(status)) => End { status, source: ours, before: "a message was dead-lettered; ", after },
            (None, None) => End { status: exit.status(), source: ours, before: "", after },
        }
    }

    fn panicked(self, panic: &str) -> (End, String) {
        let error = shortage_in_panic(panic);
        let (reason, what) = match error.as_ref().and_then(|error| Some((shortage(error)?, error))) {
            Some((words, error)) => (Reason::Shortage, format!("can't go on: {words}: {error}")),
            None => (Reason::Defect, format!("defect, please report it: {panic}")),
        };
        let end = self.end(reason);
        (end, format!("{}{what}{}", end.before, end.after))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BETWEEN_MESSAGES: Stage = Stage { command_started: false, dead_lettered: None, result: None };
    const RUNNING: Stage = Stage { command_started: true, ..BETWEEN_MESSAGES };
    const NO_THREAD: &str = "OS can't spawn worker thread: Resource temporarily unavailable (os error 11)";

    fn dead_lettered(stage: Stage) -> Stage {
        Stage { dead_lettered: Some(9), ..stage }
    }

    fn ended(stage: Stage) -> Stage {
        Stage { result: Some((3, "command")), ..dead_lettered(stage) }
    }

    #[test]
    fn the_stage_decides_what_a_shortage_means() {
        let another_try = "; another try may help";
        let killed =
            "; the command is killed if it still runs, and its message may be delivered again (not with --no-ack)";
        for (stage, status, before, after) in [
            (BETWEEN_MESSAGES, 71, "", another_try),
            (RUNNING, 75, "", killed),
            (dead_lettered(BETWEEN_MESSAGES), 9, "a message was dead-lettered; ", another_try),
            (dead_lettered(RUNNING), 9, "a message was dead-lettered; ", killed),
            (ended(RUNNING), 3, "after the end of the run: ", ""),
        ] {
            let source = if status == 3 { "command" } else { Program::current().name() };
            let end = End { status, source, before, after };
            assert_eq!(stage.end(Reason::Shortage), end, "{stage:?}");
            let (end_of_panic, text) = stage.panicked(NO_THREAD);
            assert_eq!(end_of_panic, end, "{stage:?}");
            assert!(text.starts_with(&format!("{before}can't go on: no more processes or threads")), "{text}");
            assert!(text.ends_with(&format!("(os error 11){after}")), "{text}");
        }
    }

    #[test]
    fn a_defect_is_70_unless_the_status_is_known_already() {
        for (stage, status, text) in [
            (BETWEEN_MESSAGES, 70, "defect, please report it: oh"),
            (RUNNING, 70, "defect, please report it: oh"),
            (dead_lettered(RUNNING), 9, "a message was dead-lettered; defect, please report it: oh"),
            (ended(RUNNING), 3, "after the end of the run: defect, please report it: oh"),
        ] {
            let (end, said) = stage.panicked("oh");
            assert_eq!((end.status, said.as_str()), (status, text), "{stage:?}");
        }
    }
}
