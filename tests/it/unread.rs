//! Standard error that nobody reads, at all or for a while: this may cost log lines, but nothing else.

use crate::common::{MESSAGE, assert_back, assert_gone, assert_returned, qconsume, qconsume_path, qpublish, worker};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::ioctl_fionbio,
};
use std::{
    fs::File,
    io::{ErrorKind, PipeReader, PipeWriter, Read, Write, pipe},
    os::fd::AsRawFd,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};
use testbed::{
    Broker, Finished, PATIENCE, Program, Proxy, Queue, Running, Signal, eventually, missing,
    owner::{find_in_path, is_root, temp_folder},
};

/// Longest time from the reason to end until the end: a second for the last lines, the rest for a busy machine. If a
/// run blocks on standard error, it does so for ever.
const PROMPT: Duration = Duration::from_secs(20);

/// How long a run waits at its end for a reader of its last lines.
const LAST_LINES: Duration = Duration::from_secs(1);

struct Pipe {
    reader: PipeReader,
    writer: PipeWriter,
}

impl Pipe {
    fn empty() -> Self {
        let (reader, writer) = pipe().unwrap();
        ioctl_fionbio(&reader, true).unwrap();
        Self { reader, writer }
    }

    /// A pipe without room for another byte.
    fn full() -> Self {
        let mut pipe = Self::empty();
        ioctl_fionbio(&pipe.writer, true).unwrap();
        for size in [4096, 1] {
            while pipe.writer.write(&vec![b'.'; size]).is_ok() {}
        }
        ioctl_fionbio(&pipe.writer, false).unwrap();
        pipe
    }

    /// Starts the program with this pipe as its standard error.
    fn start(&self, program: Program) -> Running {
        program.stderr(self.writer.try_clone().unwrap()).spawn()
    }

    /// Waits until a write to the pipe would block.
    #[track_caller]
    fn wait_full(&self) {
        let is_full = || {
            let mut fds = [PollFd::new(&self.writer, PollFlags::OUT)];
            poll(&mut fds, Some(&Timespec::default())).unwrap() == 0
        };
        assert!(eventually(PATIENCE, is_full), "the pipe isn't full");
    }

    /// Reads until all other writers are gone; returns what came after the filler.
    #[track_caller]
    fn read(self) -> String {
        let Self { mut reader, writer } = self;
        drop(writer);
        let mut bytes = Vec::new();
        let ended = eventually(PATIENCE, || match reader.read_to_end(&mut bytes) {
            Ok(_) => true,
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(error) => panic!("{error}"),
        });
        assert!(ended, "the pipe still has a writer");
        String::from_utf8(bytes).unwrap().trim_start_matches('.').to_owned()
    }
}

/// A queue with [`MESSAGE`] in it.
fn queue(name: &str) -> Queue {
    let queue = Broker::shared().queue(name);
    queue.publish(MESSAGE);
    queue
}

/// Starts the worker, and waits until its command has filled the pipe.
#[track_caller]
fn filled(pipe: &Pipe, worker: Program) -> Running {
    let running = pipe.start(worker);
    running.wait_for_stdout("running", PATIENCE);
    pipe.wait_full();
    running
}

#[test]
fn a_time_limit_is_kept_when_the_commands_output_is_not_read() {
    let queue = queue("unread-timeout");
    let pipe = Pipe::empty();
    let running = pipe.start(worker(&queue).args(["--timeout", "300ms"]).shell("exec yes >&2"));
    running.finish(PROMPT).assert_status(124);
    assert_back(&queue);
}

#[test]
fn a_signal_is_obeyed_and_grace_is_kept_when_nobody_reads() {
    for (options, script, status) in [
        (&[][..], "echo running; exec yes >&2", 143),
        (&["--grace", "100ms"], "trap '' TERM; echo running; exec yes >&2", 137),
    ] {
        let queue = queue("unread-signal");
        let pipe = Pipe::empty();
        let running = filled(&pipe, worker(&queue).args(["--log-level", "debug"]).args(options).shell(script));
        running.signal(Signal::SIGTERM);
        running.finish(PROMPT).assert_status(status);
        assert_back(&queue);
    }
}

