//! The body, on its way to the command's standard input.

use std::{
    io::{self, PipeReader},
    os::fd::OwnedFd,
};
use tokio::{io::AsyncWriteExt, net::unix::pipe, task::JoinHandle};

/// The reading end for the command, and the task that writes the body and then closes the pipe.
pub(super) fn feed(body: Vec<u8>) -> io::Result<(PipeReader, JoinHandle<()>)> {
    let (reader, writer) = io::pipe()?;
    let mut writer = pipe::Sender::from_owned_fd(OwnedFd::from(writer))?;
    let feeder = tokio::spawn(async move {
        // A command that doesn't read to the end (EPIPE) knows what it does.
        let _ = writer.write_all(&body).await;
    });
    Ok((reader, feeder))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Read, thread};

    #[tokio::test]
    async fn the_command_reads_what_was_fed() {
        for size in [0, 1, 65_536, 65_537, 5_000_000] {
            // Its pieces differ, so that one in another's place is noticed.
            let body: Vec<u8> = (0..size).map(|n| (n % 65_521) as u8).collect();
            let (mut reader, feeder) = feed(body.clone()).unwrap();
            let read = thread::spawn(move || {
                let mut read = Vec::new();
                reader.read_to_end(&mut read).unwrap();
                read
            });
            feeder.await.unwrap();
            assert!(read.join().unwrap() == body, "{size}");
        }
    }

    #[tokio::test]
    async fn a_command_that_does_not_read_ends_the_feeding() {
        let (reader, feeder) = feed(vec![b'x'; 3_000_000]).unwrap();
        drop(reader);
        feeder.await.unwrap();
    }
}
