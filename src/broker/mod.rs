//! The only part that uses lapin. `reach` connects, `consume` takes and settles messages, `publish` publishes them.

mod consume;
mod errors;
#[cfg(fuzzing)]
#[path = "../../tests/fuzz/harness.rs"]
pub mod fuzzing;
mod publish;
pub mod reach;
mod topology;

pub use consume::{consumer::Consumer, message::Message, subscription::ConsumerOptions};
pub use errors::{ConnectError, DeliveryLost};
pub use publish::{
    confirms::{Confirms, NotQueued},
    options::{Properties, Route},
    publisher::{Body, Publisher},
};
pub use reach::{
    connect::{ConnectOptions, Connector},
    connection::OpenConnection,
    nodes::{Nodes, SecretFile},
    tls::TlsOptions,
};
pub use topology::{Declare, Topology};
