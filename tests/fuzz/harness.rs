//! Takes what a broker sends from the frame on the wire to what qconsume makes of it. src/broker/mod.rs includes this file
//! if `--cfg fuzzing` is set.

use super::{
    consume::message::Message,
    errors::{Asked, ConnectError},
    reach::{
        address::Address,
        credentials::Credentials,
        observed::Observed,
        tap::{FRAME_MAX, Tap},
    },
};
use lapin::{
    ConnectionState, ErrorKind,
    message::Delivery,
    protocol::{AMQPClass, basic, parse_class},
};
use std::{
    io,
    num::NonZeroUsize,
    sync::{Arc, Mutex},
};

/// A `basic.deliver`, and the content header behind it. Names have 255 bytes at most.
#[derive(Clone, Copy, Debug)]
pub struct Delivered<'a> {
    /// Where the message was published to.
    pub exchange: &'a [u8],
    /// How it was routed.
    pub routing_key: &'a [u8],
    /// Whether it was delivered before.
    pub redelivered: bool,
    /// The properties as they stand in the content header, their flags first.
    pub properties: &'a [u8],
}

/// The message from `queue` that arrives in pieces of `piece` bytes.
///
/// # Errors
/// When the tap doesn't let it through.
pub fn message(delivered: Delivered<'_>, piece: NonZeroUsize, queue: &str) -> io::Result<Message> {
    let mut deliver = vec![0, 60, 0, 60];
    put_short(&mut deliver, b"consumer");
    deliver.extend(1_u64.to_be_bytes());
    deliver.push(delivered.redelivered.into());
    put_short(&mut deliver, delivered.exchange);
    put_short(&mut deliver, delivered.routing_key);
    let header = [&[0, 60, 0, 0], &0_u64.to_be_bytes()[..], delivered.properties].concat();
    observe(&[frame(1, &deliver), frame(2, &header)].concat(), piece)?;

    // What the tap lets through, lapin reads.
    let (_, properties) = basic::parse_properties(delivered.properties).expect("the tap has read it");
    let Ok((_, AMQPClass::Basic(basic::AMQPMethod::Deliver(method)))) = parse_class(&deliver[..]) else {
        panic!("the tap lets an unreadable basic.deliver through");
    };
    let (exchange, key) = (method.exchange, method.routing_key);
    let mut delivery = Delivery::mock(1, exchange, key, method.redelivered, Vec::new());
    delivery.properties = properties;
    Ok(Message::new(delivery, queue, None))
}

/// What the broker was asked for when it refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "see `Asked`")]
pub enum Request {
    Login,
    Consume,
    Declare,
    Publish,
}

/// What a refusal leads to: of a login of `address`, or of something with the queue or exchange `name`. It is none where
/// the text, 255 bytes at most, can't be read.
pub fn answer(request: Request, address: &Address, name: &str, code: u16, text: &[u8]) -> Option<ConnectError> {
    // A connection.close or a channel.close: reply code, reply text, and the method to blame.
    let mut close = match request {
        Request::Login => vec![0, 10, 0, 50],
        _ => vec![0, 20, 0, 40],
    };
    close.extend(code.to_be_bytes());
    put_short(&mut close, text);
    close.extend([0; 4]);
    let observed = observe(&frame(1, &close), NonZeroUsize::MAX).ok()?;
    // As lapin has it: it can't read the close, or says of a code that it doesn't know only that all is closed now.
    let error = match parse_class(&close[..]) {
        Err(error) => ErrorKind::ParsingError(error),
        Ok(_) => ErrorKind::InvalidConnectionState(ConnectionState::Closed),
    };
    let observed = observed.lock().expect("nobody panics with it");
    let refusal = observed.refusal(&error.into())?;
    let asked = match request {
        Request::Login => Asked::Login(address),
        Request::Consume => Asked::Queue { action: "consume from", queue: name },
        Request::Declare => Asked::Declare(name),
        Request::Publish => Asked::Publish(name),
    };
    let credentials =
        Credentials { user: &address.username, virtual_host: &address.virtual_host, token: None, file: None };
    Some(ConnectError::from_refusal(asked, &refusal, credentials))
}

fn observe(bytes: &[u8], piece: NonZeroUsize) -> io::Result<Arc<Mutex<Observed>>> {
    let observed = Arc::default();
    let mut tap = Tap::new(FRAME_MAX, Arc::clone(&observed));
    for piece in bytes.chunks(piece.get()) {
        tap.observe(piece)?;
    }
    Ok(observed)
}

/// A frame on channel 1 (AMQP 0-9-1, 2.3.5).
fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).expect("it is small");
    [&[kind, 0, 1], &size.to_be_bytes()[..], payload, &[0xCE]].concat()
}

/// A short string.
fn put_short(bytes: &mut Vec<u8>, text: &[u8]) {
    bytes.push(u8::try_from(text.len()).expect("255 bytes at most"));
    bytes.extend(text);
}
