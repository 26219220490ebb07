//! What the tests have in common: the programs under test.

use std::ops::Deref;
use std::path::PathBuf;
use testbed::{Broker, Program};

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
    if shared.is_private() {
        Private::Shared(shared)
    } else {
        Private::Own(Box::new(Broker::start()))
    }
}
