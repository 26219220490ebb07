//! The proxy's tasks: accepting connections, and relaying one.

use super::frames::{self, Next};
use super::{Action, Control, Direction, Method, Seen, Shared};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

/// The most frames in transit in one direction; then the sender has to wait, as on a real connection.
const IN_FLIGHT: usize = 1024;

/// Accepts connections until the proxy is dropped.
pub(super) async fn accept(shared: Arc<Shared>, addr: SocketAddr, listener: TcpListener) {
    let mut control = shared.control.subscribe();
    let mut listener = Some(listener);
    loop {
        let (refuse, gone) = {
            let control = control.borrow_and_update();
            (control.refuse, control.gone)
        };
        if gone {
            return;
        }
        if refuse {
            listener = None;
            shared.change(|state| state.listening = false);
            let _ = control.changed().await;
            continue;
        }
        if listener.is_none() {
            listener = TcpListener::bind(addr).await.ok();
            if listener.is_none() {
                // Another program's outgoing connection uses the port for a moment.
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
            shared.change(|state| state.listening = true);
        }
        let Some(listening) = &listener else { continue };
        tokio::select! {
            accepted = listening.accept() => {
                if let Ok((client, _)) = accepted {
                    let cut = shared.control.borrow().cut;
                    let number = shared.change(|state| {
                        state.accepted += 1;
                        state.open.insert((cut, state.accepted));
                        state.accepted
                    });
                    tokio::spawn(connection(shared.clone(), cut, number, client));
                }
            }
            _ = control.changed() => {}
        }
    }
}

/// How the proxy ends a connection.
enum End {
    /// Both sides are reset.
    Reset,
    /// The receiver of this direction sees the connection closed, the sender sees it reset.
    After(Direction),
}

/// Any error means that a connection, or the proxy itself, is gone.
impl<E: std::error::Error> From<E> for End {
    fn from(_: E) -> Self {
        Self::Reset
    }
}

struct Connection {
    shared: Arc<Shared>,
    number: usize,
    /// Set by [`Action::Swallow`] or [`Action::Stall`], for each direction.
    swallow: [AtomicBool; 2],
    /// The client doesn't use unencrypted AMQP.
    foreign: AtomicBool,
}

/// What a direction's reader passes to its writer.
enum Item {
    Bytes { due: Instant, bytes: Vec<u8>, record: Option<usize> },
    Eof,
    Cut,
}

async fn connection(shared: Arc<Shared>, cut: u64, number: usize, mut client: TcpStream) {
    let connection =
        Connection { shared: shared.clone(), number, swallow: Default::default(), foreign: AtomicBool::new(false) };
    let mut control = shared.control.subscribe();
    let mut broker = None;
    let end = tokio::select! {
        end = connection.serve(&mut client, &mut broker) => end,
        _ = control.wait_for(|control| control.cut != cut) => Err(End::Reset),
    };
    let reset = |direction| match end {
        Ok(()) => false,
        Err(End::Reset) => true,
        Err(End::After(other)) => direction != other,
    };
    if let Some(broker) = broker
        && reset(Direction::ToBroker)
    {
        let _ = broker.set_zero_linger();
    }
    if reset(Direction::ToClient) {
        let _ = client.set_zero_linger();
    }
    drop(client);
    shared.change(|state| state.open.remove(&(cut, number)));
}

impl Connection {
    async fn serve(&self, client: &mut TcpStream, broker: &mut Option<TcpStream>) -> Result<(), End> {
        let mut control = self.shared.control.subscribe();
        let ready = |control: &Control| !control.stall && control.upstream.is_some();
        let upstream = control.wait_for(ready).await?.upstream;
        let upstream = upstream.ok_or(End::Reset)?;
        // A client's first bytes reach the proxy at once, as the kernel has accepted the connection; over a long line
        // they would take another round trip.
        let round_trip: Duration = control.borrow().delay.iter().sum();
        sleep_until(Instant::now() + round_trip).await;
        let connected = TcpStream::connect(upstream).await?;
        let broker = broker.insert(connected);
        let _ = client.set_nodelay(true);
        let _ = broker.set_nodelay(true);
        let (client_read, client_write) = client.split();
        let (broker_read, broker_write) = broker.split();
        let (to_broker, from_client) = mpsc::channel(IN_FLIGHT);
        let (to_client, from_broker) = mpsc::channel(IN_FLIGHT);
        let injected = to_client.clone();
        tokio::try_join!(
            self.read(Direction::ToBroker, client_read, to_broker, injected),
            self.read(Direction::ToClient, broker_read, to_client.clone(), to_client),
            self.write(Direction::ToBroker, broker_write, from_client),
            self.write(Direction::ToClient, client_write, from_broker),
        )?;
        Ok(())
    }

    /// Reads frames from one side, and applies the rules to them.
    async fn read(
        &self,
        direction: Direction,
        mut half: ReadHalf<'_>,
        out: mpsc::Sender<Item>,
        to_client: mpsc::Sender<Item>,
    ) -> Result<(), End> {
        let mut stream: Vec<u8> = Vec::with_capacity(64 * 1024);
        // A stream that doesn't begin with a protocol header isn't an AMQP client's, even if its first byte looks like
        // a frame.
        let mut greeted = direction == Direction::ToClient;
        loop {
            match half.read_buf(&mut stream).await {
                Ok(1..) => {}
                Ok(0) => {
                    let rest = std::mem::take(&mut stream);
                    if !rest.is_empty() {
                        self.send(direction, &out, rest, None).await?;
                    }
                    return out.send(Item::Eof).await.map_err(|_| End::Reset);
                }
                // If everything is dropped, then so is the reset.
                Err(_) if self.swallows(direction) => return Ok(()),
                Err(_) => return Err(End::Reset),
            }
            let mut start = 0;
            while start < stream.len() {
                let rest = &stream[start..];
                let next = if self.foreign.load(Relaxed) || !(greeted || frames::greets(rest)) {
                    Next::Foreign
                } else {
                    frames::next(rest)
                };
                match next {
                    Next::Incomplete => break,
                    Next::Foreign => {
                        self.foreign.store(true, Relaxed);
                        self.send(direction, &out, rest.to_vec(), None).await?;
                        start = stream.len();
                    }
                    Next::Frame { length, method } => {
                        greeted = true;
                        let frame = &rest[..length];
                        self.pass(direction, method, frame, &out, &to_client).await?;
                        start += length;
                    }
                }
            }
            stream.drain(..start);
        }
    }

    /// Records a frame, and applies the first rule that matches it.
    async fn pass(
        &self,
        direction: Direction,
        method: Method,
        frame: &[u8],
        out: &mpsc::Sender<Item>,
        to_client: &mpsc::Sender<Item>,
    ) -> Result<(), End> {
        let (record, action) = self.shared.change(|state| {
            state.seen.push(Seen { connection: self.number, direction, method, at: Instant::now(), settled: false });
            let record = Some(state.seen.len() - 1);
            let fits = |rule: &super::Rule| rule.direction == direction && rule.method == method;
            let Some(index) = state.rules.iter().position(fits) else {
                return (record, Action::Pass);
            };
            let action = state.rules[index].action.clone();
            if state.rules[index].once {
                state.rules.remove(index);
            }
            (record, action)
        });
        let frame = frame.to_vec();
        match action {
            Action::Pass => return self.send(direction, out, frame, record).await,
            Action::CutBefore => {
                self.settle(record);
                return Err(End::Reset);
            }
            Action::CutAfter => {
                self.send(direction, out, frame, record).await?;
                out.send(Item::Cut).await?;
                // The writer will end the connection.
                std::future::pending().await
            }
            Action::Swallow => self.swallow[direction.index()].store(true, Relaxed),
            Action::SwallowFrame => {}
            Action::Stall => self.swallow.iter().for_each(|all| all.store(true, Relaxed)),
            Action::Hold => {
                let mut control = self.shared.control.subscribe();
                let release = control.borrow().release;
                self.settle(record);
                let _ = control.wait_for(|control| control.release != release).await;
                return self.send(direction, out, frame, record).await;
            }
            Action::Inject(bytes) => {
                self.send(direction, out, frame, record).await?;
                return self.send(Direction::ToClient, to_client, bytes, None).await;
            }
            Action::InjectInstead(bytes) => {
                let client = Direction::ToClient;
                self.send(client, to_client, bytes, None).await?;
            }
            Action::Replace(with) => {
                return self.send(direction, out, with(&frame), record).await;
            }
        }
        self.settle(record);
        Ok(())
    }

    async fn send(
        &self,
        direction: Direction,
        out: &mpsc::Sender<Item>,
        bytes: Vec<u8>,
        record: Option<usize>,
    ) -> Result<(), End> {
        let delay = self.shared.control.borrow().delay[direction.index()];
        let item = Item::Bytes { due: Instant::now() + delay, bytes, record };
        out.send(item).await.map_err(|_| End::Reset)
    }

    /// Writes frames to one side when they are due.
    async fn write(
        &self,
        direction: Direction,
        mut half: WriteHalf<'_>,
        mut items: mpsc::Receiver<Item>,
    ) -> Result<(), End> {
        let mut control = self.shared.control.subscribe();
        while let Some(item) = items.recv().await {
            if let Item::Bytes { due, .. } = &item {
                sleep_until(*due).await;
            }
            drop(control.wait_for(|control| !control.stall).await?);
            let swallowed = self.swallows(direction);
            match item {
                Item::Bytes { bytes, record, .. } => {
                    if !swallowed {
                        half.write_all(&bytes).await?;
                    }
                    self.settle(record);
                }
                Item::Eof | Item::Cut if swallowed => {}
                Item::Eof => {
                    let _ = half.shutdown().await;
                    return Ok(());
                }
                Item::Cut => return Err(End::After(direction)),
            }
        }
        Ok(())
    }

    fn swallows(&self, direction: Direction) -> bool {
        let index = direction.index();
        self.swallow[index].load(Relaxed) || self.shared.control.borrow().swallow[index]
    }

    fn settle(&self, record: Option<usize>) {
        self.shared.change(|state| {
            if let Some(record) = record {
                state.seen[record].settled = true;
            }
        });
    }
}

/// Sleeps on a thread, which is late by a tenth of a millisecond at most; tokio's timer rounds up to whole
/// milliseconds.
async fn sleep_until(due: Instant) {
    let left = due.saturating_duration_since(Instant::now());
    if !left.is_zero() {
        let slept = spawn_blocking(move || std::thread::sleep(left)).await;
        slept.expect("a sleep doesn't panic");
    }
}
