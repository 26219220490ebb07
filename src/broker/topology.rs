//! What is declared and bound before a consumer is registered, and the declaration that qpublish shares.

use super::{
    connection::OpenConnection,
    errors::{ConnectError, Meaning, Refusal},
};
use lapin::{
    Connection,
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
    /// A durable one, if it isn't there, as it is otherwise: RabbitMQ 4.3 refuses transient ones that are shared.
    Durable,
    /// One of the connection's own.
    Exclusive,
}

/// Why a topology isn't there yet.
pub(super) enum Incomplete {
    /// A passive declare says that there is no such queue: it is to be created.
    NotThere,
    /// It was created with other properties in between: that one is good.
    Raced,
    Failed(ConnectError),
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
        create: bool,
    ) -> Result<String, Incomplete> {
        let options = match self.declare {
            Declare::No => None,
            Declare::Durable => Some(QueueDeclareOptions {
                passive: !create,
                durable: true,
                ..QueueDeclareOptions::default()
            }),
            Declare::Exclusive => Some(QueueDeclareOptions {
                exclusive: true,
                ..QueueDeclareOptions::default()
            }),
        };
        let name = match options {
            None => queue.to_owned(),
            Some(options) => {
                match declare(
                    connection.connection(),
                    queue,
                    options,
                    FieldTable::default(),
                )
                .await
                {
                    Ok(name) => name,
                    Err(error) => {
                        let refusal = Refusal::of(&error, &connection.observed());
                        return Err(match refusal.map(|refusal| refusal.meaning()) {
                            Some(Meaning::Missing) if options.passive => Incomplete::NotThere,
                            Some(Meaning::Precondition) if create => Incomplete::Raced,
                            _ => Incomplete::Failed(ConnectError::refused(
                                &error, connection, "declare", queue,
                            )),
                        });
                    }
                }
            }
        };
        if create {
            tracing::info!("declared queue {queue:?}, which was not there");
        }
        if let Some(exchange) = &self.exchange {
            let bound = self.bind(connection.connection(), &name, exchange).await;
            bound.map_err(|error| {
                let action = format!("bind to exchange {exchange:?}");
                Incomplete::Failed(ConnectError::refused(&error, connection, &action, &name))
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

/// Declares a queue on a channel of its own, as a refusal ends that; returns the queue's name.
pub(super) async fn declare(
    connection: &Connection,
    queue: &str,
    options: QueueDeclareOptions,
    arguments: FieldTable,
) -> lapin::Result<String> {
    let channel = connection.create_channel().await?;
    let declared = channel
        .queue_declare(queue.into(), options, arguments)
        .await?;
    channel.close(200, "OK".into()).await?;
    Ok(declared.name().to_string())
}
