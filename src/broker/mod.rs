//! The only part that knows lapin: addresses, connections, deliveries and how they are settled.

pub mod address;
mod connect;
mod consumer;
mod frames;
mod incoming;
mod message;
mod one_cpu;
mod outgoing;
mod publisher;
mod resolve;
mod settle;
mod setup;
mod tls;
mod transport;
mod trouble;

pub use connect::{Broker, ConnectOptions, Link};
pub use consumer::{ConsumeOptions, Consumer, Depth};
pub use message::Message;
pub use publisher::{
    Answer, Heard, Properties, Publisher, QueueType, Route, Stop, declare, goodbye,
};
pub use settle::Unconfirmed;
pub use setup::{Declare, Setup};
pub use tls::Tls;
pub use trouble::{Loss, Trouble};
