//! Takes messages from one queue, one at a time, over as many connections as it needs.

use super::{
    message::{Fingerprint, Message},
    settle,
    subscription::{ConsumerOptions, Subscription},
};
use crate::{
    broker::{
        errors::{DeliveryLost, described, lost_twice},
        reach::{connect::Connector, connection::OpenConnection, tries::Tries},
        topology::{Declare, NotSubscribed, Plan},
    },
    exit::{Exit, Failure},
    settlement::Settled,
    verdict::Settlement,
};
use lapin::{message::Delivery, types::DeliveryTag};
use std::{future::ready, mem, time::Duration};
use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, timeout},
};

/// Longest wait for the broker to confirm a release. Otherwise it requeues the messages when the connection ends.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

pub struct Consumer {
    connector: Connector,
    options: ConsumerOptions,
    queue_name: Option<String>,
    state: State,
    /// A connection was lost while a message arrived, and no message has arrived since.
    lost_mid_delivery: bool,
}

/// - `subscribe`: from Idle by Subscribing to Ready, or to Idle if it fails
/// - `next`: from Ready to Holding, or to Idle after a loss
/// - `cancel`: from Ready to Holding, or to Idle after a loss or without a message
/// - `depth`: stays Ready, or to Idle after a loss
/// - `settle`: from Holding to Ready or Idle
/// - `release` and `close`: to Idle; a held message that is lost stays Holding until `close`
enum State {
    /// The connection of an ended subscription may be kept.
    Idle(Option<OpenConnection>),
    Subscribing {
        /// A task, so that dropping [`Consumer::subscribe`] loses no message that the broker has already delivered.
        task: JoinHandle<Result<Subscription, (OpenConnection, NotSubscribed)>>,
        /// The task gives up when this is dropped.
        give_up: oneshot::Sender<()>,
    },
    Ready(Subscription),
    Holding(Subscription, Held),
}

impl Default for State {
    fn default() -> Self {
        Self::Idle(None)
    }
}

pub(super) struct Held {
    pub(super) tag: DeliveryTag,
    /// When its delivery began to arrive: about then an acknowledgement timeout starts.
    pub(super) since: Instant,
    pub(super) fingerprint: Fingerprint,
}

impl Consumer {
    #[must_use]
    pub fn new(connector: Connector, options: ConsumerOptions) -> Self {
        Self { connector, options, queue_name: None, state: State::default(), lost_mid_delivery: false }
    }

    /// The queue's name; empty if the broker is to choose it and hasn't yet.
    #[must_use]
    pub fn queue(&self) -> &str {
        self.queue_name.as_deref().unwrap_or(&self.options.queue)
    }

