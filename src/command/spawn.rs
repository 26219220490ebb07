//! Starts the command: its group, its environment, its standard input.

use super::{
    Executable, Process, Reaper, Target,
    feed::{feed, spawn_feeder},
};
use crate::{exit::Exit, exit::Failure, verdict::Ended};
use nix::{
    sys::signal::{SigSet, SigmaskHow, Signal, kill, killpg},
    unistd::{Pid, getpid},
};
use std::{
    ffi::{CString, OsStr, OsString},
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::ffi::OsStrExt,
    },
};
use tokio::{sync::oneshot, task::JoinHandle};

/// Longest `NAME=value` with its NUL that Linux's execve(2) takes: `MAX_ARG_STRLEN`, in bytes.
const VARIABLE_MAX: usize = 128 * 1024;

/// The kernel's `struct sigaction` for `SIG_DFL`: zeroes, and more of them than it has on any machine.
const DEFAULT: [u64; 8] = [0; 8];

/// What the child has for a stack until it executes, in bytes; it needs a few hundred.
const CHILD_STACK: usize = 64 * 1024;

/// The size of the kernel's signal set: a bit for each of 64 signals, in bytes.
const SIGSET: usize = 8;

/// An environment variable to set, or, without a value, to remove.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// Its value.
    pub value: Option<OsString>,
}

/// A command that runs.
#[derive(Debug)]
pub struct Command {
    leader: Pid,
    ended: oneshot::Receiver<Ended>,
    feeder: Option<JoinHandle<()>>,
}

impl Command {
    /// Starts `program` in a process group of its own, with `body` on its standard input.
    ///
    /// Has to be called on the main thread: the command is to die with the thread that started it.
    ///
    /// # Errors
    /// 127 when the kernel doesn't find the program, its interpreter or its loader after all, 126 for anything else.
    pub fn spawn(
        program: &Executable,
        variables: &[Variable],
        body: Vec<u8>,
        reaper: &Reaper,
    ) -> Result<Self, Failure> {
        let begin = || -> io::Result<Self> {
            let (stdin, rest) = feed(body)?;
            let image = Image::new(program, variables)?;
            close_on_exec();
            let leader = start(&image, stdin.as_raw_fd())?;
            let ended = reaper.watch(leader);
            // Nothing may fail from here on: the command runs.
            let feeder = rest.map(spawn_feeder);
            Ok(Self {
                leader,
                ended,
                feeder,
            })
        };
        begin().map_err(|error| {
            let (exit, why) = match error.raw_os_error() {
                Some(libc::ENOENT) => (
                    Exit::NotFound,
                    "the file, its interpreter or its dynamic loader isn't there",
                ),
                Some(libc::ENOEXEC) => (
                    Exit::NotExecutable,
                    "built for another machine, or a script without a #! line",
                ),
                Some(libc::E2BIG) => (
                    Exit::NotExecutable,
                    "its arguments and environment are too long",
                ),
                _ => (Exit::NotExecutable, "the system refused"),
            };
            Failure::new(
                exit,
                format!(
                    "the command can't be started: {}: {why} ({error})",
                    program.path.display()
                ),
            )
        })
    }

    /// The process group's leader, for messages.
    #[must_use]
    pub fn id(&self) -> i32 {
        self.leader.as_raw()
    }
}

impl Process for Command {
    async fn ended(&mut self) -> Ended {
        match (&mut self.ended).await {
            Ok(ended) => ended,
            // The reaper lives as long as the runtime, so there is no end to be told of.
            Err(_) => std::future::pending().await,
        }
    }

    fn signal(&self, target: Target, signal: Signal) {
        // Once it is reaped its number may be another's.
        if !self.ended.is_empty() {
            return;
        }
        // What is gone already needs no signal.
        let _ = match target {
            Target::Group => killpg(self.leader, signal),
            Target::Leader => kill(self.leader, signal),
        };
    }
}

impl Drop for Command {
    fn drop(&mut self) {
        // What a background child keeps open of the pipe mustn't hold anything up.
        if let Some(feeder) = self.feeder.take() {
            feeder.abort();
        }
    }
}

fn fits(name: &str, value: &OsStr) -> bool {
    let value = value.as_encoded_bytes();
    !value.contains(&0) && name.len() + value.len() + 2 <= VARIABLE_MAX
}

/// Our own descriptors close on exec; so shall those that we were started with by accident.
#[allow(unsafe_code)]
fn close_on_exec() {
    // SAFETY: close_range(2) and fcntl(2) with integer arguments; descriptors only get a flag.
    unsafe {
        let (first, last) = (3, libc::c_uint::MAX);
        let flag = libc::CLOSE_RANGE_CLOEXEC;
        if libc::syscall(libc::SYS_close_range, first, last, flag) == 0 {
            return;
        }
        // Linux knows that flag since 5.11 only, and a container's seccomp profile may not know the call.
        for entry in std::fs::read_dir("/proc/self/fd").into_iter().flatten() {
            let name = entry
                .ok()
                .and_then(|entry| entry.file_name().into_string().ok());
            if let Some(fd) = name.and_then(|name| name.parse().ok())
                && fd >= first
            {
                libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
            }
        }
    }
}

/// What execve(2) takes.
///
/// It is called here, not by the standard library, whose execvp(3) is the C library's: glibc's runs what the kernel
/// can't execute by a shell, be it built for another machine or empty (which would be a success); musl's doesn't.
struct Image {
    path: CString,
    arguments: Vec<*const libc::c_char>,
    environment: Vec<*const libc::c_char>,
    /// What the pointers point to.
    _strings: Vec<CString>,
}

