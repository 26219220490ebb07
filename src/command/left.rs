//! Who descends from us, as /proc tells it: the command, and what it has started, whatever group or session that is in.

use nix::unistd::{Pid, getpid};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

/// A process, as far as `/proc/PID/stat` is of interest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) pid: Pid,
    pub(super) parent: Pid,
    pub(super) group: Pid,
    /// The foreground group of its controlling terminal; -1 where it has none.
    pub(super) foreground: Pid,
    pub(super) is_zombie: bool,
}

impl Stat {
    /// Our own; `None` where there is no /proc of our PID namespace.
    pub(super) fn own() -> Option<Self> {
        read("self").filter(|own| own.pid == getpid())
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
            // The session and the terminal's number are between.
            foreground: number(2)?,
        })
    }
}

fn read(folder: &str) -> Option<Stat> {
    // A name is any bytes.
    let text = fs::read(format!("/proc/{folder}/stat")).ok()?;
    Stat::parse(&String::from_utf8_lossy(&text))
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
    pub(super) fn find(is_ours: impl Fn(Pid) -> bool) -> Self {
        let Some(own) = Stat::own() else {
            return Self::default();
        };
        // All names first: who forks while the others are read would make the list longer and longer.
        let names: Vec<String> = fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.starts_with(|first: char| first.is_ascii_digit()))
            .collect();
        let all: Vec<Stat> = names.iter().filter_map(|name| read(name)).collect();
        Self::among(&all, own.pid, is_ours)
    }

    fn among(all: &[Stat], own: Pid, is_ours: impl Fn(Pid) -> bool) -> Self {
        let mut by_parent: BTreeMap<Pid, Vec<Stat>> = BTreeMap::new();
        for process in all {
            by_parent.entry(process.parent).or_default().push(*process);
        }
        let children = |parent: Pid| by_parent.get(&parent).into_iter().flatten().copied();
        let mut processes: Vec<Stat> = children(own).filter(|child| is_ours(child.pid)).collect();
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

    #[test]
    fn a_name_may_look_like_anything() {
        let text = "42 (a) Z 1 (b) c) S 7 41 40 34816 39 4194304 0";
        let stat = Stat::parse(text).unwrap();
        let pids = [stat.pid, stat.parent, stat.group, stat.foreground];
        assert_eq!(pids.map(Pid::as_raw), [42, 7, 41, 39]);
        assert!(!stat.is_zombie);
        assert_eq!(Stat::parse("42 (cat"), None);
        assert!(Stat::own().is_some());
    }

    #[test]
    fn a_group_is_theirs_when_nobody_else_is_in_it() {
        let stat = |pid: i32, state: &str, parent: i32, group: i32| {
            Stat::parse(&format!("{pid} (sh) {state} {parent} {group} 1 0 -1")).unwrap()
        };
        let all = [
            stat(10, "S", 1, 10),  // ourselves
            stat(20, "S", 10, 20), // the command, whose pipeline's other end isn't reaped yet
            stat(21, "Z", 20, 20),
            stat(22, "S", 20, 10), // has joined our group
            stat(30, "Z", 10, 30), // an orphan, and what it has forked
            stat(31, "S", 30, 30),
            stat(40, "S", 10, 41), // shares its group with somebody else's child
            stat(41, "S", 1, 41),
            stat(50, "S", 10, 50), // was there before the command
            stat(51, "S", 50, 50),
        ];
        let found = Descendants::among(&all, all[0].pid, |child| child.as_raw() != 50);
        let raw = |pids: Vec<Pid>| pids.into_iter().map(Pid::as_raw).collect::<Vec<_>>();
        let pids = found.processes.iter().map(|process| process.pid).collect();
        assert_eq!(raw(pids), [20, 30, 40, 22, 31]);
        assert_eq!(raw(found.own_groups.into_iter().collect()), [20, 30]);
    }
}
