//! A terminal on which a test types, and whose output it reads.

use pty_process::blocking::{Command, Pty, open};
use std::{
    fs::File,
    io::{Read, Write},
    os::fd::{AsFd, OwnedFd},
    process::{Child, ExitStatus},
    sync::mpsc::{Receiver, channel},
    thread,
    time::Instant,
};
use testbed::{PATIENCE, eventually, owner};

/// A terminal with a session of its own.
pub struct Terminal {
    keys: Pty,
    output: Receiver<Vec<u8>>,
    seen: String,
    pub leader: Child,
}

impl Terminal {
    /// Starts a command as the session's leader, with these variables.
    pub fn start(words: &[&str], variables: &[(&str, &str)]) -> Self {
        let (keys, terminal) = open().unwrap();
        // The tests may be run with signals ignored (by nohup(1), for example), which would be inherited.
        let leader = Command::new("env")
            .arg("--default-signal=HUP,INT,QUIT")
            .args(words)
            .envs(variables.iter().copied())
            .env("PS1", "prompt ")
            .env(owner::MARK, owner::id())
            .spawn(terminal)
            .unwrap();
        let (sender, output) = channel();
        let screen: OwnedFd = keys.as_fd().try_clone_to_owned().unwrap();
        thread::spawn(move || {
            let mut screen = File::from(screen);
            let mut piece = [0; 4096];
            // When the last process has exited, reading fails with EIO.
            while let Ok(size @ 1..) = screen.read(&mut piece) {
                if sender.send(piece[..size].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { keys, output, seen: String::new(), leader }
    }

    pub fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits for this text, after the last text that was waited for; returns the text between the two.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.seen.find(text) {
                let rest = self.seen.split_off(at + text.len());
                let mut before = std::mem::replace(&mut self.seen, rest);
                before.truncate(at);
                return before;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(piece) => self.seen += &String::from_utf8_lossy(&piece),
                Err(error) => panic!("{text:?} is not on the terminal ({error}): {}", self.seen),
            }
        }
    }

    #[track_caller]
    pub fn wait_end(&mut self) -> ExitStatus {
        let ended = eventually(PATIENCE, || self.leader.try_wait().unwrap().is_some());
        assert!(ended, "still runs: {}", self.seen);
        self.leader.wait().unwrap()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Closing the terminal sends SIGHUP to its processes; the leader may ignore it.
        let _ = self.leader.kill();
        let _ = self.leader.wait();
    }
}
