//! What is declared and bound before a consumer is registered, and the declaration that qpublish shares.

use super::{
    connection::OpenConnection,
    errors::{ConnectError, Meaning},
    refused::Asked,
};
use lapin::{
    options::{QueueBindOptions, QueueDeclareOptions},
    types::FieldTable,
};

/// What is to be there before the consumer is registered.
#[derive(Clone, Debug, Default)]
pub struct Topology {
    /// The queue.
    pub declare: Declare,
    /// The exchange to bind it to.
    pub exchange: Option<String>,
    /// With these keys.
    pub routing_keys: Vec<String>,
}

/// Which queue is declared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Declare {
    /// None: it has to be there.
    #[default]
    No,
    /// A durable one, created if it isn't there; one that is there is used as it is. RabbitMQ 4.3 refuses shared transient ones.
    Durable,
    /// One of the connection's own.
    Exclusive,
}

/// What is asked of the broker, which the refusals of earlier attempts may have changed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask {
    /// To create the queue, as it isn't there.
    pub(super) create: bool,
    pub(super) ack_timeout: bool,
}

/// Why a consumer isn't registered.
#[derive(Debug)]
pub(super) enum NotRegistered {
    /// Try again at once, with this request.
    RetryWith(Ask),
    Failed(ConnectError),
}

impl From<ConnectError> for NotRegistered {
    fn from(error: ConnectError) -> Self {
        Self::Failed(error)
    }
}

impl Topology {
    /// Declares and binds, and returns the queue's name, which the broker chooses where `queue` is empty.
    ///
    /// A durable queue is declared passively first: one that is there may have any properties, and needs no permission
    /// to configure it. Only with `create` it is declared in earnest.
    pub(super) async fn set_up(
        &self,
        connection: &OpenConnection,
        queue: &str,
        ask: Ask,
    ) -> Result<String, NotRegistered> {
        let declared = match self.declare {
            Declare::No => Ok(queue.to_owned()),
            kind => {
                let options = QueueDeclareOptions {
                    passive: kind == Declare::Durable && !ask.create,
                    durable: kind == Declare::Durable,
                    exclusive: kind == Declare::Exclusive,
                    ..QueueDeclareOptions::default()
                };
                declare(connection, queue, options, FieldTable::default()).await
            }
        };
        let name = declared.map_err(|error| {
            let create = match connection.meaning(&error) {
                Some(Meaning::Missing) if self.declare == Declare::Durable && !ask.create => true,
                // It was created with other properties in between: that one is good.
                Some(Meaning::Precondition) if ask.create => false,
                _ => {
                    let asked = Asked::Queue("declare", queue);
                    return ConnectError::refused(&error, connection, asked).into();
                }
            };
            NotRegistered::RetryWith(Ask { create, ..ask })
        })?;
        if ask.create {
            tracing::info!("declared queue {queue:?}, which was not there");
        }
        if let Some(exchange) = &self.exchange {
            let bound = self.bind(connection, &name, exchange).await;
            bound.map_err(|error| {
                let action = format!("bind to exchange {exchange:?}");
                ConnectError::refused(&error, connection, Asked::Queue(&action, &name))
            })?;
        }
        Ok(name)
    }

    async fn bind(&self, connection: &OpenConnection, queue: &str, exchange: &str) -> lapin::Result<()> {
        let channel = connection.lapin.create_channel().await?;
        for key in &self.routing_keys {
            let key = key.as_str().into();
            let (options, arguments) = (QueueBindOptions::default(), FieldTable::default());
            channel.queue_bind(queue.into(), exchange.into(), key, options, arguments).await?;
        }
        channel.close(200, "OK".into()).await
    }
}

/// Declares a queue on a channel of its own, as a refusal ends that; returns the queue's name.
pub(super) async fn declare(
    connection: &OpenConnection,
    queue: &str,
    options: QueueDeclareOptions,
    arguments: FieldTable,
) -> lapin::Result<String> {
    let channel = connection.lapin.create_channel().await?;
    let declared = channel.queue_declare(queue.into(), options, arguments).await?;
    channel.close(200, "OK".into()).await?;
    Ok(declared.name().to_string())
}
