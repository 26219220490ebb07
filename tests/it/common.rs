//! What the tests have in common: the programs under test.

use testbed::Program;

/// qconsume, as the build has left it.
pub fn qconsume() -> Program {
    Program::new(env!("CARGO_BIN_EXE_qconsume"))
}

/// qpublish, likewise.
pub fn qpublish() -> Program {
    Program::new(env!("CARGO_BIN_EXE_qpublish"))
}
