//! One delivery at a time, and whether this connection still owns it.

use super::{
    message::{Fingerprint, Message},
    settle,
    subscription::{ConsumerOptions, Subscription},
};
use crate::{
    broker::{
        errors::{DeliveryLost, described},
        reach::{
            connect::{Attempts, Connector},
            connection::OpenConnection,
        },
        topology::{Declare, NotSubscribed, Request},
    },
    exit::{Exit, Failure},
    settlement::Outcome,
    verdict::Settlement,
};
use lapin::{message::Delivery, types::DeliveryTag};
use std::{future::ready, mem, time::Duration};
use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, timeout},
};

/// Longest time that releasing messages may take when nothing answers. What isn't released by then is requeued when the
/// connection ends.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

/// Takes messages from one queue, one after the other, over as many connections as it needs.
pub struct Consumer {
    broker: Connector,
    options: ConsumerOptions,
    /// What the queue is called, once it was consumed from.
    known_as: Option<String>,
    state: State,
    /// A connection was lost before a message was whole, and no message was taken since.
    cut_short: bool,
}

/// What the consumer is doing.
enum State {
    /// No subscription. The connection of one that has ended may be left.
    Idle(Option<OpenConnection>),
    /// `basic.consume` is under way: a task of its own, as the broker may deliver a message before its reply is here.
    Subscribing(JoinHandle<Result<Subscription, (OpenConnection, NotSubscribed)>>, oneshot::Sender<()>),
    /// The broker may deliver.
    Ready(Subscription),
    /// A message was delivered and isn't settled.
    Holding(Subscription, Held),
}

/// A delivery that isn't settled.
pub(super) struct Held {
    pub(super) tag: DeliveryTag,
    /// When the broker began to deliver it: from then on it counts towards an acknowledgement timeout.
    pub(super) since: Instant,
    pub(super) fingerprint: Fingerprint,
}

