//! A TCP proxy between a worker and its broker that can cause faults.
//!
//! It parses the AMQP 0-9-1 frames in both directions, so that a fault can happen exactly before or after a given
//! method. Other protocols (TLS) pass unchanged, and only faults that need no frames apply to them.

pub mod frames;
mod relay;

pub use frames::Method;

use crate::broker::Broker;
use crate::ports::{self, Port};
use crate::{PATIENCE, runtime};
use anyhow::Result;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::watch;

/// A frame's direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the worker to the broker.
    ToBroker,
    /// From the broker to the worker.
    ToClient,
}

impl Direction {
    fn index(self) -> usize {
        self as usize
    }
}

/// What the proxy does with a frame.
#[derive(Clone)]
pub enum Action {
    /// Pass it on.
    Pass,
    /// Reset both sides; the frame doesn't arrive.
    CutBefore,
    /// Pass it on; then close the receiver's connection and reset the sender's.
    CutAfter,
    /// Drop it and everything after it in this direction; the other direction goes on.
    Swallow,
    /// Drop only this frame.
    SwallowFrame,
    /// From this frame on, drop everything in both directions; the connections stay open.
    Stall,
    /// Keep it, and everything after it in this direction, until [`Proxy::release`].
    Hold,
    /// Pass it on, and send these bytes (whole frames, see [`frames`]) to the worker.
    Inject(Vec<u8>),
    /// Drop it, and send these bytes to the worker.
    InjectInstead(Vec<u8>),
    /// Replace it by another frame, for example an ack with a wrong delivery tag, which the broker answers with a 406.
    Replace(Rewrite),
}

/// Makes a replacement for a frame.
pub type Rewrite = Arc<dyn Fn(&[u8]) -> Vec<u8> + Send + Sync>;

/// A frame that the proxy has received.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The connection's number, from 1, in the order of acceptance.
    pub connection: usize,
    /// The direction.
    pub direction: Direction,
    /// The method, or the constant for another type of frame, for example [`Method::BODY`].
    pub method: Method,
    /// When it arrived.
    pub at: Instant,
    /// Whether the action is done: it was passed on or dropped, or is held.
    settled: bool,
}

/// A proxy on a reserved port; dropping it ends it and its connections.
pub struct Proxy {
    shared: Arc<Shared>,
    addr: SocketAddr,
    url: String,
    _port: Port,
}

/// Shared by the proxy's tasks and its owner.
struct Shared {
    state: watch::Sender<State>,
    control: watch::Sender<Control>,
}

/// Settings that apply to every connection at once.
#[derive(Clone, Default)]
struct Control {
    /// `None`: a silent proxy, which connects to nothing.
    upstream: Option<SocketAddr>,
    swallow: [bool; 2],
    stall: bool,
    delay: [Duration; 2],
    refuse: bool,
    /// Counts the cuts; a connection ends when this changes.
    cut: u64,
    /// Counts the releases.
    release: u64,
    /// The proxy was dropped.
    gone: bool,
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    seen: Vec<Seen>,
    accepted: usize,
    /// The open connections: the [`Control::cut`] at their acceptance, and their number.
    open: BTreeSet<(u64, usize)>,
    listening: bool,
}

struct Rule {
    direction: Direction,
    method: Method,
    action: Action,
    once: bool,
}

impl Proxy {
    /// A proxy to a broker.
    pub fn of(broker: &Broker) -> Self {
        let mut proxy = Self::to(broker.addr());
        proxy.url = broker.url_at(proxy.addr);
        proxy
    }

    /// A proxy to any address.
    pub fn to(upstream: SocketAddr) -> Self {
        Self::local(Some(upstream))
    }

    /// A proxy to nothing: it accepts connections and stays silent.
    pub fn silent() -> Self {
        Self::local(None)
    }

