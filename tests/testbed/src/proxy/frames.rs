//! AMQP 0-9-1 frames, as much of them as a proxy needs: where one ends, which method it carries, and how to make one.

use std::fmt;

/// A method by the numbers of its class and its own.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Method(pub u16, pub u16);

/// The names of the methods that the tests speak of.
macro_rules! methods {
    ($($(#[$doc:meta])* $constant:ident = $class:literal, $method:literal, $name:literal;)*) => {
        impl Method {
            $($(#[$doc])* pub const $constant: Self = Self($class, $method);)*

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
    /// The eight bytes with which a client begins; they are no frame.
    PROTOCOL_HEADER = 0, 0, "protocol header";
    /// A content header: properties and size of a message.
    HEADER = 0, 2, "content header";
    /// A part of a message's body.
    BODY = 0, 3, "content body";
    /// A heartbeat.
    HEARTBEAT = 0, 8, "heartbeat";
    /// connection.start, the broker's greeting.
    CONNECTION_START = 10, 10, "connection.start";
    /// connection.start-ok, with the credentials.
    CONNECTION_START_OK = 10, 11, "connection.start-ok";
    /// connection.tune, the broker's limits.
    CONNECTION_TUNE = 10, 30, "connection.tune";
    /// connection.tune-ok.
    CONNECTION_TUNE_OK = 10, 31, "connection.tune-ok";
    /// connection.open, with the virtual host.
    CONNECTION_OPEN = 10, 40, "connection.open";
    /// connection.open-ok, the end of the handshake.
    CONNECTION_OPEN_OK = 10, 41, "connection.open-ok";
    /// connection.close.
    CONNECTION_CLOSE = 10, 50, "connection.close";
    /// connection.close-ok.
    CONNECTION_CLOSE_OK = 10, 51, "connection.close-ok";
    /// channel.open.
    CHANNEL_OPEN = 20, 10, "channel.open";
    /// channel.open-ok.
    CHANNEL_OPEN_OK = 20, 11, "channel.open-ok";
    /// channel.close: an error, or an orderly end.
    CHANNEL_CLOSE = 20, 40, "channel.close";
    /// channel.close-ok.
    CHANNEL_CLOSE_OK = 20, 41, "channel.close-ok";
    /// queue.declare, passive ones among them.
    QUEUE_DECLARE = 50, 10, "queue.declare";
    /// queue.declare-ok.
    QUEUE_DECLARE_OK = 50, 11, "queue.declare-ok";
    /// basic.qos: the prefetch, and the barrier after an ack.
    BASIC_QOS = 60, 10, "basic.qos";
    /// basic.qos-ok.
    BASIC_QOS_OK = 60, 11, "basic.qos-ok";
    /// basic.consume.
    BASIC_CONSUME = 60, 20, "basic.consume";
    /// basic.consume-ok.
    BASIC_CONSUME_OK = 60, 21, "basic.consume-ok";
    /// basic.cancel; the broker may send one too.
    BASIC_CANCEL = 60, 30, "basic.cancel";
    /// basic.cancel-ok.
    BASIC_CANCEL_OK = 60, 31, "basic.cancel-ok";
    /// basic.publish.
    BASIC_PUBLISH = 60, 40, "basic.publish";
    /// basic.return: a message that no queue takes.
    BASIC_RETURN = 60, 50, "basic.return";
    /// basic.deliver: a message follows.
    BASIC_DELIVER = 60, 60, "basic.deliver";
    /// basic.get.
    BASIC_GET = 60, 70, "basic.get";
    /// basic.ack; to a publisher it is the confirmation.
    BASIC_ACK = 60, 80, "basic.ack";
    /// basic.reject.
    BASIC_REJECT = 60, 90, "basic.reject";
    /// basic.nack.
    BASIC_NACK = 60, 120, "basic.nack";
    /// confirm.select.
    CONFIRM_SELECT = 85, 10, "confirm.select";
    /// confirm.select-ok.
    CONFIRM_SELECT_OK = 85, 11, "confirm.select-ok";
}

impl Method {
    /// Whether it is a method rather than what stands for another kind of frame.
    pub fn is_method(self) -> bool {
        self.0 != 0
    }
}

impl fmt::Display for Method {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => formatter.write_str(name),
            None => write!(formatter, "method {}.{}", self.0, self.1),
        }
    }
}

impl fmt::Debug for Method {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

/// The type of a frame that carries a method.
const METHOD_FRAME: u8 = 1;

/// Type, channel and size.
const FRAME_HEADER: usize = 7;

/// The last byte of every frame.
const FRAME_END: u8 = 0xCE;

/// What stands at the beginning of a stream.
pub(super) enum Next {
    /// Not all of it has arrived.
    Incomplete,
    /// A frame of this length, with its channel and method.
    Frame {
        length: usize,
        channel: u16,
        method: Method,
    },
    /// This isn't AMQP 0-9-1 in plain text.
    Foreign,
}

/// Looks at the beginning of what a client sends.
pub(super) fn protocol_header(stream: &[u8]) -> Next {
    const START: &[u8] = b"AMQP";
    let known = stream.len().min(START.len());
    if stream[..known] != START[..known] {
        Next::Foreign
    } else if stream.len() < 8 {
        Next::Incomplete
    } else {
        Next::Frame {
            length: 8,
            channel: 0,
            method: Method::PROTOCOL_HEADER,
        }
    }
}

/// Looks at the next frame of a stream.
pub(super) fn frame(stream: &[u8]) -> Next {
    let Some((&[kind, c0, c1, s0, s1, s2, s3], rest)) = stream.split_first_chunk::<FRAME_HEADER>()
    else {
        // A broker that doesn't speak the version asked for answers with a protocol header.
        return match stream.first() {
            Some(1 | 2 | 3 | 8) | None => Next::Incomplete,
            Some(_) => Next::Foreign,
        };
    };
    let size = u32::from_be_bytes([s0, s1, s2, s3]) as usize;
    let Some(end) = rest.get(size) else {
        return if matches!(kind, 1 | 2 | 3 | 8) {
            Next::Incomplete
        } else {
            Next::Foreign
        };
    };
    if *end != FRAME_END {
        return Next::Foreign;
    }
    let method = match (kind, rest) {
        (METHOD_FRAME, [a, b, c, d, ..]) if size >= 4 => {
            Method(u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d]))
        }
        (kind, _) => Method(0, kind.into()),
    };
    Next::Frame {
        length: FRAME_HEADER + size + 1,
        channel: u16::from_be_bytes([c0, c1]),
        method,
    }
}

/// A frame with this method and its arguments, encoded.
pub fn method_frame(channel: u16, method: Method, arguments: &[u8]) -> Vec<u8> {
    let size = 4 + arguments.len() as u32;
    let mut frame = vec![METHOD_FRAME];
    frame.extend(channel.to_be_bytes());
    frame.extend(size.to_be_bytes());
    frame.extend(method.0.to_be_bytes());
    frame.extend(method.1.to_be_bytes());
    frame.extend(arguments);
    frame.push(FRAME_END);
    frame
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
    let mut arguments = short_string(consumer_tag);
    arguments.push(1); // no-wait
    method_frame(channel, Method::BASIC_CANCEL, &arguments)
}

/// Makes of any frame an acknowledgement, on the same channel, of a delivery that was never made; the broker answers that with
/// channel.close 406. For [`super::Action::Replace`].
pub fn unknown_ack(frame: &[u8]) -> Vec<u8> {
    let channel = frame
        .get(1..3)
        .map_or(0, |bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
    let mut arguments = 999_999_u64.to_be_bytes().to_vec();
    arguments.push(0); // not multiple
    method_frame(channel, Method::BASIC_ACK, &arguments)
}

fn close_arguments(code: u16, text: &str) -> Vec<u8> {
    let mut arguments = code.to_be_bytes().to_vec();
    arguments.extend(short_string(text));
    arguments.extend([0; 4]); // no method is to blame
    arguments
}

fn short_string(text: &str) -> Vec<u8> {
    let bytes = &text.as_bytes()[..text.len().min(255)];
    let mut string = vec![bytes.len() as u8];
    string.extend(bytes);
    string
}
