//! Writes log lines without ever waiting for somebody to read them: what can't be written at once is left to a thread.

use super::log::Lines;
use nix::sys::signal::SigSet;
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::{Errno, ReadWriteFlags, pwritev2, write},
};
use std::{
    collections::VecDeque,
    io::IoSlice,
    os::fd::AsFd,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

/// How many lines wait for a reader, at most: five seconds of a worker that takes a hundred messages a second, beside what
/// fits into the pipe. Together they take some 300 KiB.
const WAITING_MAX: usize = 1000;

/// How long the end of a run waits for its last lines.
const LAST_LINES: Duration = Duration::from_secs(1);

/// How long the thread is waited for, so that a line stands before what the command writes after it. When nobody reads, it is
/// waited for once.
const IN_ORDER: Duration = Duration::from_millis(100);

/// The thread's stack, in bytes: it does little more than write(2).
const STACK: usize = 64 * 1024;

/// Writes lines to `file` in their order, each in one write, so that lines of several processes don't mix.
pub(super) struct Writer<F> {
    file: F,
    /// What the line about dropped lines looks like.
    lines: Lines,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Vec<u8>>,
    /// How many lines were dropped before the first one that waits, since that was last said.
    dropped: u64,
    /// A line is being written.
    writing: bool,
    has_thread: bool,
}

impl Queue {
    fn is_busy(&self) -> bool {
        self.writing || !self.waiting.is_empty()
    }
}

impl<F: AsFd + Sync + 'static> Writer<F> {
    pub(super) fn new(file: F, lines: Lines) -> Self {
        Self { file, lines, queue: Mutex::default(), changed: Condvar::new() }
    }

    /// Writes a line, or leaves it to the thread. If too many wait, the oldest one is dropped: the last line of a run is the most
    /// important one.
    pub(super) fn write(&'static self, line: String) {
        let mut line = line.into_bytes();
        let mut queue = self.queue();
        if queue.is_busy() {
            if queue.waiting.len() == WAITING_MAX {
                queue.waiting.pop_front();
                queue.dropped += 1;
            }
            queue.waiting.push_back(line);
            return;
        }
        line.drain(..write_now(&self.file, &line));
        if line.is_empty() {
            return;
        }
        queue.waiting.push_back(line);
        if !queue.has_thread {
            let thread = thread::Builder::new().stack_size(STACK);
            queue.has_thread = thread.spawn(|| self.run()).is_ok();
        }
        if queue.has_thread {
            self.changed.notify_all();
            self.wait_until_idle(queue, IN_ORDER);
        } else {
            // The system has no thread left: the line that says so must not need one.
            drop(self.write_waiting(queue));
        }
    }

    /// Waits for the last lines to be written, for a second at most.
    pub(super) fn finish(&self) {
        self.wait_until_idle(self.queue(), LAST_LINES);
    }

    fn wait_until_idle(&self, queue: MutexGuard<'_, Queue>, limit: Duration) {
        let _ = self.changed.wait_timeout_while(queue, limit, |queue| queue.is_busy());
    }

    fn run(&self) {
        // A signal that is delivered to this thread would not be seen by the signalfd.
        let _ = SigSet::all().thread_block();
        let mut queue = self.queue();
        loop {
            queue = self.write_waiting(queue);
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn write_waiting<'a>(&'a self, mut queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        while let Some(line) = self.next(&mut queue) {
            queue.writing = true;
            drop(queue);
            // Standard error may be closed; that is no reason to fail.
            let _ = write_all(&self.file, &line);
            queue = self.queue();
            queue.writing = false;
        }
        self.changed.notify_all();
        queue
    }

    fn next(&self, queue: &mut Queue) -> Option<Vec<u8>> {
        match std::mem::take(&mut queue.dropped) {
            0 => queue.waiting.pop_front(),
            dropped => Some(self.lines.about_dropped(dropped).into_bytes()),
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes what can be written without waiting, and says how much that was. Linux can do this with pipes (since 6.4), sockets and
/// /dev/null, but not with terminals, FIFOs and most file systems (seen with 6.18).
fn write_now(file: &impl AsFd, line: &[u8]) -> usize {
    let position = u64::MAX; // the file's own
    pwritev2(file, &[IoSlice::new(line)], position, ReadWriteFlags::NOWAIT).unwrap_or(0)
}

/// Writes all of it, however long that takes, even if the command has set O_NONBLOCK on the file that it shares with us.
fn write_all(file: &impl AsFd, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match write(file, bytes) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::AGAIN) => {
                poll(&mut [PollFd::new(file, PollFlags::OUT)], None)?;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::ioctl_fionbio;
    use std::io::{PipeReader, PipeWriter, Read, pipe};

    fn writer() -> (&'static Writer<PipeWriter>, PipeReader) {
        let (reader, file) = pipe().unwrap();
        (Box::leak(Box::new(Writer::new(file, Lines::default()))), reader)
    }

    /// Reads up to this line.
    fn read_to(reader: &mut PipeReader, last: &str) -> String {
        let (mut text, mut chunk) = (String::new(), [0; 1000]);
        while !text.ends_with(last) {
            let read = reader.read(&mut chunk).unwrap();
            text += str::from_utf8(&chunk[..read]).unwrap();
        }
        text
    }

    #[test]
    fn lines_are_whole_and_in_order_also_those_that_fit_into_no_pipe() {
        for nonblocking in [false, true] {
            let (writer, mut reader) = writer();
            ioctl_fionbio(&writer.file, nonblocking).unwrap();
            let lines: Vec<String> = ["a", "b", "c", "d"].map(|letter| letter.repeat(200_000) + "\n").into();
            for line in &lines {
                writer.write(line.clone());
            }
            writer.write("last\n".to_owned());
            assert!(read_to(&mut reader, "last\n") == lines.concat() + "last\n");
            writer.finish();
            assert!(!writer.queue().is_busy());
        }
    }

    #[test]
    fn the_oldest_lines_are_dropped_and_counted_where_they_are_missing() {
        let (writer, mut reader) = writer();
        let full = "x".repeat(200_000) + "\n";
        writer.write(full.clone());
        // The next ones may not overtake it.
        let lines: Vec<String> = (1..=WAITING_MAX + 3).map(|number| format!("{number}\n")).collect();
        for line in &lines {
            writer.write(line.clone());
        }
        let told = "qconsume: warning: 3 lines were dropped here: nobody was reading standard error\n";
        let text = read_to(&mut reader, &format!("\n{}\n", lines.len()));
        assert_eq!(text.strip_prefix(&full).unwrap(), told.to_owned() + &lines[3..].concat());
        // Said once.
        writer.write("end\n".to_owned());
        assert_eq!(read_to(&mut reader, "end\n"), "end\n");
    }
}
