//! What /proc says about processes.

use nix::unistd::{Pid, getpgrp, getpid, getsid};
use std::fs;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) pid: Pid,
    pub(super) parent: Pid,
    pub(super) group: Pid,
    pub(super) session: Pid,
    /// The foreground group of its controlling terminal; -1 if it has none.
    pub(super) foreground: Pid,
    pub(super) is_zombie: bool,
    /// In clock ticks since the system's start. Tells processes apart that had the same number one after the other.
    pub(super) started: u64,
}

impl Stat {
    /// `None` if /proc is missing or belongs to another PID namespace.
    pub(super) fn own() -> Option<Self> {
        let own = read("self").filter(|own| own.pid == getpid())?;
        // Not from /proc, where qemu-user 7.2 shows zeroes for them.
        Some(Self { group: getpgrp(), session: getsid(None).ok()?, ..own })
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        // The name may contain blanks and parentheses.
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
            // Fields 8 and 22 of proc_pid_stat(5).
            foreground: number(1)?,
            started: fields.nth(13)?.parse().ok()?,
        })
    }
}

fn read(folder: &str) -> Option<Stat> {
    let text = fs::read(format!("/proc/{folder}/stat")).ok()?;
    Stat::parse(&String::from_utf8_lossy(&text))
}

pub(super) fn read_all() -> Vec<Stat> {
    // List the folder first: processes that fork meanwhile could make reading it endless.
    let names: Vec<String> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(|first: char| first.is_ascii_digit()))
        .collect();
    names.iter().filter_map(|name| read(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_look_like_anything() {
        let text = "42 (a) Z 1 (b) c) S 7 41 40 34816 39 4194304 1 2 3 4 5 6 7 8 20 0 1 0 12345 9 9";
        let stat = Stat::parse(text).unwrap();
        let pids = [stat.pid, stat.parent, stat.group, stat.session, stat.foreground];
        assert_eq!(pids.map(Pid::as_raw), [42, 7, 41, 40, 39]);
        assert!(!stat.is_zombie);
        assert_eq!(stat.started, 12345);
        assert_eq!(Stat::parse("42 (cat"), None);
        assert!(Stat::own().unwrap().started > 0);
    }
}
