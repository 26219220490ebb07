//! AMQP 0-9-1 frames for a proxy: finding a frame's end and its method, and building frames.

use std::fmt;
use std::io::{self, Read};

/// A method, by its class's number and its own. Other frames have class 0 and the number of their type.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Method(pub u16, pub u16);

/// Defines constants and names for the methods that the tests use.
macro_rules! methods {
    ($($constant:ident = $class:literal, $method:literal, $name:literal;)*) => {
        impl Method {
            $(#[doc = $name] pub const $constant: Self = Self($class, $method);)*

            fn name(self) -> Option<&'static str> {
                match self {
                    $(Self::$constant => Some($name),)*
                    _ => None,
                }
            }
        }
    };
}

methods! {
    PROTOCOL_HEADER = 0, 0, "protocol header";
    HEADER = 0, 2, "content header";
    BODY = 0, 3, "content body";
    HEARTBEAT = 0, 8, "heartbeat";
    CONNECTION_START = 10, 10, "connection.start";
    CONNECTION_START_OK = 10, 11, "connection.start-ok";
    CONNECTION_TUNE = 10, 30, "connection.tune";
    CONNECTION_TUNE_OK = 10, 31, "connection.tune-ok";
    CONNECTION_OPEN = 10, 40, "connection.open";
    CONNECTION_OPEN_OK = 10, 41, "connection.open-ok";
    CONNECTION_CLOSE = 10, 50, "connection.close";
    CONNECTION_CLOSE_OK = 10, 51, "connection.close-ok";
    CONNECTION_UPDATE_SECRET = 10, 70, "connection.update-secret";
    CONNECTION_UPDATE_SECRET_OK = 10, 71, "connection.update-secret-ok";
    CHANNEL_OPEN = 20, 10, "channel.open";
    CHANNEL_OPEN_OK = 20, 11, "channel.open-ok";
    CHANNEL_CLOSE = 20, 40, "channel.close";
    CHANNEL_CLOSE_OK = 20, 41, "channel.close-ok";
    QUEUE_DECLARE = 50, 10, "queue.declare";
    QUEUE_DECLARE_OK = 50, 11, "queue.declare-ok";
    QUEUE_DELETE = 50, 40, "queue.delete";
    QUEUE_DELETE_OK = 50, 41, "queue.delete-ok";
    BASIC_QOS = 60, 10, "basic.qos";
    BASIC_QOS_OK = 60, 11, "basic.qos-ok";
    BASIC_CONSUME = 60, 20, "basic.consume";
    BASIC_CONSUME_OK = 60, 21, "basic.consume-ok";
    BASIC_CANCEL = 60, 30, "basic.cancel";
    BASIC_CANCEL_OK = 60, 31, "basic.cancel-ok";
    BASIC_PUBLISH = 60, 40, "basic.publish";
    BASIC_RETURN = 60, 50, "basic.return";
    BASIC_DELIVER = 60, 60, "basic.deliver";
    BASIC_GET = 60, 70, "basic.get";
    BASIC_ACK = 60, 80, "basic.ack";
    BASIC_REJECT = 60, 90, "basic.reject";
    BASIC_NACK = 60, 120, "basic.nack";
    CONFIRM_SELECT = 85, 10, "confirm.select";
    CONFIRM_SELECT_OK = 85, 11, "confirm.select-ok";
}

impl Method {
    /// Whether this is a method, and not another type of frame.
    pub fn is_method(self) -> bool {
        self.0 != 0
    }
}

impl fmt::Debug for Method {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => formatter.write_str(name),
            None => write!(formatter, "method {}.{}", self.0, self.1),
        }
    }
}

/// The type of a frame that carries a method.
const METHOD_FRAME: u8 = 1;

/// The size of a frame's header: type, channel and size.
const FRAME_HEADER: usize = 7;

/// The last byte of every frame.
const FRAME_END: u8 = 0xCE;

/// What a stream begins with.
pub(super) enum Next {
    /// A frame that hasn't arrived completely.
    Incomplete,
    /// A frame of this length, with its method.
    Frame { length: usize, method: Method },
    /// Something other than unencrypted AMQP 0-9-1.
    Foreign,
}

/// Whether this is the beginning of a protocol header.
pub(super) fn greets(stream: &[u8]) -> bool {
    const START: &[u8] = b"AMQP";
    stream.starts_with(&START[..stream.len().min(START.len())])
}

