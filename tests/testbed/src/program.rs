//! Runs the binary under test, and never hangs.

use crate::owner;
use crate::ports::random;
use crate::{PATIENCE, Signal, eventually};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::kill;
use nix::unistd::Pid;
use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};
use wait4::{ResUse, Wait4};

/// The environment variable that marks one run and everything it has started.
const RUN_MARK: &str = "QCONSUME_TESTBED_RUN";

/// Variables of this process's environment that would change what the program under test does.
const OWN_VARIABLES: [&str; 4] = ["BROKER_URL", "BROKER_URL_FILE", "AMQP_URL", "QUEUE"];

/// Gives the program the signals' usual meaning, unblocked, whatever this process was started with (under nohup a hangup is
/// ignored). A test that wants one ignored says so in [`Program::through`].
const USUAL_SIGNALS: [&str; 2] = ["/usr/bin/env", "--default-signal=HUP,INT,QUIT,PIPE,TERM"];

/// How often a reader looks whether the program has ended, while nothing arrives.
const LOOK: u16 = 20;

/// A program about to be run.
#[derive(Clone, Debug)]
#[must_use]
pub struct Program {
    path: PathBuf,
    prefix: Vec<OsString>,
    args: Vec<OsString>,
    env: Vec<(OsString, Option<OsString>)>,
    clear: bool,
    folder: Option<PathBuf>,
    stdin: Option<Vec<u8>>,
}

