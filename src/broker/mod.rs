//! The only part that knows lapin: addresses, connections, deliveries and how they are settled.

pub mod address;
mod connect;
mod connection;
mod consumer;
mod errors;
#[cfg(fuzzing)]
pub mod fuzzing;
mod lost;
mod message;
mod nodes;
mod observed;
mod properties;
mod publisher;
mod refused;
mod resolve;
mod settle;
mod subscription;
mod tap;
mod tls;
mod tls_errors;
mod token;
mod topology;
mod transport;

pub use connect::{Broker, ConnectOptions};
pub use connection::OpenConnection;
pub use consumer::Consumer;
pub use errors::ConnectError;
pub use lost::DeliveryLost;
pub use message::Message;
pub use nodes::{Nodes, SecretFile, TlsOptions};
pub use properties::{Properties, Route};
pub use publisher::{Gap, Messages, Publisher, Tally};
pub use subscription::ConsumerOptions;
pub use topology::{Declare, Topology};