    fn local(upstream: Option<SocketAddr>) -> Self {
        let proxy = Self::listen(Ipv4Addr::LOCALHOST.into(), upstream);
        proxy.unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// A proxy that listens on another address than 127.0.0.1, for example in a network namespace.
    pub fn listen(ip: IpAddr, upstream: Option<SocketAddr>) -> Result<Self> {
        // A reserved port instead of port 0, because it is needed again after `refuse`.
        let (port, listener) = ports::listen(ip)?;
        listener.set_nonblocking(true)?;
        let listener = runtime::block_on(async { TcpListener::from_std(listener) })?;
        let addr = SocketAddr::new(ip, port.number());
        let shared = Arc::new(Shared {
            state: watch::Sender::new(State { listening: true, ..State::default() }),
            control: watch::Sender::new(Control { upstream, ..Control::default() }),
        });
        runtime::handle().spawn(relay::accept(shared.clone(), addr, listener));
        Ok(Self { shared, addr, url: format!("amqp://guest:guest@{addr}"), _port: port })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The broker's URL with the proxy's host and port.
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// Ends every fault: accepts connections and passes everything at once. Dropped data stays lost.
    #[track_caller]
    pub fn pass(&self) {
        self.control(|control| {
            control.swallow = [false; 2];
            control.stall = false;
            control.delay = [Duration::ZERO; 2];
            control.refuse = false;
            control.release += 1;
        });
        self.must(|| "the proxy doesn't listen".into(), |state| state.listening);
    }

    /// Resets both sides of every connection that exists now.
    #[track_caller]
    pub fn cut(&self) {
        let mut cut = 0;
        self.control(|control| {
            control.cut += 1;
            cut = control.cut;
        });
        let cut = |state: &State| state.open.iter().all(|(accepted, _)| *accepted >= cut);
        self.must(|| "a connection isn't cut".into(), cut);
    }

    /// Drops everything in one direction, like a firewall that has forgotten the connection.
    pub fn swallow(&self, direction: Direction) {
        self.control(|control| control.swallow[direction.index()] = true);
    }

    /// Keeps everything in both directions until [`Proxy::pass`]. New connections are accepted, but get no answer.
    pub fn stall(&self) {
        self.control(|control| control.stall = true);
    }

    /// Delays everything in one direction by this time. It delays data in transit independently, like a long line. A
    /// new connection's handshake takes a round trip, too.
    pub fn delay(&self, direction: Direction, delay: Duration) {
        self.control(|control| control.delay[direction.index()] = delay);
    }

    /// Stops listening until [`Proxy::pass`], so that new connections are refused; existing ones stay.
    #[track_caller]
    pub fn refuse(&self) {
        self.control(|control| control.refuse = true);
        self.must(|| "the proxy still listens".into(), |state| !state.listening);
    }

    /// Passes on what [`Action::Hold`] keeps.
    pub fn release(&self) {
        self.control(|control| control.release += 1);
    }

    /// Does this for every frame with this method in this direction.
    pub fn on(&self, direction: Direction, method: Method, action: Action) {
        self.rule(direction, method, action, false);
    }

    /// Does this for the next frame with this method in this direction.
    pub fn once(&self, direction: Direction, method: Method, action: Action) {
        self.rule(direction, method, action, true);
    }

    fn rule(&self, direction: Direction, method: Method, action: Action, once: bool) {
        let rule = Rule { direction, method, action, once };
        self.shared.change(|state| state.rules.push(rule));
    }

    /// Removes the rules of [`Proxy::on`] and [`Proxy::once`].
    pub fn clear_rules(&self) {
        self.shared.change(|state| state.rules.clear());
    }

    /// The frames so far, in order of arrival.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.state.borrow().seen.clone()
    }

    /// The methods that the worker has sent, in order; without other frames, such as bodies and heartbeats.
    pub fn sent(&self) -> Vec<Method> {
        let state = self.shared.state.borrow();
        let sent = state.seen.iter().filter(|seen| seen.direction == Direction::ToBroker && seen.method.is_method());
        sent.map(|seen| seen.method).collect()
    }

    /// The number of frames with this method in this direction.
    pub fn count(&self, direction: Direction, method: Method) -> usize {
        count(&self.shared.state.borrow(), direction, method, |_| true)
    }

    /// The number of accepted connections.
    pub fn accepted(&self) -> usize {
        self.shared.state.borrow().accepted
    }

    /// The number of open connections.
    pub fn open(&self) -> usize {
        self.shared.state.borrow().open.len()
    }

    /// Waits for a frame with this method in this direction, until the action for it is done.
    #[track_caller]
    pub fn wait_for(&self, direction: Direction, method: Method) {
        self.wait_for_nth(direction, method, 1);
    }

    /// The same for the `n`th frame.
    #[track_caller]
    pub fn wait_for_nth(&self, direction: Direction, method: Method, n: usize) {
        let settled = |state: &State| count(state, direction, method, |seen| seen.settled);
        let otherwise = || {
            let sent = self.sent();
            format!("no {method:?} {direction:?} (number {n}); the worker has sent {sent:?}")
        };
        self.must(otherwise, |state| settled(state) >= n);
    }

    /// Waits until this many connections were accepted.
    #[track_caller]
    pub fn wait_accepted(&self, count: usize) {
        let otherwise = || format!("{} of {count} connections", self.accepted());
        self.must(otherwise, |state| state.accepted >= count);
    }

    /// Waits until exactly this many connections are open.
    #[track_caller]
    pub fn wait_open(&self, count: usize) {
        let otherwise = || format!("{} open, not {count}", self.open());
        self.must(otherwise, |state| state.open.len() == count);
    }

    /// Waits until the condition holds; panics if it doesn't.
    #[track_caller]
    fn must(&self, otherwise: impl FnOnce() -> String, condition: impl Fn(&State) -> bool) {
        let mut state = self.shared.state.subscribe();
        let met = runtime::block_on(async {
            let met = state.wait_for(condition);
            tokio::time::timeout(PATIENCE, met).await.is_ok()
        });
        assert!(met, "after {PATIENCE:?}: {}", otherwise());
    }

    fn control(&self, change: impl FnOnce(&mut Control)) {
        self.shared.control.send_modify(change);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.control(|control| {
            control.gone = true;
            control.cut += 1;
        });
    }
}

fn count(state: &State, direction: Direction, method: Method, which: impl Fn(&Seen) -> bool) -> usize {
    let wanted = |seen: &&Seen| seen.direction == direction && seen.method == method && which(seen);
    state.seen.iter().filter(wanted).count()
}

impl Shared {
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut value = None;
        self.state.send_modify(|state| value = Some(change(state)));
        value.expect("send_modify calls its closure")
    }
}
