//! What is declared and bound before a subscription.

use super::{
    errors::{Asked, ConnectError, Meaning},
    reach::connection::OpenConnection,
};
use lapin::{
    options::{QueueBindOptions, QueueDeclareOptions},
    types::FieldTable,
};

/// What is to be there before the subscription.
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

/// What the broker is asked for, which the refusals of earlier attempts may have changed.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) create: Create,
    pub(super) ack_timeout: bool,
}

impl Default for Request {
    fn default() -> Self {
        Self { create: Create::IfMissing, ack_timeout: true }
    }
}

/// How a durable queue is declared. A refusal costs the connection, so each of these is an attempt of its own.
#[derive(Debug)]
pub(super) enum Create {
    /// Passively: a queue that is there may have any properties, and needs no permission to configure it.
    IfMissing,
    /// It isn't there.
    Now,
    /// Passively once more, as its creation was refused like this: somebody may have created it with other properties in between.
    Refused(ConnectError),
}

/// Why there is no subscription.
#[derive(Debug)]
pub(super) enum NotSubscribed {
    /// Try again at once, with this request.
    RetryWith(Request),
    Failed(ConnectError),
}

impl From<ConnectError> for NotSubscribed {
    fn from(error: ConnectError) -> Self {
        Self::Failed(error)
    }
}

impl Topology {
    /// Declares and binds, and returns the queue's name, which the broker chooses if `queue` is empty.
    pub(super) async fn set_up(
        &self,
        connection: &OpenConnection,
        queue: &str,
        request: Request,
    ) -> Result<String, NotSubscribed> {
        let Request { create, ack_timeout } = request;
        let creates = matches!(create, Create::Now);
        let declared = match self.declare {
            Declare::No => Ok(queue.to_owned()),
            kind => {
                let options = QueueDeclareOptions {
                    passive: kind == Declare::Durable && !creates,
                    durable: kind == Declare::Durable,
                    exclusive: kind == Declare::Exclusive,
                    ..QueueDeclareOptions::default()
                };
                declare(connection, queue, options, FieldTable::default()).await
            }
        };
        let name = declared.map_err(|error| {
            let meaning = connection.meaning(&error);
            let refused = || ConnectError::refused(&error, connection, Asked::Queue { action: "declare", queue });
            let create = match create {
                Create::IfMissing if meaning == Some(Meaning::Missing) && self.declare == Declare::Durable => {
                    Create::Now
                }
                Create::Now if meaning == Some(Meaning::Precondition) => Create::Refused(refused()),
                Create::Refused(refusal) if meaning == Some(Meaning::Missing) => return refusal.into(),
                _ => return refused().into(),
            };
            NotSubscribed::RetryWith(Request { create, ack_timeout })
        })?;
        if creates {
            tracing::info!("declared queue {queue:?}, which was not there");
        }
        if let Some(exchange) = &self.exchange {
            let bound = self.bind(connection, &name, exchange).await;
            bound.map_err(|error| {
                let action = format!("bind to exchange {exchange:?}");
                ConnectError::refused(&error, connection, Asked::Queue { action: &action, queue: &name })
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
