//! `qpublish`, independent of the file's name.

fn main() {
    qconsume::main(qconsume::Program::Qpublish)
}
