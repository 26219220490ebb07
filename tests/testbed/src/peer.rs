//! A scripted AMQP 0-9-1 peer: it answers like a broker with one queue, unless the script says otherwise. If the script
//! doesn't answer a request, a test may do so later with [`Peer::send`]. Also [`publish_raw`], which publishes
//! malformed messages.

use crate::proxy::frames::{self, Method, frame, long, method_frame, short};
use crate::{Action, Broker, Client, Direction, Proxy};
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use parking_lot::Mutex;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

/// How long a connection may be silent before the peer drops it.
const IDLE: Duration = Duration::from_secs(30);

/// A frame that a client has sent.
#[derive(Clone, Debug)]
pub struct Request {
    /// The connection's number, from 1.
    pub connection: usize,
    /// The channel.
    pub channel: u16,
    /// The method, or the constant for another type of frame.
    pub method: Method,
    /// The method's arguments, or another frame's payload.
    pub arguments: Vec<u8>,
    /// How many frames of this method this connection has sent, including this one.
    pub nth: u64,
}

/// The script's answer to a request.
#[derive(Clone, Debug)]
pub enum Answer {
    /// A broker's usual answer.
    Usual,
    /// These bytes, and the connection goes on.
    Bytes(Vec<u8>),
    /// These bytes; then the connection is closed.
    Last(Vec<u8>),
}

/// A peer on a free port; when it is dropped, it stops accepting connections.
pub struct Peer {
    addr: SocketAddr,
    seen: Arc<Mutex<Vec<Request>>>,
    /// One for each connection so far.
    writers: Arc<Mutex<Vec<Arc<Writer>>>>,
    gone: Arc<AtomicBool>,
}

/// `None` if the test has ended the connection. It is locked from a request's arrival until the answer is written: a test
/// that sees the request may then send bytes, and they must come after the answer.
type Writer = Mutex<Option<TcpStream>>;

impl Peer {
    /// Starts a peer that answers every connection with this script.
    pub fn new(script: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port to listen on");
        let addr = listener.local_addr().expect("the port's number");
        let peer = Self { addr, seen: Arc::default(), writers: Arc::default(), gone: Arc::default() };
        let (seen, writers, gone, script) =
            (peer.seen.clone(), peer.writers.clone(), peer.gone.clone(), Arc::new(script));
        thread::spawn(move || {
            for (count, stream) in listener.incoming().flatten().enumerate() {
                if gone.load(Relaxed) {
                    return;
                }
                let writer: Arc<Writer> = Arc::new(Mutex::new(stream.try_clone().ok()));
                writers.lock().push(writer.clone());
                let (seen, script) = (seen.clone(), script.clone());
                // Errors only mean that the client or the script has ended the connection.
                thread::spawn(move || serve(stream, &writer, count + 1, &seen, &*script));
            }
        });
        peer
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("amqp://guest:guest@{}", self.addr)
    }

    /// The frames that it got so far.
    pub fn seen(&self) -> Vec<Request> {
        self.seen.lock().clone()
    }

    /// The number of frames with this method that it got.
    pub fn count(&self, method: Method) -> usize {
        let seen = self.seen.lock();
        seen.iter().filter(|seen| seen.method == method).count()
    }

    /// Sends bytes on a connection, by its number from 1. Does nothing if the connection has ended.
    pub fn send(&self, connection: usize, bytes: &[u8]) {
        if let Some(stream) = &mut *self.writer(connection).lock() {
            let _ = stream.write_all(bytes);
        }
    }

    /// Closes a connection; the client can still read everything that was sent.
    pub fn close(&self, connection: usize) {
        if let Some(stream) = self.writer(connection).lock().take() {
            let _ = stream.shutdown(Shutdown::Write);
        }
    }

    /// Resets a connection; the client may lose data that it hasn't read.
    pub fn reset(&self, connection: usize) {
        if let Some(stream) = self.writer(connection).lock().take() {
            let linger = libc::linger { l_onoff: 1, l_linger: 0 };
            setsockopt(&stream, sockopt::Linger, &linger).expect("a socket may be reset");
            // This ends the reading thread; when the last handle is dropped, the kernel sends the reset.
            let _ = stream.shutdown(Shutdown::Read);
        }
    }

    fn writer(&self, connection: usize) -> Arc<Writer> {
        self.writers.lock()[connection - 1].clone()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.gone.store(true, Relaxed);
        // Wakes the accepting thread, so that it sees `gone`.
        let _ = TcpStream::connect(self.addr);
    }
}

