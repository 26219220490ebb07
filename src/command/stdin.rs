//! The command's standard input.

use crate::exit::{Exit, Failure, is_shortage};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    libc,
    sys::memfd::{MFdFlags, memfd_create},
};
use std::{
    fs::File,
    io::{self, PipeReader, Write},
    os::{fd::OwnedFd, unix::fs::FileExt},
};

/// The largest body that is passed in a pipe, in bytes: the largest pipe that any user may have, unless
/// /proc/sys/fs/pipe-max-size says otherwise.
const PIPE_MAX: usize = 1 << 20;

/// How much of a large body is copied into the file before its memory is freed, in bytes: the body is never in memory twice.
const PIECE: usize = 1 << 20;

/// A standard input that holds all of the body: a pipe, or a file if the body is larger than a pipe can be.
///
/// Nothing is written once the command runs. When qconsume is killed, the kernel closes its end of a pipe before it sends
/// the death signal to the command: the command would take the part that had arrived for the whole body (seen in 10 of
/// 300 runs on a busy machine).
///
/// # Errors
/// 71, whatever the system refuses: the command is not to blame.
pub fn holding(body: Vec<u8>) -> Result<OwnedFd, Failure> {
    let size = body.len();
    let hold = || -> io::Result<OwnedFd> {
        if size <= PIPE_MAX
            && let Some(pipe) = pipe(&body)?
        {
            return Ok(pipe.into());
        }
        let file = match file_in_memory() {
            Err(error) if !is_shortage(&error) => temporary_file(&error)?,
            created => created?,
        };
        fill(&file, body)?;
        Ok(file.into())
    };
    hold().map_err(|error| {
        let what = format!("the command can't be started: no standard input for the {size} bytes of its message");
        Failure { exit: Exit::OsError, ..Failure::system(what, &error) }
    })
}

/// A pipe that holds all of the body; `None` if the system doesn't give it so much room.
fn pipe(body: &[u8]) -> io::Result<Option<PipeReader>> {
    let (reader, mut writer) = io::pipe()?;
    let size = libc::c_int::try_from(body.len()).unwrap_or(libc::c_int::MAX);
    if size > fcntl(&writer, FcntlArg::F_GETPIPE_SZ)? {
        // It is refused if the user's pipes have more than fs.pipe-user-pages-soft in all; a new pipe has two pages then.
        let _ = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(size));
    }
    // The write tells whether there is room, instead of waiting for a reader that isn't there yet.
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((writer.write(body)? == body.len()).then_some(reader))
}

fn file_in_memory() -> io::Result<File> {
    // Administrators may forbid files that could be executed (vm.memfd_noexec); Linux knows the flag since 6.3.
    let sealed = MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL) | MFdFlags::MFD_CLOEXEC;
    let file = match memfd_create(c"message", sealed) {
        Err(Errno::EINVAL) => memfd_create(c"message", MFdFlags::MFD_CLOEXEC),
        created => created,
    }?;
    Ok(file.into())
}

/// A temporary file that is deleted already, for a system that refuses files in memory: a seccomp profile may.
fn temporary_file(refusal: &io::Error) -> io::Result<File> {
    let folder = std::env::temp_dir();
    let file = tempfile::tempfile_in(&folder).map_err(|error| {
        let folder = folder.display();
        let text = format!("memfd_create: {refusal}; a temporary file in {folder}: {error}");
        io::Error::other(format!("{text}; set TMPDIR to a folder that can be written to"))
    })?;
    tracing::debug!(
        "memfd_create is refused ({refusal}): the message is in a temporary file, which is deleted already"
    );
    Ok(file)
}

fn fill(file: &File, mut body: Vec<u8>) -> io::Result<()> {
    while !body.is_empty() {
        // The last piece first, as a vector gives back its end; and the command begins to read where nobody has written yet.
        let start = body.len().saturating_sub(PIECE);
        file.write_all_at(&body[start..], start as u64)?;
        body.truncate(start);
        body.shrink_to_fit();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn all_of_the_body_is_there_before_anybody_reads() {
        for size in [0, 1, 65_536, 65_537, PIPE_MAX, PIPE_MAX + 1, 5_000_000] {
            // Its pieces differ, so that one in another's place is noticed.
            let body: Vec<u8> = (0..size).map(|n| (n % 65_521) as u8).collect();
            let mut input = File::from(holding(body.clone()).unwrap());
            let mut read = Vec::new();
            input.read_to_end(&mut read).unwrap();
            assert!(read == body, "{size}");
        }
    }
}
