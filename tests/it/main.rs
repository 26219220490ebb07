//! Tests the binaries against a real RabbitMQ. All tests are in one program, so that they share one broker.

mod common;

mod addresses;
mod cluster;
mod compat;
mod delivery;
mod docs;
mod environment;
mod help;
mod hostile;
mod main_job;
mod other_brokers;
mod pid1;
mod publish;
mod report;
mod signals;
mod tls;
mod tokens;
mod unread;
