//! Tells the command's processes from all others.
//!
//! Whatever the command starts stays our descendant, in any group and session: as a child subreaper, we become the
//! parent of its orphans. So all our descendants are the command's, except the [`Strangers`] and their descendants.

use super::stat::{Stat, read_all};
use nix::unistd::Pid;
use std::collections::{BTreeMap, BTreeSet};

const INIT: Pid = Pid::from_raw(1);

/// Children of ours that the command hasn't started. A shell may have had children before it became qconsume by exec,
/// and PID 1 gets the children of every `docker exec`.
///
/// A child is a stranger if it
/// - existed before the command,
/// - is in our own process group while the command has another one, or
/// - is in the group or the session of a child that existed before the command: a process can't join an older session,
///   and an older group only on purpose (setpgid(2)). Our session doesn't count, nor our group if the command is in it.
///
/// docs/how-it-works.md lists the orphans that this rule gets wrong.
#[derive(Debug, Default)]
pub(super) struct Strangers {
    /// With their start times.
    processes: BTreeSet<(Pid, u64)>,
    groups: BTreeSet<Pid>,
    sessions: BTreeSet<Pid>,
}

impl Strangers {
    pub(super) fn before_start(command_shares_group: bool, has_children: bool) -> Self {
        let Some(own) = Stat::own() else {
            return Self::default();
        };
        let all = if has_children || own.pid == INIT { read_all() } else { Vec::new() };
        Self::among(&all, &own, command_shares_group)
    }

    fn among(all: &[Stat], own: &Stat, command_shares_group: bool) -> Self {
        let mut strangers = match own.pid {
            // PID 1 becomes the parent of all orphans in its PID namespace, even if their parents are outside of it.
            INIT => all.to_vec(),
            pid => descendants(all, pid, |_| true),
        };
        strangers.retain(|process| process.pid != own.pid);
        let mut groups: BTreeSet<Pid> = strangers.iter().map(|process| process.group).collect();
        let mut sessions: BTreeSet<Pid> = strangers.iter().map(|process| process.session).collect();
        sessions.remove(&own.session);
        if command_shares_group {
            groups.remove(&own.group);
        } else {
            groups.insert(own.group);
        }
        let processes = strangers.iter().map(|process| (process.pid, process.started)).collect();
        Self { processes, groups, sessions }
    }

    pub(super) fn include(&self, child: &Stat) -> bool {
        // A child that leads such a group or session has created it: the older one with this number is gone.
        let is_in = |older: &BTreeSet<Pid>, number| number != child.pid && older.contains(&number);
        self.processes.contains(&(child.pid, child.started))
            || is_in(&self.groups, child.group)
            || is_in(&self.sessions, child.session)
    }
}

/// The command until it is reaped, and its descendants.
#[derive(Debug, Default)]
pub(super) struct CommandProcesses {
    pub(super) processes: Vec<Stat>,
    /// Groups in which nobody else lives, so that the whole group may be signalled. Never ours, as we are in it.
    pub(super) exclusive_groups: BTreeSet<Pid>,
}

impl CommandProcesses {
    /// `belongs_to_command` is asked about our children only.
    pub(super) fn find(belongs_to_command: impl Fn(&Stat) -> bool) -> Self {
        match Stat::own() {
            Some(own) => Self::among(&read_all(), own.pid, belongs_to_command),
            None => Self::default(),
        }
    }

    fn among(all: &[Stat], own: Pid, belongs_to_command: impl Fn(&Stat) -> bool) -> Self {
        let processes = descendants(all, own, belongs_to_command);
        let pids: BTreeSet<Pid> = processes.iter().map(|process| process.pid).collect();
        let is_other = |process: &&Stat| !process.is_zombie && !pids.contains(&process.pid);
        let shared: BTreeSet<Pid> = all.iter().filter(is_other).map(|other| other.group).collect();
        let groups = processes.iter().map(|process| process.group);
        let exclusive_groups = groups.filter(|group| !shared.contains(group)).collect();
        Self { processes, exclusive_groups }
    }
}

