//! A TCP proxy between a worker and its broker, which misbehaves when told to.
//!
//! It reads the frames of AMQP 0-9-1 on their way (in each direction), so that a fault can be put exactly before or after a
//! given method. What isn't AMQP in plain text (TLS) passes as it is, and only the faults that need no frames apply.

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

/// Which way a frame goes.
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

/// What happens when a certain method comes along.
#[derive(Clone)]
pub enum Action {
    /// It passes.
    Pass,
    /// Both sides are reset, and the method doesn't arrive.
    CutBefore,
    /// The method arrives; then its receiver sees the connection closed and its sender sees it reset.
    CutAfter,
    /// This frame and everything after it in this direction disappears; the other direction goes on.
    Swallow,
    /// Only this frame disappears.
    SwallowFrame,
    /// From this frame on everything disappears in both directions, while the connections stay open.
    Stall,
    /// This frame and what follows in this direction wait for [`Proxy::release`].
    Hold,
    /// The frame passes, and these bytes (whole frames, see [`frames`]) go to the worker.
    Inject(Vec<u8>),
    /// These bytes go to the worker instead of the frame's going where it was to go.
    InjectInstead(Vec<u8>),
    /// Another frame takes its place: an ack with a wrong delivery tag, for example, to which the broker answers with a 406.
    Replace(Rewrite),
}

/// Makes another frame of a frame.
pub type Rewrite = Arc<dyn Fn(&[u8]) -> Vec<u8> + Send + Sync>;

/// A frame that came along.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The connection, counted from 1 in the order of acceptance.
    pub connection: usize,
    /// Its direction.
    pub direction: Direction,
    /// Its method, or what stands for a frame without one: [`Method::BODY`], for example.
    pub method: Method,
    /// When it arrived.
    pub at: Instant,
    /// Whether it was written to the other side, was swallowed, or is held.
    settled: bool,
}

/// A proxy on a port of its own; gone, with its connections, when dropped.
pub struct Proxy {
    shared: Arc<Shared>,
    addr: SocketAddr,
    url: String,
    _port: Port,
}

/// What the proxy's tasks and its owner share.
struct Shared {
    state: watch::Sender<State>,
    control: watch::Sender<Control>,
}

/// The settings that every connection obeys at once.
#[derive(Clone, Default)]
struct Control {
    /// None: there is nothing behind the proxy.
    upstream: Option<SocketAddr>,
    swallow: [bool; 2],
    stall: bool,
    delay: [Duration; 2],
    refuse: bool,
    /// Rises with every cut; a connection ends when it is no longer what it was at its start.
    cut: u64,
    /// Rises with every release.
    release: u64,
    /// The proxy was dropped.
    gone: bool,
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    seen: Vec<Seen>,
    accepted: usize,
    /// The connections by their number, behind the [`Control::cut`] at which they were accepted.
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
    /// In front of a broker.
    pub fn of(broker: &Broker) -> Self {
        let mut proxy = Self::to(broker.addr());
        proxy.url = broker.url_at(proxy.addr);
        proxy
    }

    /// In front of any address.
    pub fn to(upstream: SocketAddr) -> Self {
        Self::local(Some(upstream))
    }

    /// In front of nothing: it accepts connections and stays silent.
    pub fn silent() -> Self {
        Self::local(None)
    }

