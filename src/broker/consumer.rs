//! One delivery at a time, and whether this connection still owns it.

use super::{
    connect::{Attempts, Broker},
    connection::OpenConnection,
    errors::{ConnectError, described},
    lost::DeliveryLost,
    message::Message,
    registration::{ConsumerOptions, Registration},
    topology::{Ask, Declare, NotRegistered},
};
use crate::{
    exit::{Exit, Failure},
    report::with_reminders,
};
use lapin::{
    message::Delivery,
    options::QueueDeclareOptions,
    types::{DeliveryTag, FieldTable},
};
use std::{mem, time::Duration};
use tokio::{
    task::JoinHandle,
    time::{Instant, timeout, timeout_at},
};

/// Longest time that releasing messages may take when nothing answers. What isn't released by then is requeued when the
/// connection ends.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

/// Takes messages from one queue, one after the other, over as many connections as it needs.
pub struct Consumer {
    broker: Broker,
    options: ConsumerOptions,
    /// What the queue is called, once it was consumed from.
    known_as: Option<String>,
    pub(super) state: State,
}

/// What the consumer is doing.
pub(super) enum State {
    /// Not registered. The connection of one that was cancelled may be left.
    Idle(Option<OpenConnection>),
    /// `basic.consume` is under way: kept, as the broker may deliver a message before its reply is here.
    Registering(JoinHandle<Result<Registration, (OpenConnection, NotRegistered)>>),
    /// Registered: the broker may deliver.
    Ready(Registration),
    /// A message was delivered and isn't settled.
    Holding(Registration, Held),
}

/// A delivery that isn't settled.
#[derive(Clone, Copy)]
pub(super) struct Held {
    pub(super) tag: DeliveryTag,
    pub(super) since: Instant,
}

impl Consumer {
    /// A consumer that isn't registered yet.
    #[must_use]
    pub fn new(broker: Broker, options: ConsumerOptions) -> Self {
        Self { broker, options, known_as: None, state: State::Idle(None) }
    }

    /// The queue's name; empty before the broker has chosen it.
    #[must_use]
    pub fn queue(&self) -> &str {
        self.known_as.as_deref().unwrap_or(&self.options.queue)
    }

    /// An exclusive queue is deleted with its connection: then the run ends.
    ///
    /// # Errors
    /// 69 when the queue was the lost connection's own.
    pub fn check_queue_survives(&self, why: &str) -> Result<(), Failure> {
        match &self.known_as {
            Some(queue) if self.options.topology.declare == Declare::Exclusive => Err(Failure::new(
                Exit::Unavailable,
                format!("queue {queue:?} is gone with its messages: it belonged to the lost connection ({why})"),
            )),
            _ => Ok(()),
        }
    }

    /// Whether the broker may deliver a message.
    #[must_use]
    pub fn is_registered(&self) -> bool {
        matches!(self.state, State::Ready(_))
    }

    /// Connects as often as it needs and registers the consumer, within `--connect-timeout`.
    ///
    /// Dropping the future loses no message: see [`Consumer::release`].
    ///
    /// # Errors
    /// The permanent failure, or when time is up the last transient one.
    pub async fn register(&mut self) -> Result<(), Failure> {
        let mut attempts = Attempts::new(self.broker.options.timeout);
        let mut ask = Ask { create: false, ack_timeout: true };
        let mut kept = match mem::replace(&mut self.state, State::Idle(None)) {
            State::Idle(kept) => kept.filter(OpenConnection::is_connected),
            _ => None,
        };
        if kept.is_none() {
            self.check_queue_survives("the connection was lost")?;
        }
        loop {
            // On a connection that is kept, what was declared for it is still there.
            let declared = kept.as_ref().and(self.known_as.clone());
            let opened = match kept.take() {
                Some(connection) => Ok(connection),
                None => self.broker.attempt(attempts.deadline).await,
            };
            let registered = match opened {
                Ok(connection) => self.ask(connection, ask, declared, attempts.deadline).await,
                Err(error) => Err(error.into()),
            };
            match registered {
                Ok(()) => return Ok(()),
                Err(NotRegistered::RetryWith(instead)) => ask = instead,
                Err(NotRegistered::Failed(error)) => {
                    self.check_queue_survives(&error.failure.message)?;
                    attempts.failed(error).await?;
                }
            }
        }
    }

