//! `qpublish`, whatever it is called.

fn main() {
    qconsume::main(qconsume::Program::Qpublish)
}