    fn local(upstream: Option<SocketAddr>) -> Self {
        let proxy = Self::listen(Ipv4Addr::LOCALHOST.into(), upstream);
        proxy.unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// In front of any address, listening on another than 127.0.0.1: a network namespace's way to the broker.
    pub fn listen(ip: IpAddr, upstream: Option<SocketAddr>) -> Result<Self> {
        // A port of its own rather than 0, because it is needed again after `refuse`.
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

    /// The broker's address with the proxy's host and port in it.
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// Ends every fault: connections are accepted and everything passes at once. What was swallowed stays lost.
    #[track_caller]
    pub fn pass(&self) {
        self.control(|control| {
            control.swallow = [false; 2];
            control.stall = false;
            control.delay = [Duration::ZERO; 2];
            control.refuse = false;
            control.release += 1;
        });
        self.must(|| "it doesn't listen".into(), |state| state.listening);
    }

    /// Resets every connection, both sides; not those that come meanwhile.
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

    /// Lets everything in one direction disappear, like a firewall that has forgotten the connection.
    pub fn swallow(&self, direction: Direction) {
        self.control(|control| control.swallow[direction.index()] = true);
    }

    /// Lets nothing through any more, in either direction: what arrives waits until [`Proxy::pass`]. New connections are accepted
    /// and get no answer.
    pub fn stall(&self) {
        self.control(|control| control.stall = true);
    }

    /// Makes everything in one direction so much later, by a constant: what is sent while something else is on its way
    /// isn't held up by it. A new connection's handshake takes its round trip, too.
    pub fn delay(&self, direction: Direction, delay: Duration) {
        self.control(|control| control.delay[direction.index()] = delay);
    }

    /// Stops listening, so that new connections are refused; those there are stay. Ended by [`Proxy::pass`].
    #[track_caller]
    pub fn refuse(&self) {
        self.control(|control| control.refuse = true);
        self.must(|| "it still listens".into(), |state| !state.listening);
    }

    /// Lets go what [`Action::Hold`] holds.
    pub fn release(&self) {
        self.control(|control| control.release += 1);
    }

    /// Does this every time the method comes along in that direction.
    pub fn on(&self, direction: Direction, method: Method, action: Action) {
        self.rule(direction, method, action, false);
    }

    /// Does this the next time the method comes along in that direction.
    pub fn once(&self, direction: Direction, method: Method, action: Action) {
        self.rule(direction, method, action, true);
    }

    fn rule(&self, direction: Direction, method: Method, action: Action, once: bool) {
        let rule = Rule { direction, method, action, once };
        self.shared.change(|state| state.rules.push(rule));
    }

    /// Forgets what [`Proxy::on`] and [`Proxy::once`] have set.
    pub fn clear_rules(&self) {
        self.shared.change(|state| state.rules.clear());
    }

    /// What came along, in order of arrival.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.state.borrow().seen.clone()
    }

    /// The methods that the worker has sent, in order, without bodies and heartbeats.
    pub fn sent(&self) -> Vec<Method> {
        let state = self.shared.state.borrow();
        let sent = state.seen.iter().filter(|seen| seen.direction == Direction::ToBroker && seen.method.is_method());
        sent.map(|seen| seen.method).collect()
    }

    /// How often the method has come along in that direction.
    pub fn count(&self, direction: Direction, method: Method) -> usize {
        count(&self.shared.state.borrow(), direction, method, |_| true)
    }

    /// How many connections it has accepted.
    pub fn accepted(&self) -> usize {
        self.shared.state.borrow().accepted
    }

    /// How many connections are open.
    pub fn open(&self) -> usize {
        self.shared.state.borrow().open.len()
    }

    /// Waits until the method has come along in that direction, and has passed or met its fault.
    #[track_caller]
    pub fn wait_for(&self, direction: Direction, method: Method) {
        self.wait_for_nth(direction, method, 1);
    }

    /// Waits until the method has come along so many times.
    #[track_caller]
    pub fn wait_for_nth(&self, direction: Direction, method: Method, n: usize) {
        let settled = |state: &State| count(state, direction, method, |seen| seen.settled);
        let otherwise = || {
            let sent = self.sent();
            format!("no {method:?} {direction:?} (number {n}); the worker has sent {sent:?}")
        };
        self.must(otherwise, |state| settled(state) >= n);
    }

    /// Waits until so many connections have been accepted.
    #[track_caller]
    pub fn wait_accepted(&self, count: usize) {
        let otherwise = || format!("{} of {count} connections", self.accepted());
        self.must(otherwise, |state| state.accepted >= count);
    }

    /// Waits until exactly so many connections are open.
    #[track_caller]
    pub fn wait_open(&self, count: usize) {
        let otherwise = || format!("{} open, not {count}", self.open());
        self.must(otherwise, |state| state.open.len() == count);
    }

    /// Waits until this has come true, and panics where it doesn't.
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
        value.expect("it was changed")
    }
}