/// Examines the beginning of a stream.
pub(super) fn next(stream: &[u8]) -> Next {
    // A client's first bytes; or a broker's, if it doesn't support the client's version.
    if greets(stream) {
        return match stream.len() {
            ..8 => Next::Incomplete,
            _ => Next::Frame { length: 8, method: Method::PROTOCOL_HEADER },
        };
    }
    if !matches!(stream[0], 1 | 2 | 3 | 8) {
        return Next::Foreign;
    }
    let Some((&[kind, _, _, size @ ..], rest)) = stream.split_first_chunk::<FRAME_HEADER>() else {
        return Next::Incomplete;
    };
    let size = u32::from_be_bytes(size) as usize;
    match rest.get(size) {
        None => Next::Incomplete,
        Some(&FRAME_END) => Next::Frame { length: FRAME_HEADER + size + 1, method: method(kind, &rest[..size]).0 },
        Some(_) => Next::Foreign,
    }
}

/// A frame's method, and the method's arguments.
fn method(kind: u8, payload: &[u8]) -> (Method, &[u8]) {
    match (kind, payload) {
        (METHOD_FRAME, &[a, b, c, d, ref rest @ ..]) => {
            let numbers = [[a, b], [c, d]].map(u16::from_be_bytes);
            (Method(numbers[0], numbers[1]), rest)
        }
        _ => (Method(0, kind.into()), payload),
    }
}

/// Reads the next frame: its channel, its method, and the method's arguments.
pub(crate) fn read(stream: &mut impl Read) -> io::Result<(u16, Method, Vec<u8>)> {
    let mut header = [0; FRAME_HEADER];
    stream.read_exact(&mut header)?;
    let [kind, c0, c1, size @ ..] = header;
    let size = u32::from_be_bytes(size) as usize;
    let mut payload = vec![0; size + 1];
    stream.read_exact(&mut payload)?;
    let (method, arguments) = method(kind, &payload[..size]);
    Ok((u16::from_be_bytes([c0, c1]), method, arguments.to_vec()))
}

/// A frame of any type.
pub fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![kind];
    frame.extend(channel.to_be_bytes());
    frame.extend((payload.len() as u32).to_be_bytes());
    frame.extend(payload);
    frame.push(FRAME_END);
    frame
}

/// A frame with this method and encoded arguments.
pub fn method_frame(channel: u16, method: Method, arguments: &[u8]) -> Vec<u8> {
    let numbers = [method.0.to_be_bytes(), method.1.to_be_bytes()].concat();
    frame(METHOD_FRAME, channel, &[&numbers, arguments].concat())
}

/// A short string; cut off after 255 bytes.
pub fn short(text: &[u8]) -> Vec<u8> {
    let text = &text[..text.len().min(255)];
    [&[text.len() as u8], text].concat()
}

/// A long string, or, from their content, a table or an array.
pub fn long(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text].concat()
}

/// channel.close as a broker sends it: `channel_close(1, 406, "PRECONDITION_FAILED - …")`.
pub fn channel_close(channel: u16, code: u16, text: &str) -> Vec<u8> {
    method_frame(channel, Method::CHANNEL_CLOSE, &close_arguments(code, text))
}

/// connection.close as a broker sends it: `connection_close(320, "CONNECTION_FORCED - …")`.
pub fn connection_close(code: u16, text: &str) -> Vec<u8> {
    method_frame(0, Method::CONNECTION_CLOSE, &close_arguments(code, text))
}

/// basic.cancel as a broker sends it when a queue is deleted or moved.
pub fn basic_cancel(channel: u16, consumer_tag: &str) -> Vec<u8> {
    let no_wait = [1];
    let arguments = [&short(consumer_tag.as_bytes())[..], &no_wait].concat();
    method_frame(channel, Method::BASIC_CANCEL, &arguments)
}

/// For [`super::Action::Replace`]: an acknowledgement, on the frame's channel, of a delivery that never happened. The
/// broker answers it with channel.close 406.
pub fn unknown_ack(frame: &[u8]) -> Vec<u8> {
    let channel = u16::from_be_bytes([frame[1], frame[2]]);
    let not_multiple = [0];
    let arguments = [&999_999_u64.to_be_bytes()[..], &not_multiple].concat();
    method_frame(channel, Method::BASIC_ACK, &arguments)
}

fn close_arguments(code: u16, text: &str) -> Vec<u8> {
    let no_method = [0; 4];
    [&code.to_be_bytes(), &short(text.as_bytes())[..], &no_method].concat()
}
