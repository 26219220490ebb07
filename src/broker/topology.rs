//! What is made before a consumer is registered, for those who ask for it: a queue and its bindings.

use super::errors::{ConnectError, protocol};
use lapin::{
    Connection,
    options::{QueueBindOptions, QueueDeclareOptions},
    protocol::{AMQPErrorKind, AMQPSoftError},
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
    /// A durable one, if it isn't there, as it is otherwise: RabbitMQ 4.3 refuses transient ones that are shared.
    Durable,
    /// One of the connection's own.
    Exclusive,
}

impl Topology {
    /// Makes it, and returns the queue's name, which the broker chooses where `queue` is empty.
    pub(super) async fn make(
        &self,
        connection: &Connection,
        queue: &str,
    ) -> Result<String, ConnectError> {
        let name = match self.declare {
            Declare::No => queue.to_owned(),
            Declare::Durable => durable(connection, queue).await?,
            Declare::Exclusive => {
                let options = QueueDeclareOptions {
                    exclusive: true,
                    ..QueueDeclareOptions::default()
                };
                declare(connection, queue, options)
                    .await
                    .map_err(|error| ConnectError::in_setup(&error, "declare", queue))?
            }
        };
        if let Some(exchange) = &self.exchange {
            self.bind(connection, &name, exchange)
                .await
                .map_err(|error| {
                    ConnectError::in_setup(&error, &format!("bind to exchange {exchange:?}"), &name)
                })?;
        }
        Ok(name)
    }

    async fn bind(
        &self,
        connection: &Connection,
        queue: &str,
        exchange: &str,
    ) -> lapin::Result<()> {
        let channel = connection.create_channel().await?;
        for key in &self.routing_keys {
            channel
                .queue_bind(
                    queue.into(),
                    exchange.into(),
                    key.as_str().into(),
                    QueueBindOptions::default(),
                    FieldTable::default(),
                )
                .await?;
        }
        channel.close(200, "OK".into()).await
    }
}

/// Passively first: a queue that is there may have any properties, and need no permission to configure it.
async fn durable(connection: &Connection, queue: &str) -> Result<String, ConnectError> {
    let passive = QueueDeclareOptions {
        passive: true,
        ..QueueDeclareOptions::default()
    };
    let error = match declare(connection, queue, passive).await {
        Ok(name) => return Ok(name),
        Err(error) => error,
    };
    match protocol(&error) {
        Some((AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND), text)) if text.contains("no queue") => {
        }
        _ => return Err(ConnectError::in_consume(&error, queue)),
    }
    let options = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    match declare(connection, queue, options).await {
        Ok(name) => {
            tracing::info!("declared queue {queue:?}, which was not there");
            Ok(name)
        }
        Err(error) => match protocol(&error) {
            // Somebody else has declared it in between, with other properties: that one is good.
            Some((AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED), _)) => {
                Ok(queue.to_owned())
            }
            _ => Err(ConnectError::in_setup(&error, "declare", queue)),
        },
    }
}

async fn declare(
    connection: &Connection,
    queue: &str,
    options: QueueDeclareOptions,
) -> lapin::Result<String> {
    let channel = connection.create_channel().await?;
    let declared = channel
        .queue_declare(queue.into(), options, FieldTable::default())
        .await?;
    channel.close(200, "OK".into()).await?;
    Ok(declared.name().to_string())
}
