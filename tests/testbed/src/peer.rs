//! A scripted AMQP peer: a broker's whole side of the conversation, in which a test answers what it likes.

use crate::proxy::{Method, frames};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

/// What the peer says in answer to a method.
#[derive(Debug, Clone)]
pub enum Answer {
    /// What a broker without messages says.
    Usual,
    /// These bytes.
    Bytes(Vec<u8>),
    /// These bytes, and then the end of the connection.
    Last(Vec<u8>),
}

/// A method that a client has sent.
#[derive(Debug, Clone)]
pub struct Call {
    /// The number of the connection, from 1.
    pub connection: usize,
    /// The channel's number.
    pub channel: u16,
    /// The method; frames of other kinds as [`Method::HEADER`] and the like.
    pub method: Method,
    /// What follows the method's numbers in the frame.
    pub arguments: Vec<u8>,
}

/// A listening peer; each connection has a thread of its own. Dropping it ends it.
pub struct Peer {
    addr: SocketAddr,
    calls: Arc<Mutex<Vec<Call>>>,
    ended: Arc<AtomicBool>,
}

type Script = dyn Fn(&Call) -> Answer + Send + Sync;

impl Peer {
    /// Starts a peer that asks `script` for its answer to each frame.
    ///
    /// # Panics
    /// Where it can't listen on loopback.
    pub fn start(script: impl Fn(&Call) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("listen on loopback");
        let peer = Self {
            addr: listener.local_addr().expect("it listens"),
            calls: Arc::default(),
            ended: Arc::default(),
        };
        let (calls, ended) = (peer.calls.clone(), peer.ended.clone());
        let script: Arc<Script> = Arc::new(script);
        thread::spawn(move || {
            for (index, stream) in listener.incoming().enumerate() {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let (calls, script) = (calls.clone(), script.clone());
                // The client's end of the connection is no error here.
                thread::spawn(move || drop(converse(stream, index + 1, &calls, &*script)));
            }
        });
        peer
    }

    /// Where it listens, as a URL.
    pub fn url(&self) -> String {
        format!("amqp://guest:guest@{}", self.addr)
    }

    /// Everything that clients have sent so far.
    pub fn calls(&self) -> Vec<Call> {
        lock(&self.calls).clone()
    }

    /// How often clients have sent this method.
    pub fn count(&self, method: Method) -> usize {
        let calls = lock(&self.calls);
        calls.iter().filter(|call| call.method == method).count()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.addr);
    }
}

fn lock(calls: &Mutex<Vec<Call>>) -> MutexGuard<'_, Vec<Call>> {
    calls.lock().unwrap_or_else(|error| error.into_inner())
}

fn converse(
    mut stream: TcpStream,
    connection: usize,
    calls: &Mutex<Vec<Call>>,
    script: &Script,
) -> io::Result<()> {
    stream.read_exact(&mut [0; 8])?;
    let mut call = Call {
        connection,
        channel: 0,
        method: Method::PROTOCOL_HEADER,
        arguments: Vec::new(),
    };
    loop {
        lock(calls).push(call.clone());
        match script(&call) {
            Answer::Usual => stream.write_all(&usual(&call))?,
            Answer::Bytes(bytes) => stream.write_all(&bytes)?,
            Answer::Last(bytes) => {
                stream.write_all(&bytes)?;
                // What the client has sent is read, as a reset could overtake the answer.
                stream.shutdown(std::net::Shutdown::Write)?;
                return io::copy(&mut stream, &mut io::sink()).map(drop);
            }
        }
        if matches!(
            call.method,
            Method::CONNECTION_CLOSE | Method::CONNECTION_CLOSE_OK
        ) {
            return Ok(());
        }
        call = read_call(&mut stream, connection)?;
    }
}

fn read_call(stream: &mut TcpStream, connection: usize) -> io::Result<Call> {
    let mut header = [0; 7];
    stream.read_exact(&mut header)?;
    let [kind, high, low, a, b, c, d] = header;
    let mut payload = vec![0; u32::from_be_bytes([a, b, c, d]) as usize + 1];
    stream.read_exact(&mut payload)?;
    payload.pop();
    let (method, arguments) = match (kind, payload.as_slice()) {
        (1, [a, b, c, d, arguments @ ..]) => {
            let number = |high, low| u16::from_be_bytes([high, low]);
            (Method(number(*a, *b), number(*c, *d)), arguments.to_vec())
        }
        _ => (Method(0, kind.into()), payload),
    };
    let channel = u16::from_be_bytes([high, low]);
    Ok(Call {
        connection,
        channel,
        method,
        arguments,
    })
}