fn serve(
    mut stream: TcpStream,
    writer: &Writer,
    connection: usize,
    seen: &Mutex<Vec<Request>>,
    script: &(impl Fn(&Request) -> Answer + ?Sized),
) -> io::Result<()> {
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_nodelay(true)?;
    let mut header = [0; 8];
    stream.read_exact(&mut header)?;
    let mut next = Ok((0, Method::PROTOCOL_HEADER, header.to_vec()));
    loop {
        let (channel, method, arguments) = next?;
        let mut writer = writer.lock();
        let request = {
            let mut seen = seen.lock();
            let earlier = seen.iter().filter(|seen| seen.connection == connection && seen.method == method);
            let request = Request { connection, channel, method, arguments, nth: earlier.count() as u64 + 1 };
            seen.push(request.clone());
            request
        };
        let (bytes, ends) = match script(&request) {
            Answer::Usual => (usual(&request), method == Method::CONNECTION_CLOSE),
            Answer::Bytes(bytes) => (bytes, false),
            Answer::Last(bytes) => (bytes, true),
        };
        let Some(answered) = &mut *writer else {
            return Ok(());
        };
        answered.write_all(&bytes)?;
        if ends {
            return answered.shutdown(Shutdown::Both);
        }
        drop(writer);
        next = frames::read(&mut stream);
    }
}

/// The usual answer of a broker with one empty queue.
pub fn usual(request: &Request) -> Vec<u8> {
    let of = |method, arguments: &[u8]| method_frame(request.channel, method, arguments);
    match request.method {
        Method::PROTOCOL_HEADER => {
            let mechanisms = long(b"PLAIN");
            let arguments = [&[0, 9][..], &long(b""), &mechanisms, &long(b"en_US")].concat();
            of(Method::CONNECTION_START, &arguments)
        }
        Method::CONNECTION_START_OK => tune(60),
        Method::CONNECTION_OPEN => of(Method::CONNECTION_OPEN_OK, &[0]),
        Method::CONNECTION_CLOSE => of(Method::CONNECTION_CLOSE_OK, &[]),
        Method::CHANNEL_OPEN => of(Method::CHANNEL_OPEN_OK, &[0; 4]),
        Method::CHANNEL_CLOSE => of(Method::CHANNEL_CLOSE_OK, &[]),
        Method::CONFIRM_SELECT => of(Method::CONFIRM_SELECT_OK, &[]),
        Method::BASIC_QOS => of(Method::BASIC_QOS_OK, &[]),
        Method::QUEUE_DECLARE => declared(request, 0, 0),
        Method::QUEUE_DELETE => of(Method::QUEUE_DELETE_OK, &[0; 4]),
        Method::BASIC_CONSUME => {
            let queue = short_at(&request.arguments, 2);
            let tag = short_at(&request.arguments, 2 + queue.len());
            of(Method::BASIC_CONSUME_OK, tag)
        }
        Method::BASIC_CANCEL => match request.arguments.last() {
            // After the tag comes no-wait.
            Some(1) => Vec::new(),
            _ => of(Method::BASIC_CANCEL_OK, short_at(&request.arguments, 0)),
        },
        Method::BODY => settle(request, Method::BASIC_ACK),
        _ => Vec::new(),
    }
}

/// connection.tune with this heartbeat, in seconds.
pub fn tune(heartbeat: u16) -> Vec<u8> {
    let arguments = [&[7, 255, 0, 2, 0, 0][..], &heartbeat.to_be_bytes()].concat();
    method_frame(0, Method::CONNECTION_TUNE, &arguments)
}

/// basic.ack or basic.nack for the message whose body has arrived.
pub fn settle(request: &Request, method: Method) -> Vec<u8> {
    let arguments = [&request.nth.to_be_bytes()[..], &[0]].concat();
    method_frame(request.channel, method, &arguments)
}

/// basic.return with NO_ROUTE for a message with an empty body.
pub fn returned(channel: u16) -> Vec<u8> {
    let arguments = [&[1, 56][..], &short(b"NO_ROUTE"), &[0], &short(b"q")].concat();
    [method_frame(channel, Method::BASIC_RETURN, &arguments), content_header(channel, 0, &[0, 0])].concat()
}

/// basic.deliver to qconsume's consumer, with this delivery tag and routing key.
pub fn deliver(channel: u16, tag: u64, routing_key: &[u8]) -> Vec<u8> {
    deliver_as(channel, tag, false, routing_key)
}

