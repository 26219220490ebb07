//! The body, on its way to the command's standard input.
//!
//! A large one isn't copied into the pipe but lent to it, page by page, with vmsplice(2): a fifth of the processor time
//! that a message of 12 MiB takes. A pipe that has borrowed pages shows what is in them when they are read, and a command
//! may leave the pipe to a child of its own that reads on when the command is long gone. So when the body is no longer
//! needed the pages are taken out of our memory first (`MADV_DONTNEED`), and what is put there next are other pages.

use std::{
    io::{self, PipeReader, PipeWriter},
    mem,
    ops::Range,
    os::fd::{AsRawFd, OwnedFd},
};
use tokio::{
    net::unix::pipe,
    task::{JoinHandle, yield_now},
};

/// What an unprivileged process may ask a pipe to hold, in bytes: the default of `fs.pipe-max-size`.
const PIPE_MAX: i32 = 1024 * 1024;

/// What an unchanged pipe holds, in bytes.
const PIPE_DEFAULT: usize = 64 * 1024;

/// From this size on a body is lent, in bytes: to copy less takes less than the calls about the pages.
const LARGE: usize = 1024 * 1024;

/// What is left to write once the command runs.
pub(super) struct Rest {
    pipe: pipe::Sender,
    body: Body,
}

/// A pipe that holds the body's beginning already, which for most bodies is all of it.
pub(super) fn feed(body: Vec<u8>) -> io::Result<(PipeReader, Option<Rest>)> {
    begin(Body::new(body))
}

