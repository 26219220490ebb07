//! Who descends from us, as /proc tells it: the command, and what it has started, whatever group or session that is in.

use nix::unistd::{Pid, getpgrp, getpid, getsid};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

/// The first process of a PID namespace, which becomes the parent of every orphan in it.
const INIT: Pid = Pid::from_raw(1);

/// A process, as far as `/proc/PID/stat` is of interest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) pid: Pid,
    pub(super) parent: Pid,
    pub(super) group: Pid,
    pub(super) session: Pid,
    /// The foreground group of its controlling terminal; -1 where it has none.
    pub(super) foreground: Pid,
    pub(super) is_zombie: bool,
    /// When it was started, in clock ticks since the system was: numbers of processes are used again.
    started: u64,
}

impl Stat {
    /// Our own; `None` where there is no /proc of our PID namespace.
    ///
    /// Group and session are asked for by system calls, as qemu-user 7.2 shows zeroes for them in /proc/self/stat.
    pub(super) fn own() -> Option<Self> {
        let own = read("self").filter(|own| own.pid == getpid())?;
        Some(Self { group: getpgrp(), session: getsid(None).ok()?, ..own })
    }

    fn parse(text: &str) -> Option<Self> {
        // The name may have blanks and parentheses in it.
        let (start, rest) = text.rsplit_once(')')?;
        let mut fields = rest.split_ascii_whitespace();
        let is_zombie = fields.next()? == "Z";
        let mut number = |skip| Some(Pid::from_raw(fields.nth(skip)?.parse().ok()?));
        Some(Self {
            pid: Pid::from_raw(start.split_once(' ')?.0.parse().ok()?),
            is_zombie,
            parent: number(0)?,
            group: number(0)?,
            session: number(0)?,
            // The terminal's number is between.
            foreground: number(1)?,
            // Field 22 of proc_pid_stat(5); the foreground group is the 8th.
            started: fields.nth(13)?.parse().ok()?,
        })
    }
}

fn read(folder: &str) -> Option<Stat> {
    // A name is any bytes.
    let text = fs::read(format!("/proc/{folder}/stat")).ok()?;
    Stat::parse(&String::from_utf8_lossy(&text))
}

/// All processes, as far as they can be read.
fn read_all() -> Vec<Stat> {
    // All names first: who forks while the others are read would make the list longer and longer.
    let names: Vec<String> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(|first: char| first.is_ascii_digit()))
        .collect();
    names.iter().filter_map(|name| read(name)).collect()
}

/// Who isn't the command's, although it is our child, or may become it when its parent ends: what a shell started before it
/// became qconsume, and where we are PID 1 also what a `docker exec` runs.
///
/// It is a child of ours that
/// - was there before the command, or
/// - is in our own process group, if the command has another, or
/// - is in a process group or a session in which somebody was before the command. Our session is none of them, because the
///   command is in it.
///
/// All other children are the command's, and so is whoever descends from them. setsid(2) only makes new sessions, so nothing
/// that the command starts can get into one of these, and into one of these groups only if it names the group (setpgid(2)),
/// which must be in our session.
///
/// The kernel tells no more about a process whose parent is gone. So two kinds are taken for the command's: what a stranger
/// starts during the command in a session of its own and leaves behind, and what is left by a `docker exec` that began during
/// the command.
#[derive(Debug, Default)]
pub(super) struct Strangers {
    /// Their process ids, and when they were started.
    processes: BTreeSet<(Pid, u64)>,
    groups: BTreeSet<Pid>,
    sessions: BTreeSet<Pid>,
}

impl Strangers {
    /// Looks who is there before the command; nobody if /proc is missing or belongs to another PID namespace.
    ///
    /// `shares_group` is whether the command is to be in our own process group, `has_children` whether we have any child.
    pub(super) fn find(shares_group: bool, has_children: bool) -> Self {
        let Some(own) = Stat::own() else {
            return Self::default();
        };
        // Every orphan becomes a child of PID 1, also one of a parent from outside of the PID namespace.
        let all = if has_children || own.pid == INIT { read_all() } else { Vec::new() };
        Self::among(&all, &own, shares_group)
    }

    fn among(all: &[Stat], own: &Stat, shares_group: bool) -> Self {
        let mut strangers = match own.pid {
            INIT => all.to_vec(),
            pid => Descendants::among(all, pid, |_| true).processes,
        };
        strangers.retain(|process| process.pid != own.pid);
        let mut groups: BTreeSet<Pid> = strangers.iter().map(|process| process.group).collect();
        let mut sessions: BTreeSet<Pid> = strangers.iter().map(|process| process.session).collect();
        sessions.remove(&own.session);
        if shares_group {
            groups.remove(&own.group);
        } else {
            groups.insert(own.group);
        }
        let processes = strangers.iter().map(|process| (process.pid, process.started)).collect();
        Self { processes, groups, sessions }
    }

    /// Whether this child of ours, which isn't the command, is one of them.
    pub(super) fn include(&self, child: &Stat) -> bool {
        // A leader is as old as its group and its session: a new one has a number that was used before.
        let is_in = |known: &BTreeSet<Pid>, number| number != child.pid && known.contains(&number);
        self.processes.contains(&(child.pid, child.started))
            || is_in(&self.groups, child.group)
            || is_in(&self.sessions, child.session)
    }
}

/// Those who descend from us.
#[derive(Debug, Default)]
pub(super) struct Descendants {
    /// Parents before their children. A zombie that is not ours to reap is left out: its parent is here.
    pub(super) processes: Vec<Stat>,
    /// The process groups that they have for themselves. Ours is never one, as we are in it.
    pub(super) own_groups: BTreeSet<Pid>,
}