#[test]
fn a_lost_delivery_ends_the_command_when_nobody_reads() {
    let queue = queue("unread-lost");
    let proxy = Proxy::of(Broker::shared());
    let pipe = Pipe::empty();
    let running = filled(&pipe, worker(&queue).url(&proxy.url()).shell("echo running; exec yes >&2"));
    proxy.cut();
    running.finish(PROMPT).assert_status(75);
    assert_back(&queue);
}

#[test]
fn a_pipe_that_was_full_before_holds_up_neither_command_nor_heartbeats_nor_settlement() {
    let queue = queue("unread-before");
    let pipe = Pipe::full();
    // The broker would close a connection after three seconds without heartbeats.
    let url = format!("{}?heartbeat=1", Broker::shared().url());
    let done = temp_folder("before").join("done");
    let running =
        pipe.start(worker(&queue).url(&url).args(["--log-level", "debug"]).env("DONE", &done).shell("sleep 4; >$DONE"));
    assert!(eventually(PROMPT, || done.exists()), "the command wasn't run");
    let since = Instant::now();
    running.finish(PROMPT).assert_status(0);
    // At its end the run waits a second for a reader, and no longer.
    assert!(since.elapsed() < LAST_LINES + Duration::from_secs(4), "{:?}", since.elapsed());
    assert_gone(&queue);
}

#[test]
fn a_run_that_never_begins_ends_when_nobody_reads() {
    for (program, status) in [
        (qconsume().arg("--bogus"), 64),
        (qpublish().arg("--bogus"), 64),
        (qconsume().url("amqp://127.0.0.1").queue("q").arg("no-such-command"), 127),
    ] {
        let pipe = Pipe::full();
        pipe.start(program).finish(PROMPT).assert_status(status);
    }
}

#[test]
fn a_reader_that_comes_back_is_told_how_many_lines_were_dropped() {
    const MESSAGES: usize = 600;
    let queue = Broker::shared().queue("unread-dropped");
    queue.publish_all(vec![MESSAGE; MESSAGES - 1]);
    let pipe = Pipe::full();
    let count = MESSAGES.to_string();
    let json = ["--log-format", "json"];
    let running = pipe.start(worker(&queue).args(["--count", &count]).args(json).args(["--", "true"]));
    // Each message makes two lines.
    let done = || queue.ready() == 0 && queue.consumers() == 1;
    assert!(eventually(PATIENCE, done), "not all messages were taken");
    queue.publish("the last one");
    let text = pipe.read();
    running.finish(PROMPT).assert_status(0);

    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let message = |line: &serde_json::Value| line["message"].as_str().unwrap().to_owned();
    let (told, rest): (Vec<_>, Vec<_>) = lines.iter().map(message).partition(|message| message.contains("dropped"));
    let [told] = &told[..] else {
        panic!("{told:?}");
    };
    let dropped: usize = told.split(' ').next().unwrap().parse().unwrap();
    assert!(told.ends_with(" lines were dropped here: nobody was reading standard error"), "{told}");
    assert!(dropped > 0);
    assert_eq!(rest.len() + dropped, 2 * MESSAGES);
    assert_eq!(rest.last().unwrap(), "command succeeded; message acknowledged");
}

#[test]
fn the_last_line_is_there_and_whole_when_the_command_leaves_standard_error_non_blocking() {
    if find_in_path("python3").is_none() {
        return missing("python3");
    }
    let queue = queue("unread-nonblocking");
    let pipe = Pipe::empty();
    let script = "import os, sys
os.set_blocking(2, False)
try:
    while True: os.write(2, b'.')
except BlockingIOError:
    sys.exit(3)";
    let log = temp_folder("nonblocking").join("termination");
    std::fs::write(&log, "").unwrap();
    let program = worker(&queue).env("QCONSUME_TERMINATION_LOG", &log).args(["--log-level", "error", "--"]);
    let running = pipe.start(program.args(["python3", "-c", script]));
    let wrote = || std::fs::read(&log).is_ok_and(|text| !text.is_empty());
    assert!(eventually(PATIENCE, wrote), "no termination message");
    // qconsume writes its last line right after that, and waits for a reader, which comes later.
    eventually(LAST_LINES / 4, || running.has_ended());
    let text = pipe.read();
    running.finish(PROMPT).assert_status(3);
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("qconsume: error: command exited with status 3; message requeued"), "{text}");
    assert!(text.ends_with(" status=3 source=\"command\"\n"), "{text}");
    assert_returned(&queue, MESSAGE);
}

