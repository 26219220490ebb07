//! The stream that lapin reads and writes: our own socket, plain or TLS, with a read-only tap. lapin 4.12 itself would
//! connect without a time limit, take no IPv6 literals and, without its TLS features, send plain text to `amqps`.

use super::tap::Tap;
use async_rs::{Runtime, Tokio, traits::Reactor, util::RuntimeParts};
use futures_io::{AsyncRead, AsyncWrite};
use std::{
    future::{Future, ready},
    io::{self, Read, Write},
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};
use tokio::io::ReadBuf;
use tokio_stream::Stream;

pub(super) trait Socket: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}
impl<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> Socket for S {}

pub(super) struct TappedStream {
    pub(super) socket: Box<dyn Socket>,
    pub(super) tap: Tap,
}

impl TappedStream {
    fn socket(&mut self) -> Pin<&mut dyn Socket> {
        Pin::new(self.socket.as_mut())
    }

    /// A broker that refuses our certificate sends a TLS alert and closes: our next write fails before that is read.
    fn alert_or(&mut self, cx: &mut Context<'_>, error: io::Error) -> io::Error {
        let mut rest = [0; 256];
        match self.socket().poll_read(cx, &mut ReadBuf::new(&mut rest)) {
            // An error of rustls, not of the system.
            Poll::Ready(Err(alert)) if alert.get_ref().is_some() => alert,
            _ => error,
        }
    }
}

impl AsyncRead for TappedStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut read = ReadBuf::new(buffer);
        ready!(self.socket().poll_read(cx, &mut read))?;
        self.tap.observe(read.filled())?;
        Poll::Ready(Ok(read.filled().len()))
    }
}

impl AsyncWrite for TappedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = self.socket().poll_write(cx, bytes);
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

/// tokio's clock for lapin, with [`TappedStream`] as its TCP stream. It can't connect: connect.rs does that.
#[derive(Clone, Debug)]
pub(super) struct LapinReactor(Tokio);

pub(super) fn lapin_runtime() -> Runtime<RuntimeParts<Tokio, LapinReactor>> {
    let tokio = Tokio::current();
    Runtime::new(RuntimeParts::new(tokio.clone(), LapinReactor(tokio)))
}

impl Reactor for LapinReactor {
    type TcpStream = TappedStream;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: Read + Write + Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<TappedStream, _>(io::ErrorKind::Unsupported.into())
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(&self, _: SocketAddr) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        ready(Err(io::ErrorKind::Unsupported.into()))
    }
}