impl Program {
    /// The executable: `Program::new(env!("CARGO_BIN_EXE_qconsume"))`.
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self {
            path: path.as_ref().to_owned(),
            prefix: Vec::new(),
            args: Vec::new(),
            env: Vec::new(),
            clear: false,
            folder: None,
            stdin: None,
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
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Adds `-- sh -c script`.
    pub fn shell(self, script: &str) -> Self {
        self.args(["--", "sh", "-c", script])
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env
            .push((name.as_ref().to_owned(), Some(value.as_ref().to_owned())));
        self
    }

    /// Removes a variable from its environment.
    pub fn env_remove(mut self, name: impl AsRef<OsStr>) -> Self {
        self.env.push((name.as_ref().to_owned(), None));
        self
    }

    /// Starts from an empty environment (but for the testbed's marks) instead of this process's.
    pub fn env_clear(mut self) -> Self {
        self.clear = true;
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

    /// Runs it through another command that replaces itself with it: `["ip", "netns", "exec", name]`, `["tini", "--"]`.
    pub fn through<A: AsRef<OsStr>>(mut self, prefix: impl IntoIterator<Item = A>) -> Self {
        self.prefix
            .extend(prefix.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Starts it, in a process group of its own.
    ///
    /// # Panics
    /// When it can't be started.
    #[track_caller]
    pub fn spawn(self) -> Running {
        let owner = owner::get().unwrap_or_else(|error| panic!("{error:#}"));
        let run = format!("{:016x}", random());
        let mut command = Command::new(USUAL_SIGNALS[0]);
        command.arg(USUAL_SIGNALS[1]).args(&self.prefix);
        command.arg(&self.path).args(&self.args);
        if self.clear {
            command.env_clear();
        } else {
            for (name, _) in std::env::vars_os() {
                let text = name.to_string_lossy();
                if OWN_VARIABLES.contains(&&*text) || text.starts_with("QCONSUME_") {
                    command.env_remove(&name);
                }
            }
        }
        for (name, value) in &self.env {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command
            .env(owner::MARK, &owner.id)
            .env(RUN_MARK, &run)
            .stdin(if self.stdin.is_some() {
                Stdio::piped()
            } else {
                Stdio::null()
            })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        let started = Instant::now();
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {}: {error}", self.path.display()));
        let pid = child.id() as i32;
        if let (Some(mut pipe), Some(bytes)) = (child.stdin.take(), self.stdin) {
            // A program that doesn't read all of it is that program's business.
            thread::spawn(move || drop(pipe.write_all(&bytes)));
        }
        let shared = Arc::new(Shared::default());
        if let Some(pipe) = child.stdout.take() {
            shared.read(pipe, |state| &mut state.stdout);
        }
        if let Some(pipe) = child.stderr.take() {
            shared.read(pipe, |state| &mut state.stderr);
        }
        let waiter = shared.clone();
        thread::spawn(move || {
            let ended = child.wait4();
            let wall = started.elapsed();
            waiter.change(|state| state.ended = ended.ok().map(|ended| (ended, wall)));
        });
        Running {
            name: self.path.display().to_string(),
            pid,
            run,
            shared,
        }
    }

    /// Starts it and waits for its end; [`PATIENCE`] is the limit.
    ///
    /// # Panics
    /// When it can't be started or hangs.
    #[track_caller]
    pub fn run(self) -> Finished {
        self.spawn().wait(PATIENCE)
    }
}

/// What the threads that watch a program have seen so far.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    /// Pipes that have come to their end.
    closed: usize,
    /// Pipes of which everything was read that the program itself has written; what it has left behind may hold them open.
    drained: usize,
    ended: Option<(ResUse, Duration)>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    fn read(
        self: &Arc<Self>,
        mut pipe: impl Read + AsFd + Send + 'static,
        buffer: fn(&mut State) -> &mut Vec<u8>,
    ) {
        let shared = self.clone();
        thread::spawn(move || {
            let mut chunk = vec![0; 64 * 1024];
            let mut drained = false;
            loop {
                let ended = shared.lock().ended.is_some();
                let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
                if poll(&mut fds, LOOK) == Ok(0) {
                    if ended && !drained {
                        drained = true;
                        shared.change(|state| state.drained += 1);
                    }
                    continue;
                }
                match pipe.read(&mut chunk) {
                    Ok(count @ 1..) => {
                        shared.change(|state| buffer(state).extend_from_slice(&chunk[..count]));
                    }
                    _ => break,
                }
            }
            shared.change(|state| {
                state.closed += 1;
                state.drained += usize::from(!drained);
            });
        });
    }

    /// Waits until the condition holds; says whether it did within the limit.
    fn wait(&self, limit: Duration, condition: impl Fn(&State) -> bool) -> bool {
        let (_state, result) = self
            .changed
            .wait_timeout_while(self.lock(), limit, |state| !condition(state))
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        !result.timed_out()
    }
}

/// A program that was started. Dropping it kills it and everything it has started.
pub struct Running {
    name: String,
    pid: i32,
    run: String,
    shared: Arc<Shared>,
}

impl Running {
    /// Its process id, which is its process group's too.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends it a signal; one that has ended already is left alone.
    pub fn signal(&self, signal: Signal) {
        if self.shared.lock().ended.is_none() {
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.shared.lock().ended.is_some()
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().stderr).into_owned()
    }

    /// What it has written to standard output so far.
    pub fn stdout(&self) -> Vec<u8> {
        self.shared.lock().stdout.clone()
    }

    /// Waits until the text has appeared on its standard error.
    ///
    /// # Panics
    /// When it doesn't within the limit, or when the program ends without it.
    #[track_caller]
    pub fn wait_for_stderr(&self, text: &str, limit: Duration) {
        self.wait_for(text, "standard error", |state| &state.stderr, limit);
    }

    /// Waits until the text has appeared on its standard output.
    ///
    /// # Panics
    /// When it doesn't within the limit, or when the program ends without it.
    #[track_caller]
    pub fn wait_for_stdout(&self, text: &str, limit: Duration) {
        self.wait_for(text, "standard output", |state| &state.stdout, limit);
    }

    #[track_caller]
    fn wait_for(&self, text: &str, stream: &str, buffer: fn(&State) -> &Vec<u8>, limit: Duration) {
        let appeared = |state: &State| contains(buffer(state), text.as_bytes());
        self.shared.wait(limit, |state| {
            appeared(state) || (state.ended.is_some() && state.closed == 2)
        });
        let found = appeared(&self.shared.lock());
        assert!(
            found,
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
    ///
    /// # Panics
    /// When something is.
    #[track_caller]
    pub fn wait_no_leftovers(&self, limit: Duration) {
        let gone = eventually(limit, || self.leftovers().is_empty());
        assert!(
            gone,
            "{} has left processes behind: {:?}",
            self.name,
            self.leftovers()
        );
    }

    /// Waits for its end and gives everything about it.
    ///
    /// # Panics
    /// When it hasn't ended within the limit: that is a hang. It is killed then.
    #[track_caller]
    pub fn wait(self, limit: Duration) -> Finished {
        self.finish(limit)
    }

    /// The same, and keeps the handle, to ask for [`Running::leftovers`] afterwards.
    ///
    /// # Panics
    /// When it hasn't ended within the limit.
    #[track_caller]
    pub fn finish(&self, limit: Duration) -> Finished {
        let ended = self.shared.wait(limit, |state| state.ended.is_some());
        if !ended {
            let stderr = self.stderr();
            self.kill_all();
            panic!(
                "{} hung for {limit:?} and was killed; its standard error:\n{stderr}",
                self.name
            );
        }
        let drained = self.shared.wait(PATIENCE, |state| state.drained == 2);
        assert!(drained, "the output of {} never pauses", self.name);
        let state = self.shared.lock();
        let (ended, wall) = state.ended.as_ref().expect("it has ended");
        Finished {
            code: ended.status.code(),
            signal: ended.status.signal(),
            peak_memory: ended.rusage.maxrss,
            stdout: state.stdout.clone(),
            stderr: String::from_utf8_lossy(&state.stderr).into_owned(),
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
            for pid in pids {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
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

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    needle.is_empty()
        || haystack
            .windows(needle.len())
            .any(|window| window == needle)
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
    /// The most memory that it had resident, in bytes. Never less than what this process had when it started it: the
    /// kernel counts from there.
    pub peak_memory: u64,
    /// From before its start until its end.
    pub wall: Duration,
}

impl Finished {
    /// As a shell would say it: the exit status, or 128 and the signal.
    pub fn status(&self) -> i32 {
        self.code
            .unwrap_or_else(|| 128 + self.signal.unwrap_or_default())
    }

    /// Its standard output as text.
    pub fn stdout_text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Checks the status, and shows standard error when it is another.
    ///
    /// # Panics
    /// When it is.
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
    ///
    /// # Panics
    /// When it doesn't.
    #[track_caller]
    pub fn assert_stderr(&self, text: &str) -> &Self {
        assert!(
            self.stderr.contains(text),
            "standard error lacks {text:?}:\n{}",
            self.stderr
        );
        self
    }
}
