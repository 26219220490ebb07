//! The queue and the bindings that are declared before a subscription.

use super::{
    errors::{Asked, ConnectError, Meaning},
    reach::connection::OpenConnection,
};
use lapin::{
    options::{QueueBindOptions, QueueDeclareOptions},
    types::FieldTable,
};

/// The queue and the bindings to declare before subscribing.
#[derive(Clone, Debug, Default)]
pub struct Topology {
    /// Which queue to declare.
    pub declare: Declare,
    /// The exchange to bind it to.
    pub exchange: Option<String>,
    /// The routing keys of the bindings.
    pub routing_keys: Vec<String>,
}

/// Which queue to declare.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Declare {
    /// None: it must exist.
    #[default]
    No,
    /// A durable queue. It is created if it doesn't exist; an existing one is used as it is. Not a transient one:
    /// RabbitMQ 4.3 refuses those unless they are exclusive.
    Durable,
    /// An exclusive queue, which is deleted with the connection.
    Exclusive,
}

/// How to subscribe. The refusal of an earlier attempt may have changed it.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) durable: DeclareDurable,
    pub(super) ack_timeout: bool,
}

impl Default for Request {
    fn default() -> Self {
        Self { durable: DeclareDurable::Passively, ack_timeout: true }
    }
}

/// How to declare a durable queue. A refusal costs the connection, so each step is an attempt of its own.
#[derive(Debug)]
pub(super) enum DeclareDurable {
    /// First, check that it exists: with any properties, and without the permission to configure it.
    Passively,
    /// It doesn't exist: create it.
    Create,
    /// The creation was refused with this error: check again, as somebody may have created it with other properties
    /// meanwhile.
    PassivelyAgain(ConnectError),
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
    /// Declares the queue and binds it. Returns its name, which the broker chooses if `queue` is empty.
    pub(super) async fn set_up(
        &self,
        connection: &OpenConnection,
        queue: &str,
        request: Request,
    ) -> Result<String, NotSubscribed> {
        let Request { durable, ack_timeout } = request;
        let creates = matches!(durable, DeclareDurable::Create);
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
            let durable = match durable {
                DeclareDurable::Passively if meaning == Some(Meaning::Missing) && self.declare == Declare::Durable => {
                    DeclareDurable::Create
                }
                DeclareDurable::Create if meaning == Some(Meaning::Precondition) => {
                    DeclareDurable::PassivelyAgain(refused())
                }
                DeclareDurable::PassivelyAgain(refusal) if meaning == Some(Meaning::Missing) => return refusal.into(),
                _ => return refused().into(),
            };
            NotSubscribed::RetryWith(Request { durable, ack_timeout })
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

/// Declares a queue on a channel of its own, because a refusal closes the channel. Returns the queue's name.
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