    /// # Errors
    /// 69 if the queue was exclusive, as it was deleted with the lost connection. `why`: the reason for the loss.
    pub fn check_queue_survives(&self, why: &str) -> Result<(), Failure> {
        match &self.queue_name {
            Some(queue) if self.options.topology.declare == Declare::Exclusive => Err(Failure::new(
                Exit::Unavailable,
                format!(
                    "queue {queue:?} is gone with its messages: it belonged to the lost connection ({why}); the next run declares a new one; for a queue that stays, name it and use --declare without --exclusive"
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Whether messages may arrive: subscribed, and none is held.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready(_))
    }

    /// Whether the queue may look empty only because the broker hasn't requeued the message that was arriving when a
    /// connection was lost.
    #[must_use]
    pub fn was_lost_mid_delivery(&self) -> bool {
        self.lost_mid_delivery
    }

    /// Connects and subscribes, and retries for `--connect-timeout`. Dropping the future loses no message.
    /// # Errors
    /// The first permanent failure, or the last transient one when the time is up.
    pub async fn subscribe(&mut self) -> Result<(), Failure> {
        let mut tries = Tries::new(self.connector.options.timeout);
        if !matches!(&self.state, State::Idle(Some(kept)) if kept.is_connected()) {
            self.check_queue_survives("it was lost between two messages")?;
        }
        let mut plan = Plan::default();
        loop {
            plan = match self.try_to_subscribe(plan, tries.deadline).await {
                Ok(()) => return Ok(()),
                Err(NotSubscribed::RetryWith(plan)) => plan,
                Err(NotSubscribed::Failed(error)) => {
                    self.check_queue_survives(&error.failure.message)?;
                    tries.pause_after(error).await?;
                    Plan::default()
                }
            };
        }
    }

    async fn try_to_subscribe(&mut self, plan: Plan, deadline: Instant) -> Result<(), NotSubscribed> {
        let (connection, declared) = match mem::take(&mut self.state) {
            // The queue was declared on it before.
            State::Idle(Some(kept)) if kept.is_connected() => (kept, self.queue_name.clone()),
            _ => (self.connector.try_to_connect(deadline).await?, None),
        };
        let (give_up, given_up) = oneshot::channel();
        let open = Subscription::open(connection, self.options.clone(), plan, declared, deadline, given_up);
        self.state = State::Subscribing { task: tokio::spawn(open), give_up };
        let mut subscribed = self.finish_subscribing().await;
        match &mut subscribed {
            Ok(()) => self.connector.login_accepted(),
            Err(NotSubscribed::Failed(error)) if error.login_refused => self.connector.note_login_refused(error),
            Err(_) => {}
        }
        if subscribed.is_err() {
            // The next try takes a new connection: see close_after.
            self.close().await;
        }
        subscribed
    }

    /// Does nothing if nothing is being subscribed.
    async fn finish_subscribing(&mut self) -> Result<(), NotSubscribed> {
        let State::Subscribing { task, .. } = &mut self.state else {
            return Ok(());
        };
        match task.await.expect("subscribing doesn't panic") {
            Ok(subscription) => {
                if self.queue_name.is_none() && self.options.queue.is_empty() {
                    // Scripts that look for amqp-consume's "Server provided queue name: NAME" have to change their
                    // pattern: our lines begin with a small letter, after the program's name.
                    tracing::info!("server provided queue name: {}", subscription.queue);
                }
                self.queue_name = Some(subscription.queue.clone());
                self.state = State::Ready(subscription);
                Ok(())
            }
            Err((connection, why)) => {
                let mid_delivery = connection.observed().consumer.deliveries > 0;
                let is_second = self.note_loss(mid_delivery);
                self.state = State::Idle(Some(connection));
                Err(match why {
                    NotSubscribed::Failed(error) if is_second && error.transient => {
                        NotSubscribed::Failed(lost_twice(self.queue(), &error.failure.message).into())
                    }
                    why => why,
                })
            }
        }
    }

    /// Dropping the future loses no message. After an error nothing was taken.
    pub async fn next(&mut self) -> Result<Message, DeliveryLost> {
        match self.subscription().next_delivery().await {
            Ok(delivery) => Ok(self.hold(delivery)),
            Err(lost) => Err(self.close_after(lost).await),
        }
    }

    /// How long the message has been held, since its delivery began to arrive.
    pub fn held_for(&self) -> Duration {
        match &self.state {
            State::Holding(_, held) => held.since.elapsed(),
            State::Idle(_) | State::Subscribing { .. } | State::Ready(_) => Duration::ZERO,
        }
    }

    pub async fn wait_until_lost(&mut self) -> DeliveryLost {
        match self.subscription().next_delivery().await {
            Err(lost) => lost,
            Ok(_) => DeliveryLost::delivered_again(),
        }
    }

    /// Why the held message is lost, if the broker has already said so.
    pub async fn known_loss(&mut self) -> Option<DeliveryLost> {
        tokio::select! {
            biased;
            lost = self.wait_until_lost() => Some(lost),
            // Doesn't wait. A delivery that has only begun counts, too.
            () = ready(()) => self.subscription().has_unread_delivery().then(DeliveryLost::delivered_again),
        }
    }

    /// How many messages are ready; `None` if the broker can't tell.
    pub async fn depth(&mut self) -> Result<Option<u32>, DeliveryLost> {
        match self.subscription().depth().await {
            Err(lost) => Err(self.close_after(lost).await),
            depth => depth,
        }
    }

    /// Returns a message that has arrived before the reply, or has begun to arrive within 2 s. After an error nothing
    /// was taken.
    pub async fn cancel(&mut self) -> Result<Option<Message>, DeliveryLost> {
        match self.subscription().cancel().await {
            Ok(Some(delivery)) => Ok(Some(self.hold(delivery))),
            Ok(None) => {
                self.end_subscription();
                Ok(None)
            }
            Err(lost) => Err(self.close_after(lost).await),
        }
    }

    /// Settles the held message, after cancelling the consumer if `cancels`. Returns the reason if it isn't confirmed.
    pub async fn settle(&mut self, settlement: Settlement, cancels: bool) -> (Settled, Option<DeliveryLost>) {
        let State::Holding(mut subscription, held) = mem::take(&mut self.state) else {
            unreachable!("only called while a message is held")
        };
        let (settled, why) = settle::carry_out(&mut subscription, &held, settlement, cancels).await;
        self.state = if settled == Settled::Confirmed && subscription.consumer.is_some() {
            State::Ready(subscription)
        } else {
            State::Idle(Some(subscription.into_connection()))
        };
        (settled, why)
    }

    /// Releases every message that has arrived, and ends the subscription; none may be held. Returns whether the broker
    /// has confirmed that within 2 s.
    pub async fn release(&mut self) -> bool {
        let released = timeout(RELEASE_TIMEOUT, async {
            // Without a subscription there is nothing to release.
            let _ = self.finish_subscribing().await;
            match &mut self.state {
                State::Ready(subscription) => subscription.release().await,
                State::Idle(_) | State::Subscribing { .. } | State::Holding(..) => Ok(()),
            }
        });
        let confirmed = match released.await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::debug!("releasing: {}", described(&error));
                false
            }
            Err(_) => {
                tracing::debug!("releasing: no answer within {RELEASE_TIMEOUT:?}");
                false
            }
        };
        self.give_up_subscribing().await;
        self.end_subscription();
        confirmed
    }

    /// Keeps the connection, so that `close` can close it.
    async fn give_up_subscribing(&mut self) {
        self.state = match mem::take(&mut self.state) {
            State::Subscribing { task, give_up } => {
                drop(give_up);
                match task.await.expect("subscribing doesn't panic") {
                    Ok(subscription) => State::Ready(subscription),
                    Err((connection, _)) => State::Idle(Some(connection)),
                }
            }
            other => other,
        };
    }

    /// Closes the connection, within three seconds.
    pub async fn close(&mut self) {
        self.end_subscription();
        if let State::Idle(Some(connection)) = mem::take(&mut self.state) {
            connection.close().await;
        }
    }

    fn end_subscription(&mut self) {
        self.state = State::Idle(match mem::take(&mut self.state) {
            State::Idle(connection) => connection,
            State::Subscribing { task, .. } => {
                task.abort();
                None
            }
            State::Ready(subscription) | State::Holding(subscription, _) => Some(subscription.into_connection()),
        });
    }

    /// Closes the connection even if only the channel is lost: lapin 4.12 would report that to the next subscription,
    /// too.
    async fn close_after(&mut self, lost: DeliveryLost) -> DeliveryLost {
        let mid_delivery = self.subscription().has_unread_delivery();
        let is_second = self.note_loss(mid_delivery);
        self.close().await;
        if is_second { lost.for_the_second_time() } else { lost }
    }

    /// Returns whether a second connection was lost while a message arrived, with none received in between.
    fn note_loss(&mut self, mid_delivery: bool) -> bool {
        let is_second = self.lost_mid_delivery && mid_delivery;
        self.lost_mid_delivery |= mid_delivery;
        is_second
    }

    fn hold(&mut self, delivery: Delivery) -> Message {
        self.lost_mid_delivery = false;
        let State::Ready(subscription) = mem::take(&mut self.state) else {
            unreachable!("only called after a subscription's delivery")
        };
        let (began, version) = {
            let observed = subscription.connection.observed();
            (observed.consumer.delivery_began, observed.version)
        };
        let since = began.map_or_else(Instant::now, Instant::from_std);
        let held = Held { tag: delivery.delivery_tag, since, fingerprint: Fingerprint::of(&delivery) };
        self.state = State::Holding(subscription, held);
        Message::new(delivery, self.queue(), version)
    }

    fn subscription(&mut self) -> &mut Subscription {
        match &mut self.state {
            State::Ready(subscription) | State::Holding(subscription, _) => subscription,
            State::Idle(_) | State::Subscribing { .. } => unreachable!("only called while there is a subscription"),
        }
    }
}
