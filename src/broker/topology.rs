//! What is declared and bound before a subscription.

use super::{
    errors::{Asked, ConnectError, Meaning},
    reach::connection::OpenConnection,
};
use lapin::{
    options::{QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::FieldTable,
};

#[derive(Clone, Debug, Default)]
pub struct Topology {
    pub declare: Declare,
    /// The exchange to bind the queue to, with each of the routing keys.
    pub exchange: Option<String>,
    pub routing_keys: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Declare {
    #[default]
    No,
    /// A durable one, unless there is one of this name. RabbitMQ 4.3 refuses shared transient ones.
    Durable,
    /// It is deleted with the connection.
    Exclusive,
}

/// How the next try declares and subscribes.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) step: DeclareStep,
    pub(super) asks_for_ack_timeout: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self { step: DeclareStep::Passive, asks_for_ack_timeout: true }
    }
}

/// How a durable queue is declared. A refusal costs the connection, so each step is a try of its own.
#[derive(Debug)]
pub(super) enum DeclareStep {
    /// First passively: the queue may exist with any properties, and this needs no permission to configure it.
    Passive,
    Create,
    /// Another client may have created it meanwhile, with other properties.
    PassiveAgain {
        why_not_created: ConnectError,
    },
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
        let name = match self.declare {
            Declare::No => queue.to_owned(),
            Declare::Durable => declare_durable(connection, queue, plan).await?,
            Declare::Exclusive => declare_exclusive(connection, queue).await?,
        };
        if let Some(exchange) = &self.exchange {
            let bound = self.bind(connection, &name, exchange).await;
            let asked = Asked::Bind { queue: &name, exchange };
            bound.map_err(|error| ConnectError::after_handshake(&error, connection, asked))?;
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

async fn declare_durable(connection: &OpenConnection, queue: &str, plan: Plan) -> Result<String, NotSubscribed> {
    let creates = matches!(plan.step, DeclareStep::Create);
    let options = QueueDeclareOptions { passive: !creates, durable: true, ..QueueDeclareOptions::default() };
    let refused = match declare(connection, queue, options).await {
        Ok(declared) => {
            if creates {
                tracing::info!("declared queue {queue:?}, which was not there");
            }
            return Ok(declared.name().to_string());
        }
        Err(refused) => refused,
    };
    let meaning = connection.meaning(&refused);
    let error = ConnectError::after_handshake(&refused, connection, Asked::Queue { action: "declare", queue });
    let step = match (plan.step, meaning) {
        (DeclareStep::Passive, Some(Meaning::Missing)) => DeclareStep::Create,
        (DeclareStep::Create, Some(Meaning::Precondition)) => DeclareStep::PassiveAgain { why_not_created: error },
        // No other client has created it: the reason why we can't says more than that it doesn't exist.
        (DeclareStep::PassiveAgain { why_not_created }, Some(Meaning::Missing)) => return Err(why_not_created.into()),
        _ => return Err(error.into()),
    };
    Err(NotSubscribed::RetryWith(Plan { step, ..plan }))
}

async fn declare_exclusive(connection: &mut OpenConnection, queue: &str) -> Result<String, ConnectError> {
    let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
    let declared = declare(connection, queue, options).await.map_err(|error| {
        ConnectError::after_handshake(&error, connection, Asked::Queue { action: "declare", queue })
    })?;
    let name = declared.name().to_string();
    // A proxy may keep its connection to the broker open, and the queue with it. So we delete the queue before we
    // close, unless it has messages or a consumer: then another client had it first.
    let is_unused = (declared.message_count(), declared.consumer_count()) == (0, 0);
    if is_unused && connection.observed().is_another_product {
        // If we have chosen the name, another client may have come since: its messages stay.
        let if_empty = !queue.is_empty();
        let options = QueueDeleteOptions { if_unused: true, if_empty, ..QueueDeleteOptions::default() };
        connection.exclusive_queue = Some((name.clone(), options));
    }
    Ok(name)
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
