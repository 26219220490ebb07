//! A delivery on a cluster of three nodes, one of which dies or freezes.

use crate::common::{assert_gone, qconsume, until_there};
use std::path::PathBuf;
use std::time::Duration;
use testbed::owner::temp_folder;
use testbed::{Broker, PATIENCE, Program, Queue, Running};

/// Electing a leader and starting a node take several seconds each.
const LONG: Duration = Duration::from_secs(90);

/// qconsume with the addresses of these nodes, in this order.
fn worker<'a>(nodes: impl IntoIterator<Item = &'a Broker>, queue: &Queue) -> Program {
    let urls: Vec<_> = nodes.into_iter().map(Broker::url).collect();
    qconsume().url(&urls.join(",")).queue(queue.name()).args(["--heartbeat", "4"])
}

/// Starts the worker and waits for its command, which succeeds once the returned file exists.
fn started(worker: Program) -> (Running, PathBuf) {
    let file = temp_folder("cluster").join("file");
    let run = worker.shell(&until_there(&file)).spawn();
    run.wait_for_stdout("started", LONG);
    (run, file)
}

/// One test with one cluster, as starting a cluster takes longest. Each part leaves all nodes running.
#[test]
fn a_cluster_may_lose_nodes() {
    let nodes = Broker::cluster(3);
    let [first, second, third] = &nodes[..] else {
        panic!("three nodes");
    };
    the_node_that_a_worker_is_connected_to_dies_while_it_waits(first, second, third);
    the_node_that_a_worker_is_connected_to_dies_while_its_command_runs(first, second, third);
    a_queue_whose_home_node_is_down_is_waited_for(first, second);
    work_finished_while_the_leader_is_frozen_is_not_thrown_away(first, second, third);
    a_rolling_restart_is_waited_through(&nodes);
}

fn the_node_that_a_worker_is_connected_to_dies_while_it_waits(first: &Broker, second: &Broker, third: &Broker) {
    let queue = second.declare("waiting").quorum().create();
    let run = worker([first, second, third], &queue).args(["cat"]).spawn();
    queue.wait_consumers(1);
    first.kill().unwrap();
    run.wait_for_stderr("connecting again", PATIENCE);
    queue.publish("body");
    run.wait(LONG).assert_status(0);
    first.start_again().unwrap();
}

fn the_node_that_a_worker_is_connected_to_dies_while_its_command_runs(first: &Broker, second: &Broker, third: &Broker) {
    let queue = second.declare("running").quorum().create();
    queue.publish("body");
    let (run, _) = started(worker([first, second, third], &queue));
    first.kill().unwrap();
    run.wait(LONG).assert_status(75);
    // The list's first node is still down.
    let run = worker([first, second, third], &queue).args(["cat"]).spawn();
    let run = run.wait(LONG);
    run.assert_status(0);
    assert_eq!(run.stdout_text(), "body");
    first.start_again().unwrap();
}

fn a_queue_whose_home_node_is_down_is_waited_for(first: &Broker, second: &Broker) {
    let queue = first.queue("home");
    queue.publish("body");
    first.stop().unwrap();
    let run = worker([second], &queue).args(["--connect-timeout", "5m", "cat"]).spawn();
    run.wait_for_stderr("is not available now", PATIENCE);
    first.start_again().unwrap();
    let run = run.wait(LONG);
    run.assert_status(0);
    assert_eq!(run.stdout_text(), "body");
}

fn work_finished_while_the_leader_is_frozen_is_not_thrown_away(first: &Broker, second: &Broker, third: &Broker) {
    // A queue's leader is on the node that declares it.
    let queue = first.declare("leader").quorum().create();
    queue.publish("body");
    let (run, file) = started(worker([second, third], &queue));
    first.freeze().unwrap();
    std::fs::write(&file, "").unwrap();
    // Longer than a settlement takes otherwise. The worker keeps waiting, as its own node still sends heartbeats.
    std::thread::park_timeout(Duration::from_secs(12));
    first.thaw().unwrap();
    let run = run.wait(2 * LONG);
    run.assert_status(0);
    assert!(run.wall > Duration::from_secs(10), "{:?}", run.wall);
    assert_gone(&queue);
}

fn a_rolling_restart_is_waited_through(nodes: &[Broker]) {
    let queue = nodes[0].declare("rolling").quorum().create();
    let run = worker(nodes, &queue).args(["--connect-timeout", "3m", "cat"]).spawn();
    queue.wait_consumers(1);
    for node in nodes {
        node.restart().unwrap();
        assert!(!run.has_ended(), "{}", run.stderr());
    }
    queue.publish("body");
    let run = run.wait(LONG);
    run.assert_status(0);
    assert_eq!(run.stdout_text(), "body");
}