impl Image {
    fn new(program: &Executable, variables: &[Variable]) -> io::Result<Self> {
        let arguments = [&program.name].into_iter().chain(&program.arguments);
        let mut strings = arguments
            .map(|argument| CString::new(argument.as_bytes()))
            .collect::<Result<Vec<_>, _>>()?;
        let count = strings.len();
        let entry = |name: &OsStr, value: &OsStr| {
            CString::new([name.as_bytes(), b"=", value.as_bytes()].concat())
        };
        for (name, value) in std::env::vars_os() {
            if !variables.iter().any(|variable| name == variable.name) {
                strings.push(entry(&name, &value)?);
            }
        }
        for Variable { name, value } in variables {
            match value.as_deref() {
                Some(value) if fits(name, value) => strings.push(entry(name.as_ref(), value)?),
                Some(_) => tracing::warn!(
                    "{name} is left out of the command's environment: its value contains a NUL or is over 128 KiB"
                ),
                None => {}
            }
        }
        let pointers = |strings: &[CString]| {
            let pointers = strings.iter().map(|string| string.as_ptr());
            pointers.chain([std::ptr::null()]).collect()
        };
        Ok(Self {
            path: CString::new(program.path.as_os_str().as_bytes())?,
            arguments: pointers(&strings[..count]),
            environment: pointers(&strings[count..]),
            _strings: strings,
        })
    }

    /// Becomes the program, or leaves in errno why that isn't possible.
    #[allow(unsafe_code)]
    fn execute(&self) {
        let (arguments, environment) = (self.arguments.as_ptr(), self.environment.as_ptr());
        // SAFETY: both are arrays of strings that end with a null pointer.
        unsafe { libc::execve(self.path.as_ptr(), arguments, environment) };
    }
}

/// What the child needs to know until it is the program, and what it says if it can't be.
struct Order<'a> {
    image: &'a Image,
    stdin: RawFd,
    parent: libc::pid_t,
    error: i32,
}

/// Starts the program in a process group of its own, with `stdin` as its standard input.
///
/// The child borrows our memory until it executes, as with posix_spawn(3), which can't ask for a parent-death signal: a
/// fork(2) costs 0.3 ms more, in copied page tables and in pages that are copied afterwards (measured with musl).
#[allow(unsafe_code)]
fn start(image: &Image, stdin: RawFd) -> io::Result<Pid> {
    let mut order = Order {
        image,
        stdin,
        parent: getpid().as_raw(),
        error: 0,
    };
    // Not filled with zeroes, so that only the pages are there that the child uses.
    let mut stack = Vec::<u128>::with_capacity(CHILD_STACK / size_of::<u128>());
    let top = stack.spare_capacity_mut().as_mut_ptr_range().end;
    // None of our handlers may run in the child: it has them until it has executed, and its memory is ours.
    let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the child runs `become_program` on a stack of its own, and this thread goes on when that is over; both
    // outlive it. It makes system calls only: it allocates nothing, takes no lock and doesn't panic.
    let pid = unsafe { libc::clone(become_program, top.cast(), flags, (&raw mut order).cast()) };
    let failed = io::Error::last_os_error();
    // It was good a moment ago, and nothing may fail now that the command runs.
    let _ = mask.thread_set_mask();
    if pid < 0 {
        return Err(failed);
    }
    // SAFETY: the child has written it, if at all, before this thread went on.
    let error = unsafe { (&raw const order.error).read_volatile() };
    if error != 0 {
        await_end(pid);
        return Err(io::Error::from_raw_os_error(error));
    }
    Ok(Pid::from_raw(pid))
}

/// Reaps a child that is about to end: this thread goes on a moment before it has.
#[allow(unsafe_code)]
fn await_end(pid: libc::pid_t) {
    // SAFETY: no status is asked for, so there is no memory to write to.
    while unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) } < 0 {
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            break;
        }
    }
}

/// The child's way from its start to the program: system calls only, and no libc function that looks at the thread it is
/// on, which is the parent's here.
#[allow(unsafe_code)]
extern "C" fn become_program(order: *mut libc::c_void) -> libc::c_int {
    let order = order.cast::<Order<'_>>();
    // SAFETY: the order outlives the child's use of it, and nobody else looks at it meanwhile.
    unsafe {
        let parent = (*order).parent;
        libc::setpgid(0, 0);
        if libc::dup2((*order).stdin, libc::STDIN_FILENO) >= 0 {
            // Whoever started us may have ignored signals. By the kernel's call, as libc's refuses the two signals of
            // its own, which glibc's posix_spawn(3) ignores.
            for signal in 1..=libc::SIGRTMAX() {
                let nobody = std::ptr::null_mut::<u64>();
                libc::syscall(
                    libc::SYS_rt_sigaction,
                    signal,
                    DEFAULT.as_ptr(),
                    nobody,
                    SIGSET,
                );
            }
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // The parent may have died before the death signal was asked for. Not raise(3): musl's would signal the
            // parent's thread, whose descriptor this child shares.
            if libc::getppid() != parent {
                libc::_exit(0);
            }
            let none = 0_u64;
            libc::syscall(
                libc::SYS_rt_sigprocmask,
                libc::SIG_SETMASK,
                &raw const none,
                std::ptr::null_mut::<u64>(),
                SIGSET,
            );
            (*order).image.execute();
        }
        (&raw mut (*order).error).write_volatile(*libc::__errno_location());
        libc::_exit(127)
    }
}
