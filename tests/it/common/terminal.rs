//! A terminal on which a test types, and whose output it reads.

use pty_process::blocking::{Command, Pty, open};
use rustix::event::{PollFd, PollFlags, poll};
use std::{
    fs::File,
    io::{PipeWriter, Read, Write, pipe},
    os::fd::{AsFd, OwnedFd},
    process::{Child, ExitStatus},
    sync::mpsc::{Receiver, channel},
    thread::{self, JoinHandle},
    time::Instant,
};
use testbed::{PATIENCE, eventually, owner};

/// A terminal with a session of its own.
pub struct Terminal {
    keys: Pty,
    output: Receiver<Vec<u8>>,
    reader: JoinHandle<()>,
    /// The reader ends when this is closed.
    end_of_reader: PipeWriter,
    seen: String,
    pub leader: Leader,
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
        let (ends, end_of_reader) = pipe().unwrap();
        let reader = thread::spawn(move || {
            let mut screen = File::from(screen);
            let mut piece = [0; 4096];
            loop {
                let mut both = [PollFd::new(&screen, PollFlags::IN), PollFd::new(&ends, PollFlags::IN)];
                poll(&mut both, None).unwrap();
                if !both[1].revents().is_empty() {
                    return;
                }
                // When the last process has exited, reading fails with EIO.
                let Ok(size @ 1..) = screen.read(&mut piece) else { return };
                if sender.send(piece[..size].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { keys, output, reader, end_of_reader, seen: String::new(), leader: Leader(leader) }
    }

    /// Closes the terminal, as a broken ssh connection does. Returns the session's leader.
    pub fn hang_up(self) -> Leader {
        drop(self.end_of_reader);
        // The terminal is closed when the reader's descriptor is, too.
        self.reader.join().unwrap();
        self.leader
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
        self.leader.wait_end(&self.seen)
    }
}

/// The session's leader. It is killed when this is dropped: closing the terminal sends it SIGHUP, which it may ignore.
pub struct Leader(Child);

impl Leader {
    pub fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }

    #[track_caller]
    pub fn wait_end(&mut self, seen: &str) -> ExitStatus {
        let ended = eventually(PATIENCE, || self.0.try_wait().unwrap().is_some());
        assert!(ended, "still runs: {seen}");
        self.0.wait().unwrap()
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