impl Consumer {
    /// A consumer without a subscription.
    #[must_use]
    pub fn new(broker: Connector, options: ConsumerOptions) -> Self {
        Self { broker, options, known_as: None, state: State::Idle(None), cut_short: false }
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
    pub fn is_subscribed(&self) -> bool {
        matches!(self.state, State::Ready(_))
    }

    /// Whether a connection was lost while a message arrived, and none was taken since: the broker may hold that message for
    /// a while, and the queue looks empty.
    #[must_use]
    pub fn was_cut_short(&self) -> bool {
        self.cut_short
    }

    /// Connects as often as it needs and subscribes, within `--connect-timeout`.
    ///
    /// Dropping the future loses no message: see [`Consumer::release`].
    ///
    /// # Errors
    /// The permanent failure, or when time is up the last transient one.
    pub async fn subscribe(&mut self) -> Result<(), Failure> {
        let mut attempts = Attempts::new(self.broker.options.timeout);
        let mut request = Request::default();
        if !matches!(&self.state, State::Idle(Some(kept)) if kept.is_connected()) {
            self.check_queue_survives("the connection was lost")?;
        }
        loop {
            match self.try_to_subscribe(mem::take(&mut request), attempts.deadline).await {
                Ok(()) => return Ok(()),
                Err(NotSubscribed::RetryWith(instead)) => request = instead,
                Err(NotSubscribed::Failed(error)) => {
                    self.check_queue_survives(&error.failure.message)?;
                    attempts.wait_or_give_up(error).await?;
                }
            }
        }
    }

    /// One attempt, on the connection that is left if there is one.
    async fn try_to_subscribe(&mut self, request: Request, deadline: Instant) -> Result<(), NotSubscribed> {
        let (connection, declared) = match mem::replace(&mut self.state, State::Idle(None)) {
            // What was declared on it is still there.
            State::Idle(Some(kept)) if kept.is_connected() => (kept, self.known_as.clone()),
            _ => (self.broker.attempt(deadline).await?, None),
        };
        let (give_up, given_up) = oneshot::channel();
        let open = Subscription::open(connection, self.options.clone(), request, declared, deadline, given_up);
        self.state = State::Subscribing(tokio::spawn(open), give_up);
        let subscribed = self.subscribed().await;
        if subscribed.is_err() {
            // A refusal ends its channel, and lapin tells of that again at some later time: the next attempt takes a new
            // connection.
            self.close().await;
        }
        subscribed
    }

    /// Waits for the subscription that is under way. Dropping the future leaves it there. The connection of a refused one is
    /// kept, to be closed.
    async fn subscribed(&mut self) -> Result<(), NotSubscribed> {
        let State::Subscribing(task, _) = &mut self.state else {
            return Ok(());
        };
        let subscription = match task.await.expect("subscribing doesn't panic") {
            Ok(subscription) => subscription,
            Err((connection, why)) => {
                let cut_short = connection.observed().deliveries > 0;
                let again = self.note_cut_short(cut_short);
                self.state = State::Idle(Some(connection));
                return Err(match why {
                    NotSubscribed::Failed(error) if again => {
                        let lost = DeliveryLost::because(error.failure.message).cut_short_again();
                        NotSubscribed::Failed(lost.unreadable_in(self.queue()).into())
                    }
                    why => why,
                });
            }
        };
        if self.known_as.is_none() && self.options.queue.is_empty() {
            tracing::info!("server provided queue name: {}", subscription.queue);
        }
        self.known_as = Some(subscription.queue.clone());
        self.state = State::Ready(subscription);
        Ok(())
    }

    /// The next message. Dropping the future loses none.
    ///
    /// # Errors
    /// Why the subscription has ended; nothing was taken.
    pub async fn next(&mut self) -> Result<Message, DeliveryLost> {
        match self.subscription().step().await {
            Ok(delivery) => Ok(self.hold(delivery)),
            Err(lost) => Err(self.end(lost).await),
        }
    }

    /// Waits until the message that is held is lost.
    pub async fn lost(&mut self) -> DeliveryLost {
        match self.subscription().step().await {
            Err(lost) => lost,
            Ok(_) => DeliveryLost::delivered_again(),
        }
    }

    /// Whether the message that is held is known to be lost: the broker may have said so while nobody waited for that.
    pub async fn is_lost(&mut self) -> Option<DeliveryLost> {
        tokio::select! {
            biased;
            lost = self.lost() => Some(lost),
            () = ready(()) => self.subscription().has_another().then(DeliveryLost::delivered_again),
        }
    }

    /// How many messages are ready; `None` if the broker can't say.
    ///
    /// # Errors
    /// Why the subscription has ended.
    pub async fn depth(&mut self) -> Result<Option<u32>, DeliveryLost> {
        match self.subscription().depth().await {
            Err(lost) => Err(self.end(lost).await),
            depth => depth,
        }
    }

    /// Cancels the consumer; a message that came before the reply is still taken. So is one that has begun to arrive within
    /// two seconds: the reply stands behind all of its body. A queue that does neither by then delivers nothing.
    ///
    /// # Errors
    /// Why the subscription had ended before; nothing was taken.
    pub async fn cancel(&mut self) -> Result<Option<Message>, DeliveryLost> {
        match self.subscription().cancel().await {
            Ok(Some(delivery)) => Ok(Some(self.hold(delivery))),
            Ok(None) => {
                self.idle();
                Ok(None)
            }
            Err(lost) => Err(self.end(lost).await),
        }
    }

    /// Settles the message that is held; with `cancels`, the consumer is cancelled first, so that no message is delivered
    /// that nobody here would run. Says why if the settlement isn't confirmed.
    pub async fn settle(&mut self, settlement: Settlement, cancels: bool) -> (Outcome, Option<DeliveryLost>) {
        let State::Holding(mut subscription, held) = mem::replace(&mut self.state, State::Idle(None)) else {
            unreachable!("only called while a message is held")
        };
        let settled = settle::carry_out(&mut subscription, &held, settlement, cancels).await;
        self.state = if settled.0 == Outcome::Confirmed && subscription.consumer.is_some() {
            State::Ready(subscription)
        } else {
            State::Idle(Some(subscription.end()))
        };
        settled
    }

    /// Releases whatever may have arrived, before an end without a command; takes four seconds at most. Whether the broker has
    /// confirmed that.
    pub async fn release(&mut self) -> bool {
        let work = async {
            // It may be refused, or it was there already.
            let _ = self.subscribed().await;
            match &mut self.state {
                State::Ready(subscription) => subscription.release(None).await,
                State::Holding(subscription, held) => subscription.release(Some(held.tag)).await,
                State::Idle(_) | State::Subscribing(..) => Ok(()),
            }
        };
        match timeout(RELEASE_TIMEOUT, work).await {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => tracing::debug!("releasing: {}", described(&error)),
            Err(_) => tracing::debug!("releasing: no answer within {RELEASE_TIMEOUT:?}"),
        }
        if let State::Subscribing(task, give_up) = mem::replace(&mut self.state, State::Idle(None)) {
            drop(give_up);
            self.state = match task.await.expect("subscribing doesn't panic") {
                Ok(subscription) => State::Ready(subscription),
                Err((connection, _)) => State::Idle(Some(connection)),
            };
        }
        false
    }

    /// Closes the connection politely, within two seconds.
    pub async fn close(&mut self) {
        self.idle();
        if let State::Idle(Some(connection)) = mem::replace(&mut self.state, State::Idle(None)) {
            connection.close().await;
        }
    }

    /// Ends the subscription, if there is one, and keeps its connection.
    fn idle(&mut self) {
        self.state = State::Idle(match mem::replace(&mut self.state, State::Idle(None)) {
            State::Idle(connection) => connection,
            State::Subscribing(task, _) => {
                task.abort();
                None
            }
            State::Ready(subscription) | State::Holding(subscription, _) => Some(subscription.end()),
        });
    }

    /// Ends a subscription that was lost. Its connection may be good; another attempt takes a new one.
    async fn end(&mut self, lost: DeliveryLost) -> DeliveryLost {
        let cut_short = self.subscription().has_another();
        self.close().await;
        if self.note_cut_short(cut_short) && !lost.unreadable { lost.cut_short_again() } else { lost }
    }

    /// Takes note of whether a connection ended after the broker began to deliver a message and before that was here, and
    /// tells whether an earlier one did, too. Nobody would get such a message, and every try counts towards the queue's
    /// `delivery-limit`, at which the broker destroys it. Connections in between on which nothing was delivered, as they were
    /// refused for example, change nothing.
    fn note_cut_short(&mut self, cut_short: bool) -> bool {
        let before = self.cut_short;
        self.cut_short |= cut_short;
        before && cut_short
    }

    fn hold(&mut self, delivery: Delivery) -> Message {
        self.cut_short = false;
        let delivered = self.subscription().connection.observed().delivered;
        let since = delivered.map_or_else(Instant::now, Instant::from_std);
        let held = Held { tag: delivery.delivery_tag, since, fingerprint: Fingerprint::of(&delivery) };
        self.state = match mem::replace(&mut self.state, State::Idle(None)) {
            State::Ready(subscription) => State::Holding(subscription, held),
            other => other,
        };
        Message::new(delivery, self.queue())
    }

    fn subscription(&mut self) -> &mut Subscription {
        match &mut self.state {
            State::Ready(subscription) | State::Holding(subscription, _) => subscription,
            State::Idle(_) | State::Subscribing(..) => unreachable!("only called while there is a subscription"),
        }
    }
}
