//! `qconsume`, or `qpublish` if it is called by that name, so that one file serves as both in the image.

use qconsume::Program;

fn main() {
    qconsume::main(Program::called(std::env::args_os().next().as_deref()))
}