fn begin(mut body: Body) -> io::Result<(PipeReader, Option<Rest>)> {
    let (reader, writer) = io::pipe()?;
    prepare_pipe(&writer, body.bytes.len())?;
    while !body.is_written() {
        match body.write(&writer) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let pipe = pipe::Sender::from_owned_fd(OwnedFd::from(writer))?;
                return Ok((reader, Some(Rest { pipe, body })));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok((reader, None))
}

#[allow(unsafe_code)]
fn prepare_pipe(writer: &PipeWriter, size: usize) -> io::Result<()> {
    let fd = writer.as_raw_fd();
    // SAFETY: fcntl(2) on a descriptor that we own, with integer arguments.
    unsafe {
        if size > PIPE_DEFAULT {
            // Fewer turns between us and the command; where the limit is lower, the pipe stays as it is.
            libc::fcntl(fd, libc::F_SETPIPE_SZ, PIPE_MAX);
        }
        if libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Writes the rest while the command runs.
pub(super) fn spawn_feeder(Rest { pipe, mut body }: Rest) -> JoinHandle<()> {
    tokio::spawn(async move {
        while !body.is_written() {
            let written = match pipe.writable().await {
                Ok(()) => pipe.try_io(|| body.write(&pipe)),
                Err(error) => Err(error),
            };
            match written {
                Err(error)
                    if ![io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted]
                        .contains(&error.kind()) =>
                {
                    // A command that doesn't read to the end (EPIPE) knows what it does.
                    return;
                }
                // A command that reads as fast as we write isn't all there is to do.
                _ => yield_now().await,
            }
        }
    })
}

/// A body, and how much of it the pipe has.
struct Body {
    bytes: Vec<u8>,
    written: usize,
    /// The size of a page, in bytes, if pages are to be lent.
    page: Option<usize>,
    /// What was lent: it begins and, rounded up, ends with a page that has nothing but the body in it.
    lent: Range<usize>,
}

impl Body {
    fn new(bytes: Vec<u8>) -> Self {
        let page = (bytes.len() >= LARGE).then(page_size).flatten();
        Self {
            bytes,
            written: 0,
            page,
            lent: 0..0,
        }
    }

    fn is_written(&self) -> bool {
        self.written == self.bytes.len()
    }

    /// Puts some more of it into the pipe.
    fn write(&mut self, pipe: &impl AsRawFd) -> io::Result<()> {
        let rest = &self.bytes[self.written..];
        let mut piece = rest;
        if let Some(page) = self.page {
            let address = rest.as_ptr().addr();
            let whole = rest.len() / page * page;
            if !address.is_multiple_of(page) {
                // Up to where a page begins, which has others' memory in it.
                piece = &rest[..rest.len().min(page - address % page)];
            } else if whole > 0 {
                match lend(pipe, &rest[..whole]) {
                    Ok(n) => {
                        if self.lent.is_empty() {
                            self.lent.start = self.written;
                        }
                        self.written += n;
                        self.lent.end = self.written;
                        return Ok(());
                    }
                    Err(error) if is_about_the_pipe(&error) => return Err(error),
                    // A kernel, or a profile of what a container may do, that doesn't know the call.
                    Err(_) => self.page = None,
                }
            }
        }
        self.written += copy(pipe, piece)?;
        Ok(())
    }
}

impl Body {
    /// Takes the pages that were lent out of our memory: what is written there from now on isn't seen in the pipe.
    #[allow(unsafe_code)]
    fn part_with_pages(&mut self) {
        let (Some(page), false) = (page_size(), self.lent.is_empty()) else {
            return;
        };
        let lent = &mut self.bytes[mem::take(&mut self.lent)];
        let size = lent.len().next_multiple_of(page);
        // SAFETY: these pages are the body's alone, and nobody looks at it any more.
        let parted =
            unsafe { libc::madvise(lent.as_mut_ptr().cast(), size, libc::MADV_DONTNEED) } == 0;
        if !parted {
            // Rather than that something else is seen there, the memory is never used again.
            mem::forget(mem::take(&mut self.bytes));
        }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        self.part_with_pages();
    }
}

/// Whether the pipe is full or has no reader, or a signal came; such an error is no word about vmsplice(2) itself.
fn is_about_the_pipe(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, Interrupted, WouldBlock};
    [BrokenPipe, Interrupted, WouldBlock].contains(&error.kind())
}

#[allow(unsafe_code)]
fn page_size() -> Option<usize> {
    // SAFETY: sysconf(3) with a name that it knows.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()
}

#[allow(unsafe_code)]
fn lend(pipe: &impl AsRawFd, pages: &[u8]) -> io::Result<usize> {
    let pages = libc::iovec {
        iov_base: pages.as_ptr().cast_mut().cast(),
        iov_len: pages.len(),
    };
    // SAFETY: the one piece of memory is there for the call; the kernel keeps the pages by itself, and reads them only.
    let n = unsafe {
        libc::vmsplice(
            pipe.as_raw_fd(),
            &raw const pages,
            1,
            libc::SPLICE_F_NONBLOCK,
        )
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

#[allow(unsafe_code)]
fn copy(pipe: &impl AsRawFd, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: write(2) of bytes that are there.
    let n = unsafe { libc::write(pipe.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::File, io::Read, thread};

    /// Its pieces differ, so that one in another's place is noticed.
    fn body(size: usize) -> Vec<u8> {
        (0..size).map(|n| (n % 65_521) as u8).collect()
    }

    const SIZES: [usize; 9] = [
        0,
        1,
        PIPE_DEFAULT,
        PIPE_DEFAULT + 1,
        LARGE - 1,
        LARGE,
        LARGE + 1,
        LARGE + 4095,
        5 * LARGE + 12_345,
    ];

    #[tokio::test]
    async fn the_command_reads_what_was_fed() {
        for size in SIZES {
            // From any place in a page, as the allocator may have it: where one begins, and around that.
            for before in [0, 1, 2, 4080] {
                let page = page_size().unwrap();
                let bytes = body(size + page);
                let shift = bytes.as_ptr().addr().wrapping_neg().wrapping_sub(before) % page;
                let expected = bytes[shift..].to_vec();
                let mut body = Body::new(bytes);
                body.written = shift;
                let (mut reader, rest) = begin(body).unwrap();
                let read = thread::spawn(move || {
                    let mut read = Vec::new();
                    reader.read_to_end(&mut read).unwrap();
                    read
                });
                if let Some(rest) = rest {
                    spawn_feeder(rest).await.unwrap();
                }
                assert!(read.join().unwrap() == expected, "{size}, {before}");
            }
        }
    }

    #[tokio::test]
    async fn what_is_read_late_is_still_the_body() {
        let expected = body(2 * LARGE);
        let (mut reader, rest) = feed(expected.clone()).unwrap();
        let mut rest = rest.expect("more than the pipe takes");
        // The command has ended, and has left its pipe to a child; the memory is another's.
        rest.body.part_with_pages();
        rest.body.bytes.fill(0xff);
        drop(rest);
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        assert!(read.len() > LARGE / 2, "{}", read.len());
        assert!(read == expected[..read.len()], "another's memory");
    }

    #[test]
    fn where_pages_cannot_be_lent_they_are_copied() {
        let path = std::env::temp_dir().join(format!("qconsume-feed-{}", std::process::id()));
        // To no pipe nothing is lent (EBADF).
        let file = File::create(&path).unwrap();
        let expected = body(2 * LARGE + 77);
        let mut body = Body::new(expected.clone());
        while !body.is_written() {
            body.write(&file).unwrap();
        }
        assert!(body.page.is_none() && body.lent.is_empty());
        assert!(std::fs::read(&path).unwrap() == expected);
        std::fs::remove_file(path).unwrap();
    }

    #[tokio::test]
    async fn a_command_that_does_not_read_ends_the_feeding() {
        let (reader, rest) = feed(body(3 * LARGE)).unwrap();
        drop(reader);
        spawn_feeder(rest.expect("more than the pipe takes"))
            .await
            .unwrap();
    }
}
