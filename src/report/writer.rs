//! Writes log lines without waiting for their reader: a thread writes what can't be written at once.

use super::log::Renderer;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, ReadWriteFlags, pwritev2, write},
};
use std::{
    collections::VecDeque,
    io::IoSlice,
    os::fd::AsFd,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// In lines, about 300 KiB: five seconds of a worker that logs a hundred messages a second, with two lines for each.
const WAITING_MAX: usize = 1000;

pub(super) const FINISH_TIMEOUT: Duration = Duration::from_secs(1);

/// A line should come before what the command writes next, so [`Writer::write`] waits this long for the thread.
const ORDER_TIMEOUT: Duration = Duration::from_millis(100);

/// In bytes. The thread does little more than write(2).
const STACK: usize = 64 * 1024;

/// A pipe that is ready has room for this many bytes (`PIPE_BUF` in Linux's limits.h).
const PIPE_BUF: usize = 4096;

/// Writes each line in one write if possible, so that lines of several processes don't mix.
pub(super) struct Writer<F> {
    file: F,
    pub(super) renderer: Renderer,
    backlog: Mutex<Backlog>,
    changed: Condvar,
}

#[derive(Default)]
struct Backlog {
    rest_of_line: Vec<u8>,
    waiting: VecDeque<Vec<u8>>,
    /// Since the last line that said how many.
    dropped: u64,
    thread_is_writing: bool,
    has_thread: bool,
}

impl Backlog {
    fn is_busy(&self) -> bool {
        self.thread_is_writing || !self.rest_of_line.is_empty() || !self.waiting.is_empty()
    }

    /// If there are too many lines, drops the oldest: the last line of a run is the most important one.
    fn push(&mut self, line: Vec<u8>) {
        if self.waiting.len() == WAITING_MAX {
            self.waiting.pop_front();
            self.dropped += 1;
        }
        self.waiting.push_back(line);
    }
}

impl<F: AsFd + Sync + 'static> Writer<F> {
    pub(super) fn new(file: F, renderer: Renderer) -> Self {
        Self { file, renderer, backlog: Mutex::default(), changed: Condvar::new() }
    }

    pub(super) fn write(&'static self, line: String) {
        let mut line = line.into_bytes();
        let mut backlog = self.backlog();
        let was_busy = backlog.is_busy();
        if was_busy {
            backlog.push(line);
        } else {
            line.drain(..write_now(&self.file, &line).unwrap_or(0));
            if line.is_empty() {
                return;
            }
            backlog.rest_of_line = line;
        }
        backlog.has_thread = backlog.has_thread || self.start_thread();
        if !backlog.has_thread {
            // The system has no thread left, and the line that says so must not need one.
            self.write_without_thread(&mut backlog, Duration::ZERO);
        } else if !was_busy {
            self.changed.notify_all();
            self.wait_until_idle(backlog, ORDER_TIMEOUT);
        }
    }

    fn start_thread(&'static self) -> bool {
        thread::Builder::new().stack_size(STACK).spawn(|| self.run()).is_ok()
    }

    pub(super) fn finish(&self) {
        let mut backlog = self.backlog();
        if backlog.has_thread {
            self.wait_until_idle(backlog, FINISH_TIMEOUT);
        } else {
            self.write_without_thread(&mut backlog, FINISH_TIMEOUT);
        }
    }

    fn wait_until_idle(&self, backlog: MutexGuard<'_, Backlog>, limit: Duration) {
        let _ = self.changed.wait_timeout_while(backlog, limit, |backlog| backlog.is_busy());
    }

    fn run(&self) {
        let mut backlog = self.backlog();
        loop {
            while let Some(line) = self.next(&mut backlog) {
                backlog.thread_is_writing = true;
                drop(backlog);
                // If standard error is closed, there is nobody to tell.
                let _ = write_all(&self.file, &line);
                backlog = self.backlog();
                backlog.thread_is_writing = false;
            }
            self.changed.notify_all();
            backlog = self.changed.wait(backlog).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn write_without_thread(&self, backlog: &mut Backlog, patience: Duration) {
        let deadline = Instant::now() + patience;
        while let Some(line) = self.next(backlog) {
            backlog.rest_of_line = line;
            let patience = deadline.saturating_duration_since(Instant::now());
            match write_when_ready(&self.file, &backlog.rest_of_line, patience) {
                Ok(written @ 1..) => drop(backlog.rest_of_line.drain(..written)),
                Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => {}
                Err(Errno::AGAIN | Errno::INTR) => return,
                _ => backlog.rest_of_line.clear(),
            }
        }
    }

    fn next(&self, backlog: &mut Backlog) -> Option<Vec<u8>> {
        if !backlog.rest_of_line.is_empty() {
            return Some(std::mem::take(&mut backlog.rest_of_line));
        }
        match std::mem::take(&mut backlog.dropped) {
            0 => backlog.waiting.pop_front(),
            dropped => Some(self.renderer.about_dropped(dropped).into_bytes()),
        }
    }

    fn backlog(&self) -> MutexGuard<'_, Backlog> {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes a part, without waiting. Linux can do this with pipes (since 6.4), sockets and /dev/null, but not with
/// terminals, FIFOs and most file systems (seen with 6.18).
fn write_now(file: &impl AsFd, bytes: &[u8]) -> rustix::io::Result<usize> {
    let position = u64::MAX; // -1 for pwritev2(2): at the file's own offset
    pwritev2(file, &[IoSlice::new(bytes)], position, ReadWriteFlags::NOWAIT)
}

/// Writes a part as soon as there is room. Fails with EAGAIN after `patience`. Where Linux can't do [`write_now`], this
/// may wait longer, if another process takes the room between poll(2) and write(2).
pub(super) fn write_when_ready(file: &impl AsFd, bytes: &[u8], patience: Duration) -> rustix::io::Result<usize> {
    let patience = Timespec::try_from(patience).ok();
    if poll(&mut [PollFd::new(file, PollFlags::OUT)], patience.as_ref())? == 0 {
        return Err(Errno::AGAIN);
    }
    match write_now(file, bytes) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => write(file, &bytes[..bytes.len().min(PIPE_BUF)]),
        written => written,
    }
}

/// Waits as long as it takes, even if the command has set O_NONBLOCK on the file that we share.
fn write_all(file: &impl AsFd, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match write(file, bytes) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::AGAIN) => {
                if let Err(error) = poll(&mut [PollFd::new(file, PollFlags::OUT)], None)
                    && error != Errno::INTR
                {
                    return Err(error);
                }
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
        (Box::leak(Box::new(Writer::new(file, Renderer::default()))), reader)
    }

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
            assert!(!writer.backlog().is_busy());
        }
    }

    #[test]
    fn the_oldest_lines_are_dropped_and_counted_where_they_are_missing() {
        let (writer, mut reader) = writer();
        let full = "x".repeat(200_000) + "\n";
        writer.write(full.clone());
        let lines: Vec<String> = (1..=WAITING_MAX + 3).map(|number| format!("{number}\n")).collect();
        for line in &lines {
            writer.write(line.clone());
        }
        let told = "qconsume: warning: 3 lines were dropped here: nobody was reading standard error\n";
        let text = read_to(&mut reader, &format!("\n{}\n", lines.len()));
        assert_eq!(text.strip_prefix(&full).unwrap(), told.to_owned() + &lines[3..].concat());
        writer.write("end\n".to_owned());
        assert_eq!(read_to(&mut reader, "end\n"), "end\n");
    }
}
