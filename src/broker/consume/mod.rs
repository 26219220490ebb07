//! Taking messages: the subscription, the message, and how it is settled.

pub(super) mod consumer;
pub(super) mod message;
mod settle;
pub(super) mod subscription;