impl Descendants {
    /// All who descend from us by those children that `is_ours`; nobody where there is no /proc of our PID namespace, whose
    /// numbers could be anybody's.
    pub(super) fn find(is_ours: impl Fn(&Stat) -> bool) -> Self {
        match Stat::own() {
            Some(own) => Self::among(&read_all(), own.pid, is_ours),
            None => Self::default(),
        }
    }

    fn among(all: &[Stat], own: Pid, is_ours: impl Fn(&Stat) -> bool) -> Self {
        let mut by_parent: BTreeMap<Pid, Vec<Stat>> = BTreeMap::new();
        for process in all {
            by_parent.entry(process.parent).or_default().push(*process);
        }
        let children = |parent: Pid| by_parent.get(&parent).into_iter().flatten().copied();
        let mut processes: Vec<Stat> = children(own).filter(is_ours).collect();
        let mut next = 0;
        while let Some(parent) = processes.get(next) {
            let more = children(parent.pid).filter(|child| !child.is_zombie);
            processes.extend(more);
            next += 1;
        }
        let pids: BTreeSet<Pid> = processes.iter().map(|process| process.pid).collect();
        let is_other = |process: &&Stat| !process.is_zombie && !pids.contains(&process.pid);
        let shared: BTreeSet<Pid> = all.iter().filter(is_other).map(|other| other.group).collect();
        let groups = processes.iter().map(|process| process.group);
        let own_groups = groups.filter(|group| !shared.contains(group)).collect();
        Self { processes, own_groups }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: i32 = 10;
    const COMMAND: i32 = 20;

    /// A process in state S or Z, with its parent, group and session; it is as old as its number is low.
    fn stat((pid, state, parent, group, session): (i32, &str, i32, i32, i32)) -> Stat {
        let rest = "0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0";
        Stat::parse(&format!("{pid} (sh) {state} {parent} {group} {session} {rest} {pid} 0 0")).unwrap()
    }

    fn raw(pids: impl IntoIterator<Item = Pid>) -> Vec<i32> {
        pids.into_iter().map(Pid::as_raw).collect()
    }

    #[test]
    fn a_name_may_look_like_anything() {
        let text = "42 (a) Z 1 (b) c) S 7 41 40 34816 39 4194304 1 2 3 4 5 6 7 8 20 0 1 0 12345 9 9";
        let stat = Stat::parse(text).unwrap();
        let pids = [stat.pid, stat.parent, stat.group, stat.session, stat.foreground];
        assert_eq!(raw(pids), [42, 7, 41, 40, 39]);
        assert!(!stat.is_zombie);
        assert_eq!(stat.started, 12345);
        assert_eq!(Stat::parse("42 (cat"), None);
        assert!(Stat::own().unwrap().started > 0);
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
        let found = Descendants::among(&all, all[0].pid, |child| child.pid.as_raw() != 50);
        assert_eq!(raw(found.processes.iter().map(|process| process.pid)), [20, 30, 40, 22, 31]);
        assert_eq!(raw(found.own_groups), [20, 30]);
    }

    /// Who is found as the command's, with these others before it and those, besides the command, when it has ended.
    fn found(own: Stat, shares_group: bool, before: &[Stat], after: &[Stat]) -> Vec<i32> {
        let strangers = Strangers::among(&[&[own], before].concat(), &own, shares_group);
        let found = Descendants::among(&[&[own], after].concat(), own.pid, |child| !strangers.include(child));
        raw(found.processes.iter().map(|process| process.pid))
    }

    #[test]
    fn what_is_not_the_commands_is_left_alone() {
        let own = stat((OWN, "S", 9, 8, 7));
        let before = [
            (11, "S", 10, 8, 7),   // in our own group, as all that a shell starts
            (12, "S", 10, 12, 7),  // in a group of its own, by a shell with job control
            (13, "S", 10, 13, 13), // a daemon
            (14, "S", 13, 14, 13), // its child, in another group
            (6, "S", 1, 6, 6),     // somebody's who is no child of ours
        ]
        .map(stat);
        // What they have started since then, and left to us.
        let after = [
            (13, "S", 10, 13, 13),
            (14, "S", 13, 14, 13),
            (15, "S", 14, 15, 15), // has still its parent
            (111, "S", 10, 8, 7),
            (112, "S", 10, 12, 7),
            (113, "S", 10, 13, 13),
            (114, "S", 10, 14, 13),
            (115, "S", 10, 115, 13),   // in a group of its own, in the daemon's session
            (116, "S", 115, 116, 116), // a child of such a one
        ]
        .map(stat);
        assert!(found(own, false, &before, &after).is_empty());
        // Where the command shares our group, what is in it may be the command's.
        assert_eq!(found(own, true, &before, &after), [111]);
        // Also if nobody was in it before.
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
            (24, "S", 10, 25, 25), // whose session's leader is gone
            (26, "S", 23, 26, 26), // and so on
            (27, "S", 22, 8, 7),   // has joined our group, and has its parent yet
            (13, "S", 10, 13, 13), // the numbers of a daemon that is gone, used again
            (6, "S", 10, 6, 6),    // the same of somebody's who was no child of ours
        ];
        let again =
            |number: i32, stat: Stat| if stat.pid.as_raw() == number { Stat { started: 99, ..stat } } else { stat };
        let after = after.map(stat).map(|stat| again(13, stat)).map(|stat| again(6, stat));
        // Whether we lead our group and our session, or are in those of a shell.
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
