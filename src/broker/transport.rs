//! What lapin reads and writes through: a socket that we have dialled ourselves, plain or TLS, with a read-only tap.
//!
//! lapin's own dialling knows no time limit, no IPv6 literals and, without its TLS features, no error for `amqps`.

use super::tap::Tap;
use async_rs::{
    Tokio,
    traits::{Executor, Reactor, RuntimeKit},
    util::Task,
};
use futures_io::{AsyncRead, AsyncWrite};
use std::{
    future::{Future, ready},
    io::{self, IoSlice, Read, Write},
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};
use tokio::{io::ReadBuf, net::TcpStream};
use tokio_rustls::client::TlsStream;

/// A connected socket.
pub(super) enum Socket {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

trait Duplex: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}
impl Duplex for TcpStream {}
impl Duplex for TlsStream<TcpStream> {}

/// A socket for lapin, and the tap that looks at what is read from it.
pub(super) struct TappedStream {
    socket: Socket,
    tap: Tap,
}

impl TappedStream {
    pub(super) fn new(socket: Socket, tap: Tap) -> Self {
        Self { socket, tap }
    }

    fn socket(&mut self) -> Pin<&mut dyn Duplex> {
        match &mut self.socket {
            Socket::Plain(socket) => Pin::new(socket),
            Socket::Tls(socket) => Pin::new(socket.as_mut()),
        }
    }

    /// Why the peer has closed: a broker that refuses the client's certificate sends a TLS alert and closes, and our
    /// next write fails before anybody has read the alert.
    fn alert_or(&mut self, cx: &mut Context<'_>, error: io::Error) -> io::Error {
        let mut rest = [0; 256];
        match self.socket().poll_read(cx, &mut ReadBuf::new(&mut rest)) {
            Poll::Ready(Err(alert)) if alert.get_ref().is_some() => alert,
            _ => error,
        }
    }
}

impl AsyncRead for TappedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let mut read = ReadBuf::new(buffer);
        ready!(self.socket().poll_read(cx, &mut read))?;
        self.tap.observe(read.filled())?;
        Poll::Ready(Ok(read.filled().len()))
    }
}

impl AsyncWrite for TappedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = self.socket().poll_write(cx, bytes);
        written.map_err(|error| self.alert_or(cx, error))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = self.socket().poll_write_vectored(cx, pieces);
        written.map_err(|error| self.alert_or(cx, error))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = self.socket().poll_flush(cx);
        flushed.map_err(|error| self.alert_or(cx, error))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket().poll_shutdown(cx)
    }
}

/// tokio's executor and clock for lapin, with our [`TappedStream`] in place of its TCP stream.
#[derive(Clone, Debug)]
pub(super) struct LapinRuntime(Tokio);

impl LapinRuntime {
    /// On the runtime that the caller runs on.
    pub(super) fn current() -> Self {
        Self(Tokio::current())
    }
}

impl RuntimeKit for LapinRuntime {}

impl Executor for LapinRuntime {
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

impl Reactor for LapinRuntime {
    type TcpStream = TappedStream;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: Read + Write + Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        // lapin asks for this only when it dials by itself.
        Err::<TappedStream, _>(io::ErrorKind::Unsupported.into())
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(
        &self,
        duration: Duration,
    ) -> impl tokio_stream::Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        _: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        // Dialling is connect.rs's business; lapin gets streams that are connected.
        ready(Err(io::ErrorKind::Unsupported.into()))
    }
}
