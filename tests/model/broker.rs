//! The broker: one queue, and the broker's side of every connection.

/// A message's position in the queue.
pub type Id = u8;

/// A delivery tag modulo [`TAGS`]: fewer deliveries than that are in transit at the same time.
pub type Tag = u8;
pub const TAGS: u8 = 4;

/// The queue's type and RabbitMQ's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Knows only whether a message was delivered before.
    Classic,
    /// Before RabbitMQ 4.3: counts every requeue. The channel enforces the acknowledgement timeout. The leader may lose
    /// contact with a worker's node.
    Quorum,
    /// RabbitMQ 4.3: doesn't count `basic.nack`. The queue enforces the acknowledgement timeout and informs the channel
    /// later.
    Quorum43,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    Ready,
    Delivered,
    Acknowledged,
    DeadLettered,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Message {
    pub place: Place,
    /// `x-delivery-count`; on a classic queue 1 for `redelivered`.
    pub count: u8,
    /// For the properties only: a command has succeeded with it.
    pub done: bool,
    /// For the properties only: its count rose although no command ran with it, and not because of a fault.
    pub blamed: bool,
}

impl Message {
    pub const NEW: Self = Self { place: Place::Ready, count: 0, done: false, blamed: false };

    fn requeue(&mut self, kind: Kind, counted: bool) {
        self.place = Place::Ready;
        match kind {
            Kind::Classic => self.count = 1,
            Kind::Quorum | Kind::Quorum43 => self.count += u8::from(counted),
        }
    }

    /// The number that `src/broker/consume/message.rs` reads from a delivery's headers.
    pub fn failures(&self, kind: Kind) -> Option<u8> {
        (kind != Kind::Classic || self.count == 0).then_some(self.count)
    }
}

/// A delivery as the worker receives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Delivery {
    pub id: Id,
    pub tag: Tag,
    /// The failures that the queue has counted; `None` if it doesn't count them.
    pub failures: Option<u8>,
}

/// A method that the worker sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Request {
    /// Replaces the channel by a new one with a consumer: `channel.close`, `channel.open`, `basic.consume`.
    Subscribe,
    Cancel {
        nowait: bool,
    },
    Ack(Tag),
    Reject {
        tag: Tag,
        requeue: bool,
    },
    Nack(Tag),
    Qos,
    /// A passive `queue.declare`.
    Declare,
    /// `connection.close`.
    Close,
}

/// A method that the broker sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reply {
    Deliver(Delivery),
    CancelOk,
    QosOk,
    /// `queue.declare-ok`; `empty` if no message is ready.
    DeclareOk {
        empty: bool,
    },
    /// `basic.cancel` from the broker: RabbitMQ 4.3's acknowledgement timeout.
    ConsumerCancelled,
    /// `channel.close` 406.
    ChannelClosed,
}

/// A connection with its one channel: the methods in transit in both directions, and the broker's state for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Link {
    pub to_broker: Vec<Request>,
    pub to_worker: Vec<Reply>,
    /// The network carries nothing more, but neither side has noticed.
    pub cut: bool,
    /// The broker has forgotten the connection.
    pub gone: bool,
    pub consumer: bool,
    pub channel_closed: bool,
    /// The message that this channel's consumer holds, from the queue's view.
    pub unacked: Option<Id>,
    /// The tag of the last delivery.
    tag: Tag,
    /// The queue has requeued the delivery because of its timeout, but the channel doesn't know yet.
    pub expired: bool,
    /// The message whose command was started last.
    pub ran: Option<Id>,
    /// For the properties only: the last message that an ack or a reject on this connection removed from the queue.
    pub removed: Option<Id>,
    /// For the properties only: a reject on this connection has dead-lettered a message.
    pub dead_lettered: bool,
    /// For the properties only: a fault has made the queue requeue a message.
    faulty: bool,
}

impl Link {
    pub fn subscribed() -> Self {
        Self { consumer: true, ..Self::default() }
    }

    /// Writes to the broker; if the connection is lost, the request is dropped.
    pub fn write(&mut self, request: Request) {
        if !self.cut && !self.gone {
            self.to_broker.push(request);
        }
    }

    /// The worker replaces its channel, and gets nothing more from the old one.
    pub fn subscribe(&mut self) {
        self.to_worker.clear();
        self.expired = false;
        self.write(Request::Subscribe);
    }

    fn reply(&mut self, reply: Reply) {
        if !self.cut {
            self.to_worker.push(reply);
        }
    }

    /// Drops everything in transit, and everything that follows.
    pub fn cut(&mut self) {
        self.cut = true;
        self.to_broker.clear();
        self.to_worker.clear();
    }

    /// Whether the worker's last request is `connection.close`.
    pub fn said_goodbye(&self) -> bool {
        self.to_broker.last() == Some(&Request::Close)
    }

