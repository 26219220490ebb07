//! The way to the broker: its addresses, names and TLS; the connection, and what the broker says on it.

pub mod address;
pub(super) mod connect;
pub(super) mod connection;
pub(super) mod nodes;
pub(super) mod observed;
mod resolve;
pub(super) mod tap;
mod tls;
pub(super) mod tls_errors;
pub(super) mod token;
mod transport;