    /// Asks the broker to register the consumer.
    async fn ask(
        &mut self,
        connection: OpenConnection,
        ask: Ask,
        declared: Option<String>,
        deadline: Instant,
    ) -> Result<(), NotRegistered> {
        const STAGE: &str = "waiting for the reply to basic.consume";
        let options = self.options.clone();
        let task = tokio::spawn(Registration::open(connection, options, ask, declared));
        self.state = State::Registering(task);
        match timeout_at(deadline, with_reminders(STAGE, self.registered())).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(why)) => {
                // A refusal ends its channel, and lapin tells of that again at some later time: the next attempt takes
                // a new connection.
                self.close().await;
                Err(why)
            }
            Err(_) => Err(ConnectError::no_answer(STAGE).into()),
        }
    }

    /// Waits for the registration that is under way. Dropping the future leaves it there. The connection of one that was
    /// refused is kept, to be closed.
    async fn registered(&mut self) -> Result<(), NotRegistered> {
        let State::Registering(task) = &mut self.state else {
            return Ok(());
        };
        let answer = task.await.expect("registering doesn't panic");
        let registration = match answer {
            Ok(registration) => registration,
            Err((connection, why)) => {
                self.state = State::Idle(Some(connection));
                return Err(why);
            }
        };
        if self.known_as.is_none() && self.options.queue.is_empty() {
            tracing::info!("server provided queue name: {}", registration.queue);
        }
        self.known_as = Some(registration.queue.clone());
        self.state = State::Ready(registration);
        Ok(())
    }

    /// The next message. Dropping the future loses none.
    ///
    /// # Errors
    /// Why the consumer is no longer registered; nothing was taken.
    pub async fn next(&mut self) -> Result<Message, DeliveryLost> {
        match self.registration().step().await {
            Ok(delivery) => Ok(self.hold(delivery)),
            Err(lost) => Err(self.end(lost).await),
        }
    }

    /// Waits until the message that is held is lost.
    pub async fn lost(&mut self) -> DeliveryLost {
        match self.registration().step().await {
            Err(lost) => lost,
            Ok(_) => DeliveryLost::delivered_again(),
        }
    }

    /// How many messages are ready, by a passive declare; `None` where the broker knows of no consumer, though there is one
    /// here: its figures come from no queue that answers.
    ///
    /// # Errors
    /// Why the consumer is no longer registered.
    pub async fn depth(&mut self) -> Result<Option<u32>, DeliveryLost> {
        let registration = self.registration();
        let queue = registration.queue.as_str().into();
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let declare = registration.channel.queue_declare(queue, passive, FieldTable::default());
        match declare.await {
            Ok(declared) => Ok((declared.consumer_count() > 0).then(|| declared.message_count())),
            Err(error) => {
                let lost = registration.delivery_lost(&error);
                Err(self.end(lost).await)
            }
        }
    }

    /// Cancels the consumer; a message that came before the reply is still taken. A queue that doesn't answer within two
    /// seconds delivers nothing.
    ///
    /// # Errors
    /// Why the consumer was no longer registered; nothing was taken.
    pub async fn cancel(&mut self) -> Result<Option<Message>, DeliveryLost> {
        match timeout(RELEASE_TIMEOUT, self.registration().cancel()).await {
            Ok(Ok(Some(delivery))) => Ok(Some(self.hold(delivery))),
            Ok(Ok(None)) => {
                self.idle();
                Ok(None)
            }
            Ok(Err(lost)) => Err(self.end(lost).await),
            Err(_) => Ok(None),
        }
    }

    /// Releases whatever may have arrived, before an end without a command; takes two seconds at most.
    pub async fn release(&mut self) {
        let work = async {
            let _ = self.registered().await;
            match &mut self.state {
                State::Ready(registration) => registration.release(None).await,
                State::Holding(registration, held) => registration.release(Some(held.tag)).await,
                State::Idle(_) | State::Registering(_) => Ok(()),
            }
        };
        match timeout(RELEASE_TIMEOUT, work).await {
            Ok(released) => {
                if let Err(error) = released {
                    tracing::debug!("releasing: {}", described(&error));
                }
                self.idle();
            }
            Err(_) => {
                tracing::debug!("releasing: no answer within {RELEASE_TIMEOUT:?}");
                // Who doesn't answer isn't asked to close either.
                self.state = State::Idle(None);
            }
        }
    }

    /// Closes the connection politely, within two seconds.
    pub async fn close(&mut self) {
        self.idle();
        if let State::Idle(Some(connection)) = mem::replace(&mut self.state, State::Idle(None)) {
            connection.close().await;
        }
    }

    /// Ends the registration, if there is one, and keeps its connection.
    pub(super) fn idle(&mut self) {
        self.state = State::Idle(match mem::replace(&mut self.state, State::Idle(None)) {
            State::Idle(connection) => connection,
            State::Registering(task) => {
                task.abort();
                None
            }
            State::Ready(registration) | State::Holding(registration, _) => Some(registration.end()),
        });
    }

    /// Ends a registration that was lost. Its connection may be good; another attempt takes a new one.
    async fn end(&mut self, lost: DeliveryLost) -> DeliveryLost {
        self.close().await;
        lost
    }

    fn hold(&mut self, delivery: Delivery) -> Message {
        let held = Held { tag: delivery.delivery_tag, since: Instant::now() };
        self.state = match mem::replace(&mut self.state, State::Idle(None)) {
            State::Ready(registration) => State::Holding(registration, held),
            other => other,
        };
        Message::new(delivery, self.queue())
    }

    pub(super) fn registration(&mut self) -> &mut Registration {
        match &mut self.state {
            State::Ready(registration) | State::Holding(registration, _) => registration,
            State::Idle(_) | State::Registering(_) => {
                unreachable!("only called while the consumer is registered")
            }
        }
    }
}
