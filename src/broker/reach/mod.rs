//! Reaching the broker: addresses, names, TLS, the connection, and what the broker sends on it.

pub mod address;
pub(super) mod connect;
pub(super) mod connection;
pub(super) mod credentials;
mod file;
pub(super) mod nodes;
pub(super) mod observed;
mod resolve;
pub(super) mod tap;
pub(super) mod tls;
pub(super) mod tls_errors;
pub(super) mod token;
mod transport;
pub(super) mod tries;
