//! Shared by the tests: the programs under test, queues, users and virtual hosts, and checks of where a message ended
//! up.

pub mod terminal;

use std::ops::Deref;
use std::path::{Path, PathBuf};
use testbed::{Broker, Got, Program, Proxy, Queue, QueueKind};

/// The qconsume under test: the file that `QCONSUME_BIN` names (the released one, for example), or else cargo's build.
pub fn qconsume_path() -> PathBuf {
    let named = std::env::var_os("QCONSUME_BIN").map(PathBuf::from);
    named.unwrap_or_else(|| env!("CARGO_BIN_EXE_qconsume").into())
}

/// The qpublish under test: the file that `QPUBLISH_BIN` names, or else cargo's build.
pub fn qpublish_path() -> PathBuf {
    let named = std::env::var_os("QPUBLISH_BIN").map(PathBuf::from);
    named.unwrap_or_else(|| env!("CARGO_BIN_EXE_qpublish").into())
}

pub fn qconsume() -> Program {
    Program::new(qconsume_path())
}

pub fn qpublish() -> Program {
    Program::new(qpublish_path())
}

/// qconsume with this queue and its broker's URL.
pub fn worker(queue: &Queue) -> Program {
    qconsume().url(queue.url()).queue(queue.name())
}

/// The same, connected through a proxy.
pub fn behind(proxy: &Proxy, queue: &Queue) -> Program {
    worker(queue).url(&proxy.url())
}

/// A script that prints `started`, and succeeds once the file exists.
pub fn until_there(file: &Path) -> String {
    format!("echo started; while [ ! -e '{}' ]; do sleep 0.05; done", file.display())
}

/// Repeats a round, up to ten times, until it returns `Some`. A round is `None` if a busy machine made the broker's
/// answer take longer than the two seconds that a stopped qconsume waits for it.
#[track_caller]
pub fn in_time<T>(mut round: impl FnMut() -> Option<T>) -> T {
    let played = (0..10).find_map(|_| round());
    played.expect("one of ten rounds fits into the two seconds")
}

/// A queue of each kind.
pub fn queues(name: &str) -> [Queue; 2] {
    QueueKind::ALL.map(|kind| {
        let name = format!("{name}-{}", kind.as_str());
        Broker::shared().declare(&name).kind(kind).create()
    })
}

/// A body, if its content doesn't matter.
pub const MESSAGE: &str = "the message";

/// Takes this message out of the queue; checks that the queue holds nothing else.
#[track_caller]
fn alone(queue: &Queue, body: &[u8]) -> Got {
    let got = queue.wait_get();
    assert!(got.data == body, "the queue holds another message");
    assert_eq!(got.remaining(), 0, "the queue holds a second message");
    assert!(queue.get().is_none(), "the queue holds a second message");
    got
}

/// Checks that the queue holds exactly [`MESSAGE`]: it was requeued, or never taken.
#[track_caller]
pub fn assert_back(queue: &Queue) {
    alone(queue, MESSAGE.as_bytes());
}

/// Checks that the queue holds exactly this message, marked as redelivered.
#[track_caller]
pub fn assert_returned(queue: &Queue, body: impl AsRef<[u8]>) {
    let got = alone(queue, body.as_ref());
    assert!(got.redelivered, "the message isn't marked as redelivered");
}

/// Checks that the queue is empty, by publishing another message: a requeued one would be delivered before it.
#[track_caller]
pub fn assert_gone(queue: &Queue) {
    queue.wait_consumers(0);
    queue.publish("the test's own");
    let got = queue.wait_get();
    assert_eq!(got.text(), "the test's own", "a message was requeued");
    assert_eq!(got.remaining(), 0);
}

/// Checks that the queue is empty, or holds exactly this message, marked as redelivered.
#[track_caller]
pub fn assert_in_one_place(queue: &Queue, body: impl AsRef<[u8]>) {
    queue.publish("the test's own");
    let mut got = queue.wait_get();
    if got.data == body.as_ref() {
        assert!(got.redelivered, "the message isn't marked as redelivered");
        got = queue.wait_get();
    }
    // A message that is requeued late comes after the test's own.
    assert_eq!(got.text(), "the test's own", "the queue holds another message");
    assert!(got.remaining() <= 1, "the queue holds {} more messages", got.remaining());
}

/// A user without permissions on a private broker; deleted when dropped.
pub struct User<'a> {
    broker: &'a Broker,
    name: &'a str,
    password: &'a str,
}

impl<'a> User<'a> {
    pub fn new(broker: &'a Broker, name: &'a str, password: &'a str) -> Self {
        broker.ctl(&["add_user", name, password]).unwrap();
        Self { broker, name, password }
    }

    /// Grants these permissions in virtual host `/`: configure, write, read.
    pub fn may(self, permissions: [&str; 3]) -> Self {
        let command = [&["set_permissions", self.name][..], &permissions].concat();
        self.broker.ctl(&command).unwrap();
        self
    }

    pub fn url(&self, vhost: &str) -> String {
        self.broker.url_for(self.name, self.password, vhost)
    }
}

impl Drop for User<'_> {
    fn drop(&mut self) {
        let _ = self.broker.ctl(&["delete_user", self.name]);
    }
}

/// A virtual host on a private broker; deleted when dropped.
pub struct Vhost<'a> {
    broker: &'a Broker,
    pub name: &'a str,
}

impl<'a> Vhost<'a> {
    pub fn new(broker: &'a Broker, name: &'a str) -> Self {
        broker.ctl(&["add_vhost", name]).unwrap();
        Self { broker, name }
    }

    /// Grants a user all permissions in it.
    pub fn of(self, user: &str) -> Self {
        let command = ["set_permissions", "-p", self.name, user, ".*", ".*", ".*"];
        self.broker.ctl(&command).unwrap();
        self
    }
}

impl Drop for Vhost<'_> {
    fn drop(&mut self) {
        let _ = self.broker.ctl(&["delete_vhost", self.name]);
    }
}

/// A broker on which a test may create users and virtual hosts: the shared one, if the tests started it, or else a new
/// one.
pub fn private_broker() -> impl Deref<Target = Broker> {
    enum Private {
        Shared(&'static Broker),
        Own(Box<Broker>),
    }
    impl Deref for Private {
        type Target = Broker;

        fn deref(&self) -> &Broker {
            match self {
                Self::Shared(broker) => broker,
                Self::Own(broker) => broker,
            }
        }
    }
    let shared = Broker::shared();
    if shared.is_private() { Private::Shared(shared) } else { Private::Own(Box::new(Broker::start())) }
}