#[test]
fn a_line_stands_before_what_the_command_writes_after_it() {
    const MESSAGES: usize = 10;
    let queue = Broker::shared().queue("unread-order");
    let run = || {
        queue.publish_all([MESSAGE; MESSAGES]);
        worker(&queue).args(["--count", &MESSAGES.to_string()]).shell("echo hi >&2")
    };
    // qconsume writes to a pipe without blocking, and to a file in a thread.
    let pipe = Pipe::empty();
    let running = pipe.start(run());
    let texts = [pipe.read(), run().run().stderr];
    running.finish(PROMPT).assert_status(0);
    for text in texts {
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3 * MESSAGES, "{text}");
        for lines in lines.chunks(3) {
            assert!(lines[0].starts_with("qconsume: message taken"), "{text}");
            assert_eq!(lines[1], "hi", "{text}");
            assert!(lines[2].starts_with("qconsume: command succeeded"), "{text}");
        }
    }
}

#[test]
fn qpublish_publishes_and_gives_up_in_time_when_nobody_reads() {
    let queue = Broker::shared().queue("unread-publish");
    let debug = ["--log-level", "debug"];
    let pipe = Pipe::full();
    let running = pipe.start(qpublish().url(queue.url()).queue(queue.name()).args(debug).args(["a", "b"]));
    running.finish(PROMPT).assert_status(0);
    assert_eq!([(); 2].map(|()| queue.wait_get().text()), ["a", "b"]);

    let silent = Proxy::silent();
    let limit = ["--connect-timeout", "1s"];
    let running = pipe.start(qpublish().url(&silent.url()).queue("q").args(debug).args(limit).arg("a"));
    running.finish(PROMPT).assert_status(69);
}

/// qconsume with a usage error, where the system has no thread left for it; `None` if this machine can't do that.
fn without_threads(name: &str) -> Option<Program> {
    if !is_root() || find_in_path("setpriv").is_none() {
        missing("root, and setpriv");
        return None;
    }
    // The kernel counts processes for each user, so the test needs an unused one, and a copy of the program that it can
    // reach.
    static USERS: AtomicU32 = AtomicU32::new(0);
    let user = 1_500_000 + 8 * std::process::id() + USERS.fetch_add(1, Ordering::Relaxed);
    let program = temp_folder(name).join("qconsume");
    std::fs::copy(qconsume_path(), &program).unwrap();
    let program = Program::new(&program).arg("--bogus");
    Some(program.through(["setpriv", &format!("--reuid={user}"), "--clear-groups"]).through(["prlimit", "--nproc=1"]))
}

#[test]
fn lines_are_there_when_the_system_has_no_thread_left() {
    let Some(program) = without_threads("threads") else {
        return;
    };
    let run: Finished = program.run();
    run.assert_status(64).assert_stderr("unexpected argument '--bogus'");
}

#[test]
fn nobody_waits_for_a_reader_when_the_system_has_no_thread_left() {
    for is_fifo in [false, true] {
        let Some(program) = without_threads(&format!("threads-unread-{is_fifo}")) else {
            return;
        };
        let pipe = Pipe::full();
        // Linux can't write to a FIFO without waiting. A pipe that is opened by its name is one.
        let by_name = || File::options().write(true).open(format!("/proc/self/fd/{}", pipe.writer.as_raw_fd()));
        let running = if is_fifo { program.stderr(by_name().unwrap()).spawn() } else { pipe.start(program) };
        running.finish(PROMPT).assert_status(64);
    }
}
