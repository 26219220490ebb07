//! The command's standard input.

use crate::exit::{Exit, Failure, is_shortage};
use anyhow::anyhow;
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

/// In bytes: the default of fs.pipe-max-size.
const PIPE_MAX: usize = 1 << 20;

/// In bytes. Memory is freed chunk by chunk, so the body is never in memory twice.
const CHUNK: usize = 1 << 20;

/// A pipe with the whole body in it, or a file if the body is too large for a pipe. Fails with 71, whatever the system
/// refuses: the command is not to blame.
///
/// Nothing is written while the command runs: if qconsume were killed then, the command would see the pipe's end before
/// the parent-death signal (in 10 of 300 runs on a busy machine), and take a part of the body for all of it.
pub fn stdin_with(body: Vec<u8>) -> Result<OwnedFd, Failure> {
    let what =
        format!("the command can't be started: its message of {} bytes can't be put on its standard input", body.len());
    store(body).map_err(|error| match error.downcast::<io::Error>() {
        Ok(error) => Failure { exit: Exit::OsError, ..Failure::system(what, &error) },
        Err(error) => Failure::new(Exit::OsError, format!("{what}: {error}")),
    })
}

fn store(body: Vec<u8>) -> anyhow::Result<OwnedFd> {
    if body.len() <= PIPE_MAX
        && let Some(pipe) = pipe(&body)?
    {
        return Ok(pipe.into());
    }
    let file = match file_in_memory() {
        // A seccomp profile may refuse memfd_create(2).
        Err(error) if !is_shortage(&error) => temporary_file(&error)?,
        created => created?,
    };
    fill(&file, body)?;
    Ok(file.into())
}

fn pipe(body: &[u8]) -> io::Result<Option<PipeReader>> {
    let (reader, mut writer) = io::pipe()?;
    let size = libc::c_int::try_from(body.len()).unwrap_or(libc::c_int::MAX);
    if size > fcntl(&writer, FcntlArg::F_GETPIPE_SZ)? {
        // The system may refuse this: if the user's pipes exceed fs.pipe-user-pages-soft, a new one has two pages.
        let _ = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(size));
    }
    // A write without enough room must return instead of waiting for a reader.
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((writer.write(body)? == body.len()).then_some(reader))
}

fn file_in_memory() -> io::Result<File> {
    // vm.memfd_noexec=2 forbids files that could be executed. Linux before 6.3 doesn't know this flag.
    let sealed = MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL) | MFdFlags::MFD_CLOEXEC;
    let file = match memfd_create(c"message", sealed) {
        Err(Errno::EINVAL) => memfd_create(c"message", MFdFlags::MFD_CLOEXEC),
        created => created,
    }?;
    Ok(file.into())
}

fn temporary_file(refusal: &io::Error) -> anyhow::Result<File> {
    let folder = std::env::temp_dir();
    let file = tempfile::tempfile_in(&folder).map_err(|error| {
        let folder = folder.display();
        anyhow!(
            "memfd_create: {refusal}; a temporary file in {folder}: {error}; set TMPDIR to a folder that can be written to"
        )
    })?;
    tracing::debug!("memfd_create is refused ({refusal}): using a deleted temporary file for the message");
    Ok(file)
}

fn fill(file: &File, mut body: Vec<u8>) -> io::Result<()> {
    while !body.is_empty() {
        // The last chunk first: a vector shrinks at its end. The file's offset stays 0, for the command.
        let start = body.len().saturating_sub(CHUNK);
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
            let body: Vec<u8> = (0..size).map(|n| (n % 65_521) as u8).collect();
            let mut input = File::from(stdin_with(body.clone()).unwrap());
            let mut read = Vec::new();
            input.read_to_end(&mut read).unwrap();
            assert!(read == body, "{size}");
        }
    }
}