/// connection.tune with this heartbeat, in seconds.
pub fn tune(heartbeat: u16) -> Vec<u8> {
    let mut limits = b"\x07\xff\0\x02\0\0".to_vec();
    limits.extend(heartbeat.to_be_bytes());
    frames::method_frame(0, Method::CONNECTION_TUNE, &limits)
}

/// A queue.declare-ok for an empty queue, or consume-ok, and so on: what a broker without messages answers.
pub fn usual(call: &Call) -> Vec<u8> {
    let frame = |method, arguments: &[u8]| frames::method_frame(call.channel, method, arguments);
    // A short string: its length and its bytes.
    let short = |from: usize| {
        let rest = call.arguments.get(from..).unwrap_or_default();
        let length = rest.first().copied().unwrap_or_default() as usize;
        rest.get(..=length).unwrap_or(b"\0").to_vec()
    };
    match call.method {
        Method::PROTOCOL_HEADER => {
            let greeting = b"\0\x09\0\0\0\0\0\0\0\x05PLAIN\0\0\0\x05en_US";
            frame(Method::CONNECTION_START, greeting)
        }
        Method::CONNECTION_START_OK => tune(1),
        Method::CONNECTION_OPEN => frame(Method::CONNECTION_OPEN_OK, b"\0"),
        Method::CONNECTION_CLOSE => frame(Method::CONNECTION_CLOSE_OK, b""),
        Method::CHANNEL_OPEN => frame(Method::CHANNEL_OPEN_OK, b"\0\0\0\0"),
        Method::CHANNEL_CLOSE => frame(Method::CHANNEL_CLOSE_OK, b""),
        Method::BASIC_QOS => frame(Method::BASIC_QOS_OK, b""),
        Method::CONFIRM_SELECT => frame(Method::CONFIRM_SELECT_OK, b""),
        Method::QUEUE_DECLARE => {
            // No message, and one consumer: an answer that knows of none counts for nothing.
            let name = short(2);
            frame(
                Method::QUEUE_DECLARE_OK,
                &[&name[..], &b"\0\0\0\0\0\0\0\x01"[..]].concat(),
            )
        }
        Method::BASIC_CONSUME => {
            let queue = short(2);
            frame(Method::BASIC_CONSUME_OK, &short(2 + queue.len()))
        }
        Method::BASIC_CANCEL => frame(Method::BASIC_CANCEL_OK, &short(0)),
        _ => Vec::new(),
    }
}

/// The consumer tag of a basic.consume, as a short string with its length.
pub fn consumer_tag(consume: &Call) -> Vec<u8> {
    usual(consume).get(11..).map_or_else(
        || b"\0".to_vec(),
        |rest| rest.get(..rest.len() - 1).unwrap_or_default().to_vec(),
    )
}

/// A frame of any kind, with a true length and the end that belongs to it.
pub fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend(channel.to_be_bytes());
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend(payload);
    bytes.push(0xce);
    bytes
}

/// The frames of a delivery: method, content header with this field table of headers (without its length), body.
pub fn delivery(channel: u16, tag: &[u8], headers: &[u8], size: u64, body: &[u8]) -> [Vec<u8>; 3] {
    let mut arguments = tag.to_vec();
    // Delivery tag 1, not redelivered, the default exchange, routing key "q".
    arguments.extend(b"\0\0\0\0\0\0\0\x01\0\0\x01q");
    let mut header = b"\0\x3c\0\0".to_vec();
    header.extend(size.to_be_bytes());
    // Of the properties, the headers only.
    header.extend(0x2000_u16.to_be_bytes());
    header.extend((headers.len() as u32).to_be_bytes());
    header.extend(headers);
    [
        frames::method_frame(channel, Method::BASIC_DELIVER, &arguments),
        frame(2, channel, &header),
        frame(3, channel, body),
    ]
}

/// A field table (without its length) that holds a table, or an array where `arrays`, that holds one, so many levels deep.
pub fn nested(levels: usize, arrays: bool) -> Vec<u8> {
    let mut value = Vec::new();
    for _ in 0..levels {
        let mut outer = if arrays {
            b"A".to_vec()
        } else {
            b"\x01kF".to_vec()
        };
        outer.extend((value.len() as u32).to_be_bytes());
        outer.extend(&value);
        value = outer;
    }
    if arrays {
        [&b"\x01k"[..], &value].concat()
    } else {
        value
    }
}
