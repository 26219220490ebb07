//! `qconsume`; under the name `qpublish`, that: one file serves for both, as it does in the image.

use qconsume::Program;

fn main() {
    qconsume::main(Program::called(std::env::args_os().next().as_deref()))
}