fn deliver_as(channel: u16, tag: u64, redelivered: bool, routing_key: &[u8]) -> Vec<u8> {
    let tag = tag.to_be_bytes();
    let key = short(routing_key);
    let arguments = [&short(b"qconsume")[..], &tag, &[redelivered.into()], &[0], &key].concat();
    method_frame(channel, Method::BASIC_DELIVER, &arguments)
}

/// A whole message for qconsume's consumer, with this delivery tag and body.
pub fn message(channel: u16, tag: u64, redelivered: bool, body: &[u8]) -> Vec<u8> {
    counted_message(channel, tag, redelivered, &[], body)
}

/// The same, with a queue's counts among its headers, such as `x-delivery-count`.
pub fn counted_message(channel: u16, tag: u64, redelivered: bool, counts: &[(&str, i64)], body: &[u8]) -> Vec<u8> {
    let deliver = deliver_as(channel, tag, redelivered, b"q");
    let field = |(name, count): &(&str, i64)| [&short(name.as_bytes())[..], b"l", &count.to_be_bytes()].concat();
    let headers = long(&counts.iter().map(field).collect::<Vec<_>>().concat());
    let header = content_header(channel, body.len() as u64, &[&[0x20, 0][..], &headers].concat());
    [deliver, header, frame(3, channel, body)].concat()
}

/// queue.declare-ok with these counts, for a request.
pub fn declared(request: &Request, ready: u32, consumers: u32) -> Vec<u8> {
    let name = short_at(&request.arguments, 2);
    let arguments = [name, &ready.to_be_bytes(), &consumers.to_be_bytes()].concat();
    method_frame(request.channel, Method::QUEUE_DECLARE_OK, &arguments)
}

/// connection.start of a broker with this version.
pub fn greeting(version: &str) -> Vec<u8> {
    greeting_with(&[("version", version)])
}

/// connection.start with these server properties, such as `product`.
pub fn greeting_with(properties: &[(&str, &str)]) -> Vec<u8> {
    let property = |(name, value): &(&str, &str)| [&short(name.as_bytes())[..], b"S", &long(value.as_bytes())].concat();
    let properties = long(&properties.iter().flat_map(property).collect::<Vec<_>>());
    let arguments = [&[0, 9][..], &properties, &long(b"PLAIN"), &long(b"en_US")].concat();
    method_frame(0, Method::CONNECTION_START, &arguments)
}

/// A content header with the body's size and encoded properties.
pub fn content_header(channel: u16, size: u64, properties: &[u8]) -> Vec<u8> {
    let payload = [&[0, 60, 0, 0][..], &size.to_be_bytes(), properties].concat();
    frame(2, channel, &payload)
}

/// Encoded properties with nested headers, either tables (`F`) or arrays (`A`); `levels` includes the table of headers.
pub fn nested_headers(levels: usize, kind: u8) -> Vec<u8> {
    // Built from the inside, as recursion would overflow the stack.
    let mut value = Vec::new();
    for level in (1..levels).rev() {
        let named = level == 1 || kind == b'F';
        let name = if named { &[1, b'n'][..] } else { &[] };
        value = [name, &[kind], &long(&value)].concat();
    }
    [&[0x20, 0][..], &long(&value)].concat()
}

fn short_at(arguments: &[u8], at: usize) -> &[u8] {
    let rest = arguments.get(at..).unwrap_or_default();
    let size = 1 + usize::from(rest.first().copied().unwrap_or_default());
    rest.get(..size).unwrap_or(&[0])
}

/// Publishes a message with any bytes as properties and routing key; returns when the broker has confirmed it.
pub fn publish_raw(broker: &Broker, exchange: &str, routing_key: &[u8], properties: &[u8]) {
    let (exchange, key) = (short(exchange.as_bytes()), short(routing_key));
    let target = [&[0, 0][..], &exchange, &key, &[0]].concat();
    let proxy = Proxy::of(broker);
    for (method, frame) in [
        (Method::BASIC_PUBLISH, method_frame(1, Method::BASIC_PUBLISH, &target)),
        (Method::HEADER, content_header(1, 5, properties)),
    ] {
        let spoil = Action::Replace(Arc::new(move |_: &[u8]| frame.clone()));
        proxy.once(Direction::ToBroker, method, spoil);
    }
    let published = Client::new(&proxy.url()).publish("any", ["lemon"], Default::default());
    published.unwrap_or_else(|error| panic!("the broker refused the message: {error:#}"));
}
