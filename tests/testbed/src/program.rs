//! Runs the binary under test, and never hangs.

use crate::owner;
use crate::{PATIENCE, Signal, eventually};
use nix::sys::signal::{kill, killpg};
use nix::unistd::{Pid, getpgid, getpgrp};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

/// The environment variable that marks one run and everything it has started.
const RUN_MARK: &str = "QCONSUME_TESTBED_RUN";

/// Variables of this process's environment that would change what the program under test does.
const OWN_VARIABLES: [&str; 4] = ["BROKER_URL", "BROKER_URL_FILE", "AMQP_URL", "QUEUE"];

/// Gives the program the signals' usual meaning, unblocked, whatever this process was started with (under nohup a hangup is
/// ignored). A test that wants one ignored says so in [`Program::through`].
const USUAL_SIGNALS: [&str; 2] = ["/usr/bin/env", "--default-signal=HUP,INT,QUIT,PIPE,TERM"];

/// A program about to be run.
#[derive(Clone, Debug)]
#[must_use]
pub struct Program {
    path: PathBuf,
    prefix: Vec<OsString>,
    args: Vec<OsString>,
    env: Vec<(OsString, Option<OsString>)>,
    folder: Option<PathBuf>,
    stdin: Option<Vec<u8>>,
    stderr: Option<Arc<OwnedFd>>,
}

