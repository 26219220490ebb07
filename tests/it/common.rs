//! What the tests have in common: the programs under test, brokers and what is in them, and where a message is in the end.

pub mod terminal;

use std::ops::Deref;
use std::path::{Path, PathBuf};
use testbed::{Broker, Got, Program, Proxy, Queue, QueueKind};

/// The qconsume under test: the file that `QCONSUME_BIN` names (the shipped one, for example), or what the build has left.
pub fn qconsume_path() -> PathBuf {
    let named = std::env::var_os("QCONSUME_BIN").map(PathBuf::from);
    named.unwrap_or_else(|| env!("CARGO_BIN_EXE_qconsume").into())
}

/// The qpublish under test: `QPUBLISH_BIN`, or what the build has left.
pub fn qpublish_path() -> PathBuf {
    let named = std::env::var_os("QPUBLISH_BIN").map(PathBuf::from);
    named.unwrap_or_else(|| env!("CARGO_BIN_EXE_qpublish").into())
}

/// qconsume, to be run.
pub fn qconsume() -> Program {
    Program::new(qconsume_path())
}

/// qpublish, to be run.
pub fn qpublish() -> Program {
    Program::new(qpublish_path())
}

/// qconsume, to work on this queue.
pub fn worker(queue: &Queue) -> Program {
    qconsume().url(queue.url()).queue(queue.name())
}

/// The same, with a proxy before the queue's broker.
pub fn behind(proxy: &Proxy, queue: &Queue) -> Program {
    worker(queue).url(&proxy.url())
}

/// A script that says that it has started, and ends with success when the file is there.
pub fn until_there(file: &Path) -> String {
    format!("echo started; while [ ! -e '{}' ]; do sleep 0.05; done", file.display())
}

/// Plays a round until it fits into the two seconds that qconsume gives a broker to answer before it ends: on a busy machine
/// some don't, and are `None`.
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

/// What is in the queue, where it doesn't matter.
pub const MESSAGE: &str = "the message";

/// Checks that only this message is in the queue, and that nobody has it; takes it out.
#[track_caller]
fn alone(queue: &Queue, body: &[u8]) -> Got {
    let got = queue.wait_get();
    assert!(got.data == body, "another message is there");
    assert_eq!(got.remaining(), 0, "another message is there, too");
    assert!(queue.get().is_none(), "the message is there twice");
    got
}

/// Checks that [`MESSAGE`] is in the queue, alone: it has come back, or was never taken.
#[track_caller]
pub fn assert_back(queue: &Queue) {
    alone(queue, MESSAGE.as_bytes());
}

/// Checks that exactly this message is back, marked as delivered before.
#[track_caller]
pub fn assert_returned(queue: &Queue, body: impl AsRef<[u8]>) {
    let got = alone(queue, body.as_ref());
    assert!(got.redelivered, "the message isn't marked as redelivered");
}

/// Checks that nothing is left in the queue, by a message of the test's own: what had come back would stand before it.
#[track_caller]
pub fn assert_gone(queue: &Queue) {
    queue.wait_consumers(0);
    queue.publish("the test's own");
    let got = queue.wait_get();
    assert_eq!(got.text(), "the test's own", "a message has come back");
    assert_eq!(got.remaining(), 0);
}

/// Checks that the message is gone, or back and marked as delivered before; not twice, and nothing else.
#[track_caller]
pub fn assert_in_one_place(queue: &Queue, body: impl AsRef<[u8]>) {
    queue.publish("the test's own");
    let mut got = queue.wait_get();
    if got.data == body.as_ref() {
        assert!(got.redelivered, "the message isn't marked as redelivered");
        got = queue.wait_get();
    }
    // One that comes back late stands behind the test's own.
    assert_eq!(got.text(), "the test's own", "another message is there");
    assert!(got.remaining() <= 1, "{} more are there", got.remaining());
}

/// A user of the test's own on a private broker, without any permission; gone when dropped, whatever becomes of the test.
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

    /// With these permissions in virtual host `/`: to configure, to write, and to read.
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

/// A virtual host of the test's own on a private broker; gone when dropped, whatever becomes of the test.
pub struct Vhost<'a> {
    broker: &'a Broker,
    pub name: &'a str,
}

impl<'a> Vhost<'a> {
    pub fn new(broker: &'a Broker, name: &'a str) -> Self {
        broker.ctl(&["add_vhost", name]).unwrap();
        Self { broker, name }
    }

    /// Lets a user do everything in it.
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

/// The shared broker, or where that is somebody's, one of the test's own: for users, virtual hosts and the like.
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