    /// Whether the broker may deliver, with a prefetch of one.
    pub fn wants_message(&self) -> bool {
        self.consumer && !self.expired && self.unacked.is_none()
    }

    /// The worker has left, so replies to it don't matter any more.
    pub fn leave(&mut self) {
        self.to_worker.clear();
        (self.removed, self.dead_lettered) = (None, false);
    }

    /// Whether the connection may still change the queue.
    pub fn matters(&self) -> bool {
        self.wants_message() || self.unacked.is_some()
    }
}

/// The queue's messages. A link that has ended isn't removed, but `gone`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Queue(pub Vec<Message>);

impl Queue {
    pub fn message(&mut self, id: Id) -> &mut Message {
        &mut self.0[usize::from(id)]
    }

    /// The first ready message. A requeued message returns to its old position.
    pub fn first_ready(&self) -> Option<Id> {
        let ready = |message: &Message| message.place == Place::Ready;
        self.0.iter().position(ready).map(|id| id as Id)
    }

    pub fn deliver(&mut self, kind: Kind, link: &mut Link, id: Id) {
        let message = self.message(id);
        message.place = Place::Delivered;
        let failures = message.failures(kind);
        link.tag = (link.tag + 1) % TAGS;
        link.unacked = Some(id);
        link.reply(Reply::Deliver(Delivery { id, tag: link.tag, failures }));
    }

    /// The queue's leader has lost contact with the worker's node: it requeues the message that the worker holds, and
    /// then delivers `id` to it.
    pub fn deliver_again(&mut self, kind: Kind, link: &mut Link, id: Id) {
        self.take_back(kind, link, true, true);
        self.deliver(kind, link, id);
    }

    /// The channel processes the worker's next method.
    pub fn process(&mut self, kind: Kind, link: &mut Link) {
        let request = link.to_broker.remove(0);
        match request {
            Request::Close => return self.end(kind, link, false),
            Request::Subscribe => {
                (link.consumer, link.channel_closed, link.tag) = (true, false, 0);
                return;
            }
            _ if link.channel_closed => return,
            _ => {}
        }
        let holds = |link: &Link, tag| link.unacked.is_some() && link.tag == tag;
        match request {
            Request::Cancel { nowait } => {
                link.consumer = false;
                if !nowait {
                    link.reply(Reply::CancelOk);
                }
            }
            Request::Qos => link.reply(Reply::QosOk),
            Request::Declare => link.reply(Reply::DeclareOk { empty: self.first_ready().is_none() }),
            Request::Ack(tag) if holds(link, tag) => self.remove(link, Place::Acknowledged),
            Request::Reject { tag, requeue: false } if holds(link, tag) => self.remove(link, Place::DeadLettered),
            Request::Reject { tag, .. } if holds(link, tag) => self.take_back(kind, link, true, false),
            Request::Nack(tag) if holds(link, tag) => self.take_back(kind, link, kind != Kind::Quorum43, false),
            // The queue has requeued the message, but hasn't told the channel, which ignores this silently.
            Request::Ack(_) | Request::Reject { .. } | Request::Nack(_) => {}
            Request::Close | Request::Subscribe => unreachable!("handled above"),
        }
    }

    fn remove(&mut self, link: &mut Link, to: Place) {
        link.removed = link.unacked.take();
        link.dead_lettered |= to == Place::DeadLettered;
        self.message(link.removed.expect("the message is held")).place = to;
    }

    fn take_back(&mut self, kind: Kind, link: &mut Link, counted: bool, fault: bool) {
        link.faulty |= fault;
        let Some(id) = link.unacked.take() else {
            return;
        };
        let message = self.message(id);
        message.requeue(kind, counted);
        // An older quorum queue counts every requeue, so only 4.3 can blame us.
        message.blamed |= kind == Kind::Quorum43 && counted && !link.faulty && link.ran != Some(id);
    }

    /// The broker notices the connection's end, or crashes.
    pub fn end(&mut self, kind: Kind, link: &mut Link, fault: bool) {
        self.take_back(kind, link, true, fault);
        link.to_broker.clear();
        (link.consumer, link.expired, link.gone) = (false, false, true);
    }

    /// The acknowledgement timeout.
    pub fn expire(&mut self, kind: Kind, link: &mut Link) {
        self.take_back(kind, link, true, true);
        if kind == Kind::Quorum43 {
            link.expired = true;
        } else {
            (link.consumer, link.channel_closed) = (false, true);
            link.reply(Reply::ChannelClosed);
        }
    }

    /// RabbitMQ 4.3: the queue informs the channel of the timeout.
    pub fn announce(&mut self, link: &mut Link) {
        link.expired = false;
        if link.consumer {
            link.consumer = false;
            link.reply(Reply::ConsumerCancelled);
        } else {
            link.channel_closed = true;
            link.reply(Reply::ChannelClosed);
        }
    }
}
