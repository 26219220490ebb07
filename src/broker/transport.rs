//! The bytes under lapin: a stream that we dialled ourselves, plain or TLS.
//!
//! lapin's own dialling knows no time limit, no IPv6 literals and, without its TLS features, no error for `amqps`.

use super::{incoming::Incoming, outgoing::Outgoing};
use async_rs::{
    Tokio,
    traits::{Executor, Reactor, RuntimeKit},
    util::Task,
};
use futures_io::{AsyncRead, AsyncWrite};
use std::{
    future::{Future, ready},
    io::{self, Read, Write},
    mem,
    net::SocketAddr,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncRead as _, AsyncReadExt, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::client::TlsStream;
use tokio_stream::Stream as TokioStream;

enum Socket {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Socket {
    fn read_half(&mut self) -> Pin<&mut (dyn tokio::io::AsyncRead + Send + Unpin)> {
        match self {
            Socket::Plain(socket) => Pin::new(socket),
            Socket::Tls(socket) => Pin::new(socket.as_mut()),
        }
    }

    fn write_half(&mut self) -> Pin<&mut (dyn tokio::io::AsyncWrite + Send + Unpin)> {
        match self {
            Socket::Plain(socket) => Pin::new(socket),
            Socket::Tls(socket) => Pin::new(socket.as_mut()),
        }
    }
}

/// How much is read at once that is no body, in bytes.
const PIECE: usize = 4096;

/// A connected stream, for lapin.
pub(super) struct Stream {
    socket: Socket,
    incoming: Incoming,
    outgoing: Outgoing,
    /// lapin has read something and asks for more, so it hasn't looked at it yet.
    unread: bool,
    /// What reading has failed with, until lapin has looked at what came before.
    failed: Option<io::Error>,
}

impl Stream {
    pub(super) fn plain(socket: TcpStream, incoming: Incoming) -> Self {
        Self::new(Socket::Plain(socket), incoming)
    }

    pub(super) fn tls(socket: TlsStream<TcpStream>, incoming: Incoming) -> Self {
        Self::new(Socket::Tls(Box::new(socket)), incoming)
    }

    fn new(socket: Socket, incoming: Incoming) -> Self {
        Self {
            socket,
            incoming,
            outgoing: Outgoing::new(),
            unread: false,
            failed: None,
        }
    }

    /// Reads once from the socket, and returns how many bytes.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut read = self.socket.read_half();
        let n = if let Some(mut body) = self.incoming.in_place() {
            let n = ready!(pin!(read.read_buf(&mut body)).poll(cx))?;
            self.incoming.read_in_place(n);
            n
        } else {
            let mut piece = [0; PIECE];
            let n = ready!(pin!(read.read(&mut piece)).poll(cx))?;
            self.incoming.received(&piece[..n]);
            n
        };
        Poll::Ready(Ok(n))
    }

    /// Takes what lapin writes before it has a channel, and sends it as far as the socket takes it.
    fn poll_opening(
        &mut self,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_waiting(cx))?;
        let mut n = 0;
        for piece in pieces {
            if self.outgoing.take(piece) {
                self.incoming.unshut();
            }
            n += piece.len();
        }
        // What doesn't go out now does when lapin flushes.
        match self.poll_waiting(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(n)),
        }
    }

    fn poll_waiting(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.outgoing.waiting().is_empty() {
            let waiting = self.outgoing.waiting();
            let n = ready!(self.socket.write_half().poll_write(cx, waiting))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.outgoing.sent(n);
        }
        Poll::Ready(Ok(()))
    }

    /// Why the peer has closed, where it has said so: a broker that refuses the client's certificate sends an alert
    /// and closes, and our next write fails before anybody has read the alert.
    fn last_words(&mut self, cx: &mut Context<'_>, error: io::Error) -> io::Error {
        let Socket::Tls(socket) = &mut self.socket else {
            return error;
        };
        let mut rest = [0; 256];
        match Pin::new(socket.as_mut()).poll_read(cx, &mut ReadBuf::new(&mut rest)) {
            Poll::Ready(Err(alert)) if alert.get_ref().is_some() => alert,
            _ => error,
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if let Some(error) = self.failed.take() {
            return Poll::Ready(Err(error));
        }
        loop {
            let n = self.incoming.pass(buffer);
            if n > 0 {
                self.unread = true;
                return Poll::Ready(Ok(n));
            }
            let more = if self.incoming.is_shut(cx) {
                Poll::Pending
            } else {
                self.poll_more(cx)
            };
            match more {
                Poll::Ready(Ok(0)) => return Poll::Ready(Ok(0)),
                Poll::Ready(Ok(_)) => {}
                // lapin would drop what it has read and not looked at, which may be why the connection has ended.
                Poll::Ready(Err(error)) if mem::take(&mut self.unread) => {
                    self.failed = Some(error);
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    self.unread = false;
                    return Poll::Pending;
                }
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = if self.outgoing.is_done() {
            self.socket.write_half().poll_write(cx, bytes)
        } else {
            self.poll_opening(cx, &[io::IoSlice::new(bytes)])
        };
        written.map_err(|error| self.last_words(cx, error))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = if self.outgoing.is_done() {
            self.socket.write_half().poll_write_vectored(cx, pieces)
        } else {
            self.poll_opening(cx, pieces)
        };
        written.map_err(|error| self.last_words(cx, error))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = match self.poll_waiting(cx) {
            Poll::Ready(Ok(())) => self.socket.write_half().poll_flush(cx),
            unsent => unsent,
        };
        flushed.map_err(|error| self.last_words(cx, error))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.write_half().poll_shutdown(cx)
    }
}

/// tokio's executor and clock for lapin, with our [`Stream`] in place of its TCP stream.
#[derive(Clone, Debug)]
pub(super) struct Kit(Tokio);

impl Kit {
    /// On the runtime that the caller runs on.
    pub(super) fn current() -> Self {
        Self(Tokio::current())
    }
}

impl RuntimeKit for Kit {}

impl Executor for Kit {
    type Task<T: Send + 'static> = <Tokio as Executor>::Task<T>;

    fn block_on<T, F: Future<Output = T>>(&self, future: F) -> T {
        self.0.block_on(future)
    }

    fn spawn<T: Send + 'static, F: Future<Output = T> + Send + 'static>(
        &self,
        future: F,
    ) -> Task<Self::Task<T>> {
        self.0.spawn(future)
    }

    fn spawn_blocking<T: Send + 'static, F: FnOnce() -> T + Send + 'static>(
        &self,
        work: F,
    ) -> Task<Self::Task<T>> {
        self.0.spawn_blocking(work)
    }
}

impl Reactor for Kit {
    type TcpStream = Stream;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: Read + Write + Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        // lapin asks for this only when it dials by itself.
        Err::<Stream, _>(io::ErrorKind::Unsupported.into())
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl TokioStream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        _: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        // Dialling is broker::connect's business; lapin gets streams that are connected.
        ready(Err(io::ErrorKind::Unsupported.into()))
    }
}

#[cfg(test)]
mod tests;
