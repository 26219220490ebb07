//! `bench`: what qconsume costs, compared with amqp-consume.

use clap::Parser;
use testbed::bench;

fn main() -> anyhow::Result<()> {
    bench::run(&bench::Options::parse())
}
