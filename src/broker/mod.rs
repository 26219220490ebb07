//! The only part that knows lapin: addresses, connections, deliveries and how they are settled.

pub mod address;
mod connect;
mod consumer;
mod errors;
mod frames;
mod incoming;
mod message;
mod nodes;
mod one_cpu;
mod outgoing;
mod publisher;
mod resolve;
mod settle;
mod tls;
mod topology;
mod transport;

pub use connect::{Broker, ConnectOptions, Link};
pub use consumer::{ConsumeOptions, Consumer, Depth};
pub use errors::{ConnectError, DeliveryLost};
pub use message::Message;
pub use nodes::{Nodes, Source, TlsOptions};
pub use publisher::{
    Answer, Heard, Properties, PublishError, Publisher, QueueType, Route, declare, goodbye,
};
pub use settle::Unconfirmed;
pub use tls::Tls;
pub use topology::{Declare, Topology};