/// The children of `own` that `accepts` accepts, and all their descendants, except zombies that we can't reap.
fn descendants(all: &[Stat], own: Pid, accepts: impl Fn(&Stat) -> bool) -> Vec<Stat> {
    let mut by_parent: BTreeMap<Pid, Vec<Stat>> = BTreeMap::new();
    for process in all {
        by_parent.entry(process.parent).or_default().push(*process);
    }
    let children = |parent: Pid| by_parent.get(&parent).into_iter().flatten().copied();
    let mut found: Vec<Stat> = children(own).filter(accepts).collect();
    let mut next = 0;
    while let Some(parent) = found.get(next) {
        let more = children(parent.pid).filter(|child| !child.is_zombie);
        found.extend(more);
        next += 1;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: i32 = 10;
    const COMMAND: i32 = 20;

    /// Its start time is its number.
    fn stat((pid, state, parent, group, session): (i32, &str, i32, i32, i32)) -> Stat {
        let rest = "0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0";
        Stat::parse(&format!("{pid} (sh) {state} {parent} {group} {session} {rest} {pid} 0 0")).unwrap()
    }

    fn raw(pids: impl IntoIterator<Item = Pid>) -> Vec<i32> {
        pids.into_iter().map(Pid::as_raw).collect()
    }

    #[test]
    fn a_group_is_theirs_when_nobody_else_is_in_it() {
        let all = [
            (OWN, "S", 1, 10, 1),      // ourselves
            (COMMAND, "S", 10, 20, 1), // the command, whose pipeline's other end isn't reaped yet
            (21, "Z", 20, 20, 1),
            (22, "S", 20, 10, 1), // has joined our group
            (30, "Z", 10, 30, 1), // an orphan, and what it has forked
            (31, "S", 30, 30, 1),
            (40, "S", 10, 41, 1), // shares its group with somebody else's child
            (41, "S", 1, 41, 1),
            (50, "S", 10, 50, 1), // was there before the command
            (51, "S", 50, 50, 1),
        ]
        .map(stat);
        let found = CommandProcesses::among(&all, all[0].pid, |child| child.pid.as_raw() != 50);
        assert_eq!(raw(found.processes.iter().map(|process| process.pid)), [20, 30, 40, 22, 31]);
        assert_eq!(raw(found.exclusive_groups), [20, 30]);
    }

    /// What counts as the command's if there were these processes before it started, and those after it ended.
    fn found(own: Stat, shares_group: bool, before: &[Stat], after: &[Stat]) -> Vec<i32> {
        let strangers = Strangers::among(&[&[own], before].concat(), &own, shares_group);
        let found = CommandProcesses::among(&[&[own], after].concat(), own.pid, |child| !strangers.include(child));
        raw(found.processes.iter().map(|process| process.pid))
    }

    #[test]
    fn what_is_not_the_commands_is_left_alone() {
        let own = stat((OWN, "S", 9, 8, 7));
        let before = [
            (11, "S", 10, 8, 7),   // in our own group, as a shell without job control starts it
            (12, "S", 10, 12, 7),  // in a group of its own, by a shell with job control
            (13, "S", 10, 13, 13), // a daemon
            (14, "S", 13, 14, 13), // its child, in another group
            (6, "S", 1, 6, 6),     // no child of ours
        ]
        .map(stat);
        let after = [
            (13, "S", 10, 13, 13),
            (14, "S", 13, 14, 13),
            (15, "S", 14, 15, 15), // still has its parent
            (111, "S", 10, 8, 7),
            (112, "S", 10, 12, 7),
            (113, "S", 10, 13, 13),
            (114, "S", 10, 14, 13),
            (115, "S", 10, 115, 13),   // in a group of its own, in the daemon's session
            (116, "S", 115, 116, 116), // a child of 115
        ]
        .map(stat);
        assert!(found(own, false, &before, &after).is_empty());
        // If the command is in our group, other children in it may be the command's.
        assert_eq!(found(own, true, &before, &after), [111]);
        assert!(found(own, false, &[], &after[3..4]).is_empty());
        assert_eq!(found(own, true, &[], &after[3..4]), [111]);
    }

    #[test]
    fn what_the_command_starts_is_found_wherever_it_has_gone() {
        let before = [(11, "S", 10, 8, 7), (12, "S", 10, 12, 7), (13, "S", 10, 13, 13), (6, "S", 1, 6, 6)].map(stat);
        let after = [
            (COMMAND, "Z", 10, 20, 7),
            (21, "S", 10, 20, 7),  // in the command's group
            (22, "S", 10, 22, 7),  // in a group of its own
            (23, "S", 10, 23, 23), // after a double fork, in a session of its own
            (24, "S", 10, 25, 25), // in a session whose leader is gone
            (26, "S", 23, 26, 26), // and so on
            (27, "S", 22, 8, 7),   // has joined our group, and still has its parent
            (13, "S", 10, 13, 13), // has the number of a daemon that is gone
            (6, "S", 10, 6, 6),    // has the number of a process that was no child of ours
        ];
        let again =
            |number: i32, stat: Stat| if stat.pid.as_raw() == number { Stat { started: 99, ..stat } } else { stat };
        let after = after.map(stat).map(|stat| again(13, stat)).map(|stat| again(6, stat));
        // We may lead our group and our session, or be in those of a shell.
        for own in [(OWN, "S", 9, 8, 7), (OWN, "S", 9, 7, 7), (OWN, "S", 9, 10, 10), (OWN, "S", 0, 0, 0)].map(stat) {
            let in_our_session = |process: &Stat| match process.session.as_raw() {
                7 => Stat { session: own.session, ..*process },
                _ => *process,
            };
            let (before, after) = (before.map(|one| in_our_session(&one)), after.map(|one| in_our_session(&one)));
            for shares_group in [false, true] {
                let found = found(own, shares_group, &before, &after);
                assert_eq!(found, [20, 21, 22, 23, 24, 13, 6, 27, 26], "{own:?} {shares_group}");
            }
        }
    }

    #[test]
    fn to_pid_1_whoever_was_there_before_the_command_is_a_stranger() {
        let own = stat((1, "S", 0, 1, 1));
        let before = [(30, "S", 0, 30, 30), (31, "S", 30, 31, 30), (32, "S", 0, 0, 0)].map(stat);
        let after = [
            (33, "S", 1, 31, 30), // of a `docker exec -it` that has ended
            (34, "S", 1, 34, 30),
            (35, "S", 1, 0, 0), // of a session outside of the PID namespace
            (COMMAND, "S", 1, 20, 1),
            (36, "S", 1, 36, 36),
        ]
        .map(stat);
        assert_eq!(found(own, false, &before, &after), [20, 36]);
    }
}
