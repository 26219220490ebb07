//! What is declared and bound before a subscription.

use super::{
    errors::{Asked, ConnectError, Meaning},
    reach::connection::OpenConnection,
};
use lapin::{
    options::{QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions},
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

/// Which queue is declared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Declare {
    /// None: it has to be there.
    #[default]
    No,
    /// A durable one, unless there is one of this name. RabbitMQ 4.3 refuses shared transient ones.
    Durable,
    /// An exclusive one, which is deleted with the connection.
    Exclusive,
}

/// How the next try declares and subscribes: a refusal may change that.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) step: DeclareStep,
    pub(super) ack_timeout: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self { step: DeclareStep::Passive, ack_timeout: true }
    }
}

/// How a durable queue is declared. A refusal costs the connection, so each step is a try of its own.
#[derive(Debug)]
pub(super) enum DeclareStep {
    /// First passively: the queue may exist with any properties, and this needs no permission to configure it.
    Passive,
    Create,
    /// Creating it was refused with this error: somebody else may have created it meanwhile, with other properties.
    PassiveAgain(ConnectError),
}

#[derive(Debug)]
pub(super) enum NotSubscribed {
    RetryWith(Plan),
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
        connection: &mut OpenConnection,
        queue: &str,
        plan: Plan,
    ) -> Result<String, NotSubscribed> {
        let Plan { step, ack_timeout } = plan;
        let creates = matches!(step, DeclareStep::Create);
        let declared = match self.declare {
            Declare::No => Ok(None),
            kind => {
                let options = QueueDeclareOptions {
                    passive: kind == Declare::Durable && !creates,
                    durable: kind == Declare::Durable,
                    exclusive: kind == Declare::Exclusive,
                    ..QueueDeclareOptions::default()
                };
                declare(connection, queue, options).await.map(Some)
            }
        };
        let declared = declared.map_err(|error| {
            let meaning = connection.meaning(&error);
            let refused =
                || ConnectError::after_handshake(&error, connection, Asked::Queue { action: "declare", queue });
            let step = match (step, meaning) {
                (DeclareStep::Passive, Some(Meaning::Missing)) if self.declare == Declare::Durable => {
                    DeclareStep::Create
                }
                (DeclareStep::Create, Some(Meaning::Precondition)) => DeclareStep::PassiveAgain(refused()),
                // Nobody else has created it. The reason why we can't says more than that it doesn't exist.
                (DeclareStep::PassiveAgain(refusal), Some(Meaning::Missing)) => return refusal.into(),
                _ => return refused().into(),
            };
            NotSubscribed::RetryWith(Plan { step, ack_timeout })
        })?;
        let name = declared.as_ref().map_or(queue, |queue| queue.name().as_str()).to_owned();
        // A proxy may keep its connection to the broker open, and the queue with it. So we delete the queue before we
        // close, unless it has messages or a consumer: then another client had it first.
        let unused = declared.filter(|queue| (queue.message_count(), queue.consumer_count()) == (0, 0));
        if self.declare == Declare::Exclusive && unused.is_some() && connection.observed().is_another_product {
            // If the name isn't the broker's choice, another client may have come since: its messages stay.
            let if_empty = !queue.is_empty();
            let options = QueueDeleteOptions { if_unused: true, if_empty, ..QueueDeleteOptions::default() };
            connection.exclusive_queue = Some((name.clone(), options));
        }
        if creates {
            tracing::info!("declared queue {queue:?}, which was not there");
        }
        if let Some(exchange) = &self.exchange {
            let bound = self.bind(connection, &name, exchange).await;
            bound.map_err(|error| {
                ConnectError::after_handshake(&error, connection, Asked::Bind { queue: &name, exchange })
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

/// Declares a queue on a channel of its own, because a refusal closes the channel.
async fn declare(
    connection: &OpenConnection,
    queue: &str,
    options: QueueDeclareOptions,
) -> lapin::Result<lapin::Queue> {
    let channel = connection.lapin.create_channel().await?;
    let declared = channel.queue_declare(queue.into(), options, FieldTable::default()).await?;
    channel.close(200, "OK".into()).await?;
    Ok(declared)
}
