//! The command's standard input.

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    libc,
    sys::memfd::{MFdFlags, memfd_create},
};
use std::{
    fs::File,
    io::{self, Write},
    os::{fd::OwnedFd, unix::fs::FileExt},
};

/// How much of a large body is copied before that is given back, in bytes: it is never in memory twice.
const PIECE: usize = 1 << 20;

/// A standard input that holds all of the body: a pipe where that has room for it (64 KiB as a rule), otherwise a file in
/// memory.
///
/// Nothing is written once the command runs. When qconsume is killed, the kernel closes its end of a pipe before it sends the
/// command its death signal: the command would take what it has got until then for the whole body (seen in 10 of 300 runs
/// on a busy machine).
pub(super) fn holding(body: Vec<u8>) -> io::Result<OwnedFd> {
    let (reader, mut writer) = io::pipe()?;
    let room = fcntl(&writer, FcntlArg::F_GETPIPE_SZ)?;
    if body.len() > usize::try_from(room).unwrap_or(0) {
        return in_memory(body).map(OwnedFd::from);
    }
    writer.write_all(&body)?;
    Ok(reader.into())
}

fn in_memory(mut body: Vec<u8>) -> io::Result<File> {
    // Administrators may forbid files that could be executed (vm.memfd_noexec); Linux knows the flag since 6.3.
    let sealed = MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL) | MFdFlags::MFD_CLOEXEC;
    let file = match memfd_create(c"message", sealed) {
        Err(Errno::EINVAL) => memfd_create(c"message", MFdFlags::MFD_CLOEXEC),
        created => created,
    }?;
    let file = File::from(file);
    while !body.is_empty() {
        // The last piece first, as a vector gives back its end; and the command begins to read where nobody has written yet.
        let start = body.len().saturating_sub(PIECE);
        file.write_all_at(&body[start..], start as u64)?;
        body.truncate(start);
        body.shrink_to_fit();
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn all_of_the_body_is_there_before_anybody_reads() {
        for size in [0, 1, 65_536, 65_537, PIECE, 5_000_000] {
            // Its pieces differ, so that one in another's place is noticed.
            let body: Vec<u8> = (0..size).map(|n| (n % 65_521) as u8).collect();
            let mut input = File::from(holding(body.clone()).unwrap());
            let mut read = Vec::new();
            input.read_to_end(&mut read).unwrap();
            assert!(read == body, "{size}");
        }
    }
}
