//! Who descends from us, as /proc tells it: the command, and what it has started, whatever group or session that is in.

use nix::unistd::{Pid, getpid};
use std::fs;

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

/// All who descend from us by those children that `is_ours`, parents before their children.
///
/// A zombie that is not ours to reap is left out: its parent is in the list. Empty where there is no /proc of our PID
/// namespace, whose numbers could be anybody's.
pub(super) fn descendants(is_ours: impl Fn(Pid) -> bool) -> Vec<Stat> {
    let Some(own) = Stat::own() else {
        return Vec::new();
    };
    let all: Vec<Stat> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(|first: char| first.is_ascii_digit()))
        .filter_map(|name| read(&name))
        .collect();
    let children = |parent: Pid| all.iter().filter(move |process| process.parent == parent);
    let mut found: Vec<Stat> = children(own.pid)
        .filter(|child| is_ours(child.pid))
        .copied()
        .collect();
    let mut next = 0;
    while let Some(parent) = found.get(next) {
        let more = children(parent.pid).filter(|child| !child.is_zombie);
        found.extend(more.copied().collect::<Vec<_>>());
        next += 1;
    }
    found
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
}
