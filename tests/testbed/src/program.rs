//! Runs a program under test, with a limit on every wait.

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

/// The environment variable that marks a run's processes.
const RUN_MARK: &str = "QCONSUME_TESTBED_RUN";

/// Variables of this process that would change what the program under test does.
const OWN_VARIABLES: [&str; 4] = ["BROKER_URL", "BROKER_URL_FILE", "AMQP_URL", "QUEUE"];

/// Resets signals that this process was started with as ignored (nohup ignores SIGHUP). If a test needs an ignored
/// signal, it uses [`Program::through`].
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
    /// A program by its path, for example `Program::new(env!("CARGO_BIN_EXE_qconsume"))`.
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

    /// Sets its standard input, which is empty otherwise.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    /// Sets its standard error; [`Running::stderr`] is empty then.
    pub fn stderr(mut self, file: impl Into<OwnedFd>) -> Self {
        self.stderr = Some(Arc::new(file.into()));
        self
    }

    /// Runs it through another command, which executes it: `["ip", "netns", "exec", name]`, `["tini", "--"]`.
    pub fn through<A: AsRef<OsStr>>(mut self, prefix: impl IntoIterator<Item = A>) -> Self {
        self.prefix.extend(prefix.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Starts it in a new process group.
    #[track_caller]
    pub fn spawn(self) -> Running {
        let run = format!("{:016x}", fastrand::u64(..));
        // Files, not pipes, so that processes that the program leaves behind don't block a reader.
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
            // An error only means that the program doesn't read all of it.
            thread::spawn(move || drop(pipe.write_all(&bytes)));
        }
        let ended = running.ended.clone();
        thread::spawn(move || {
            let status = child.wait().expect("nobody else waits for it");
            let _ = ended.set((status, started.elapsed()));
        });
        running
    }

    /// Starts it and waits for its end, for [`PATIENCE`] at most.
    #[track_caller]
    pub fn run(self) -> Finished {
        self.spawn().wait(PATIENCE)
    }
}

/// A running program. Dropping it kills it and everything that it has started.
pub struct Running {
    name: String,
    pid: i32,
    run: String,
    stdout: File,
    stderr: File,
    /// How it ended, and after what time.
    ended: Arc<OnceLock<(ExitStatus, Duration)>>,
}

impl Running {
    /// Its process id, which is also its process group's.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends it a signal, unless it has ended.
    pub fn signal(&self, signal: Signal) {
        if !self.has_ended() {
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.ended.get().is_some()
    }

    /// Its standard error so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&content(&self.stderr)).into_owned()
    }

    /// Its standard output so far.
    pub fn stdout(&self) -> Vec<u8> {
        content(&self.stdout)
    }

    /// Waits until it has written this text to standard error.
    #[track_caller]
    pub fn wait_for_stderr(&self, text: &str, limit: Duration) {
        self.wait_for(text, "standard error", &self.stderr, limit);
    }

    /// Waits until it has written this text to standard output.
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

    /// The pids of running processes that it has started, without itself. Doesn't find processes with an empty
    /// environment.
    pub fn leftovers(&self) -> Vec<i32> {
        let mut pids = owner::processes_with(RUN_MARK, &self.run);
        pids.retain(|pid| *pid != self.pid);
        pids
    }

    /// Waits until all processes that it has started have ended.
    #[track_caller]
    pub fn wait_no_leftovers(&self, limit: Duration) {
        let gone = eventually(limit, || self.leftovers().is_empty());
        assert!(gone, "{} has left processes behind: {:?}", self.name, self.leftovers());
    }

    /// Waits for its end; returns its status and output. After the limit, kills it and panics.
    #[track_caller]
    pub fn wait(self, limit: Duration) -> Finished {
        self.finish(limit)
    }

    /// The same, but keeps the handle, for [`Running::leftovers`].
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
        // Repeats until none is found, as they may start others meanwhile.
        for _ in 0..50 {
            let pids = owner::processes_with(RUN_MARK, &self.run);
            if pids.is_empty() {
                return;
            }
            for pid in pids.into_iter().map(Pid::from_raw) {
                // Kills the group: if the process forks and exits right now, its child is in the same group.
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

/// A file's content. Reading doesn't change the position that its writers share.
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
    /// The time from its start to its end.
    pub wall: Duration,
}

impl Finished {
    /// The status as in a shell: the exit status, or 128 plus the signal.
    pub fn status(&self) -> i32 {
        self.code.unwrap_or_else(|| 128 + self.signal.unwrap_or_default())
    }

    /// Its standard output as text.
    pub fn stdout_text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Checks the status; on failure, shows standard error.
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
