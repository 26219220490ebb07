//! `qpublish`, whatever it is called.

use qconsume::Program;

fn main() {
    Program::Qpublish.main()
}
