//! The only part that knows lapin: addresses, connections, deliveries and how they are settled.

pub mod address;
mod connect;
mod consumer;
mod errors;
mod message;
mod nodes;
mod observed;
mod publisher;
mod resolve;
mod settle;
mod tap;
mod tls;
mod topology;
mod transport;

pub use connect::{Broker, ConnectOptions, OpenConnection};
pub use consumer::{Consumer, ConsumerOptions, Depth};
pub use errors::{ConnectError, DeliveryLost, unreadable};
pub use message::Message;
pub use nodes::{Nodes, Source, TlsOptions};
pub use publisher::{
    Answer, Heard, Properties, PublishError, Publisher, QueueType, Route, declare,
};
pub use settle::Unconfirmed;
pub use tls::Tls;
pub use topology::{Declare, Topology};