impl Program {
    /// The executable: `Program::new(env!("CARGO_BIN_EXE_qconsume"))`.
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self {
            path: path.as_ref().to_owned(),
            prefix: Vec::new(),
            args: Vec::new(),
            env: Vec::new(),
            folder: None,
            stdin: None,
            stderr: None,
        }
    }

    /// Sets `BROKER_URL`.
    pub fn url(self, url: &str) -> Self {
        self.env("BROKER_URL", url)
    }

    /// Sets `QUEUE`; takes a [`crate::Queue`]'s name.
    pub fn queue(self, name: &str) -> Self {
        self.env("QUEUE", name)
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Adds `-- sh -c script`.
    pub fn shell(self, script: &str) -> Self {
        self.args(["--", "sh", "-c", script])
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.as_ref().to_owned(), Some(value.as_ref().to_owned())));
        self
    }

    /// Removes a variable from its environment.
    pub fn env_remove(mut self, name: impl AsRef<OsStr>) -> Self {
        self.env.push((name.as_ref().to_owned(), None));
        self
    }

    /// Runs it in this folder.
    pub fn current_dir(mut self, folder: impl AsRef<Path>) -> Self {
        self.folder = Some(folder.as_ref().to_owned());
        self
    }

    /// Gives it something on standard input, which is empty otherwise.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    /// Gives it this as standard error, instead of a file that is read through [`Running::stderr`].
    pub fn stderr(mut self, file: impl Into<OwnedFd>) -> Self {
        self.stderr = Some(Arc::new(file.into()));
        self
    }

    /// Runs it through another command that replaces itself with it: `["ip", "netns", "exec", name]`, `["tini", "--"]`.
    pub fn through<A: AsRef<OsStr>>(mut self, prefix: impl IntoIterator<Item = A>) -> Self {
        self.prefix.extend(prefix.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Starts it, in a process group of its own.
    #[track_caller]
    pub fn spawn(self) -> Running {
        let run = format!("{:016x}", fastrand::u64(..));
        // Files rather than pipes: what the program leaves behind holds up no reader.
        let [stdout, stderr] = [(); 2].map(|()| tempfile::tempfile().expect("a temporary file"));
        let output = |file: &File| file.try_clone().expect("a second handle");
        let mut command = Command::new(USUAL_SIGNALS[0]);
        command.arg(USUAL_SIGNALS[1]).args(&self.prefix);
        command.arg(&self.path).args(&self.args);
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if OWN_VARIABLES.contains(&&*text) || text.starts_with("QCONSUME_") {
                command.env_remove(&name);
            }
        }
        for (name, value) in &self.env {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let stdin = if self.stdin.is_some() { Stdio::piped() } else { Stdio::null() };
        command
            .env(owner::MARK, owner::id())
            .env(RUN_MARK, &run)
            .stdin(stdin)
            .stdout(output(&stdout))
            .stderr(output(&stderr))
            .process_group(0);
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        let started = Instant::now();
        if let Some(file) = &self.stderr {
            command.stderr(file.try_clone().expect("a second handle"));
        }
        let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot run {}: {error}", self.path.display()));
        let running = Running {
            name: self.path.display().to_string(),
            pid: child.id().cast_signed(),
            run,
            stdout,
            stderr,
            ended: Arc::default(),
        };
        if let (Some(mut pipe), Some(bytes)) = (child.stdin.take(), self.stdin) {
            // A program that doesn't read all of it is that program's business.
            thread::spawn(move || drop(pipe.write_all(&bytes)));
        }
        let ended = running.ended.clone();
        thread::spawn(move || {
            let status = child.wait().expect("nobody else waits for it");
            let _ = ended.set((status, started.elapsed()));
        });
        running
    }

    /// Starts it and waits for its end; [`PATIENCE`] is the limit.
    #[track_caller]
    pub fn run(self) -> Finished {
        self.spawn().wait(PATIENCE)
    }
}

/// A program that was started. Dropping it kills it and everything it has started.
pub struct Running {
    name: String,
    pid: i32,
    run: String,
    stdout: File,
    stderr: File,
    /// How it ended, and how long after its start.
    ended: Arc<OnceLock<(ExitStatus, Duration)>>,
}

impl Running {
    /// Its process id, which is its process group's too.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends it a signal; one that has ended already is left alone.
    pub fn signal(&self, signal: Signal) {
        if !self.has_ended() {
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.ended.get().is_some()
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&content(&self.stderr)).into_owned()
    }

    /// What it has written to standard output so far.
    pub fn stdout(&self) -> Vec<u8> {
        content(&self.stdout)
    }

    /// Waits until the text has appeared on its standard error.
    #[track_caller]
    pub fn wait_for_stderr(&self, text: &str, limit: Duration) {
        self.wait_for(text, "standard error", &self.stderr, limit);
    }

    /// Waits until the text has appeared on its standard output.
    #[track_caller]
    pub fn wait_for_stdout(&self, text: &str, limit: Duration) {
        self.wait_for(text, "standard output", &self.stdout, limit);
    }

    #[track_caller]
    fn wait_for(&self, text: &str, stream: &str, file: &File, limit: Duration) {
        let appeared = || String::from_utf8_lossy(&content(file)).contains(text);
        let over = || self.has_ended() && self.leftovers().is_empty();
        eventually(limit, || appeared() || over());
        assert!(
            appeared(),
            "{} didn't write {text:?} to {stream} within {limit:?} (ended: {}); its standard error:\n{}",
            self.name,
            self.has_ended(),
            self.stderr()
        );
    }

    /// The pids of what it has started and is still there, itself not counted. A process that was started with an empty
    /// environment isn't seen.
    pub fn leftovers(&self) -> Vec<i32> {
        let mut pids = owner::processes_with(RUN_MARK, &self.run);
        pids.retain(|pid| *pid != self.pid);
        pids
    }

    /// Waits until nothing that it has started is left.
    #[track_caller]
    pub fn wait_no_leftovers(&self, limit: Duration) {
        let gone = eventually(limit, || self.leftovers().is_empty());
        assert!(gone, "{} has left processes behind: {:?}", self.name, self.leftovers());
    }

    /// Waits for its end and gives everything about it; one that hasn't ended within the limit hangs, and is killed.
    #[track_caller]
    pub fn wait(self, limit: Duration) -> Finished {
        self.finish(limit)
    }

    /// The same, and keeps the handle, to ask for [`Running::leftovers`] afterwards.
    #[track_caller]
    pub fn finish(&self, limit: Duration) -> Finished {
        eventually(limit, || self.has_ended());
        let Some((status, wall)) = self.ended.get() else {
            let stderr = self.stderr();
            self.kill_all();
            panic!("{} hung for {limit:?} and was killed; its standard error:\n{stderr}", self.name);
        };
        Finished {
            code: status.code(),
            signal: status.signal(),
            stdout: self.stdout(),
            stderr: self.stderr(),
            wall: *wall,
        }
    }

    fn kill_all(&self) {
        // Until none is found: one may be starting another while we look.
        for _ in 0..50 {
            let pids = owner::processes_with(RUN_MARK, &self.run);
            if pids.is_empty() {
                return;
            }
            for pid in pids.into_iter().map(Pid::from_raw) {
                // By its group, as one that forks may end right now, and its child is in the same group.
                let _ = match getpgid(Some(pid)) {
                    Ok(group) if group != getpgrp() => killpg(group, Signal::SIGKILL),
                    _ => kill(pid, Signal::SIGKILL),
                };
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill_all();
    }
}

/// All of a file, whatever the position that its writers share.
fn content(file: &File) -> Vec<u8> {
    let size = file.metadata().expect("the file's size").len();
    let mut bytes = vec![0; size as usize];
    file.read_exact_at(&mut bytes, 0).expect("the file's bytes");
    bytes
}

/// How a program ended.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Its exit status, if it exited.
    pub code: Option<i32>,
    /// The signal that killed it, if one did.
    pub signal: Option<i32>,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: String,
    /// From before its start until its end.
    pub wall: Duration,
}

impl Finished {
    /// As a shell would say it: the exit status, or 128 and the signal.
    pub fn status(&self) -> i32 {
        self.code.unwrap_or_else(|| 128 + self.signal.unwrap_or_default())
    }

    /// Its standard output as text.
    pub fn stdout_text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Checks the status, and shows standard error when it is another.
    #[track_caller]
    pub fn assert_status(&self, expected: i32) -> &Self {
        assert!(
            self.status() == expected,
            "status {} instead of {expected} after {:?}; standard error:\n{}",
            self.status(),
            self.wall,
            self.stderr
        );
        self
    }

    /// Checks that standard error contains the text.
    #[track_caller]
    pub fn assert_stderr(&self, text: &str) -> &Self {
        assert!(self.stderr.contains(text), "standard error lacks {text:?}:\n{}", self.stderr);
        self
    }
}
