//! What the tests have in common: the programs under test.

use std::ops::Deref;
use testbed::{Broker, Program};

/// qconsume as the build has left it, or the one that `QCONSUME_BIN` names.
pub fn qconsume() -> Program {
    program("QCONSUME_BIN", env!("CARGO_BIN_EXE_qconsume"))
}

/// qpublish, likewise; `QPUBLISH_BIN`.
pub fn qpublish() -> Program {
    program("QPUBLISH_BIN", env!("CARGO_BIN_EXE_qpublish"))
}

fn program(variable: &str, built: &str) -> Program {
    let path = std::env::var_os(variable);
    Program::new(path.as_deref().unwrap_or(built.as_ref()))
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
