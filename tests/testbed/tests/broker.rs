//! Private brokers: several at a time, killed, frozen, clustered.

use std::time::Duration;
use testbed::{Broker, Queue, QueueKind, image_present, missing};

fn works(broker: &Broker, kind: QueueKind) -> Queue {
    let queue = broker.declare("works").kind(kind).create();
    queue.publish("hello");
    queue.wait_ready(1);
    assert_eq!(queue.get().expect("a message").text(), "hello");
    queue
}

#[test]
fn two_brokers_start_side_by_side() {
    let brokers = std::thread::scope(|scope| {
        [(); 2].map(|()| scope.spawn(Broker::start)).map(|thread| thread.join().expect("both start"))
    });
    assert_ne!(brokers[0].port(), brokers[1].port());
    let processes = [0, 1].map(|index| brokers[index].processes());
    assert!(processes.iter().all(|pids| !pids.is_empty()));
    assert!(processes[0].iter().all(|pid| !processes[1].contains(pid)));
    let first = works(&brokers[0], QueueKind::Classic);
    assert!(brokers[1].client().counts(first.name()).expect("an answer").is_none());
    works(&brokers[1], QueueKind::Quorum);
}

#[test]
fn a_killed_broker_starts_again_with_its_queues() {
    let broker = Broker::start();
    for kind in QueueKind::ALL {
        let queue = broker.declare("kept").kind(kind).create();
        queue.publish_all(["a", "b"]);
        queue.wait_ready(2);
        broker.kill().expect("killed");
        broker.start_again().expect("the node starts again");
        queue.wait_ready(2);
        broker.restart().expect("the node restarts");
        queue.wait_ready(2);
    }
}

#[test]
fn a_frozen_broker_is_silent_until_it_is_thawed() {
    let broker = Broker::start();
    let queue = broker.queue("frozen");
    broker.freeze().expect("frozen");
    std::thread::scope(|scope| {
        let publisher = scope.spawn(|| queue.publish("x"));
        assert!(!testbed::eventually(Duration::from_millis(500), || { publisher.is_finished() }));
        broker.thaw().expect("thawed");
        publisher.join().expect("published after the thaw");
    });
    queue.wait_ready(1);
}

#[test]
fn rabbitmqctl_and_the_configuration_work() {
    let broker = Broker::with_config("default_vhost = other");
    broker.ctl(&["add_user", "anna", "s/cr@t"]).expect("a user");
    broker.ctl(&["set_permissions", "-p", "other", "anna", ".*", ".*", ".*"]).expect("permissions");
    let url = broker.url_for("anna", "s/cr@t", "other");
    testbed::Client::new(&url).queue("hers").publish("x");
    let error = broker.ctl(&["no_such_command"]).expect_err("an error");
    assert!(format!("{error:#}").contains("no_such_command"), "{error:#}");
}

#[test]
fn three_nodes_form_a_cluster() {
    let nodes = Broker::cluster(3);
    let queue = nodes[0].declare("replicated").kind(QueueKind::Quorum).create();
    queue.publish("x");
    nodes[0].kill().expect("killed");
    let elsewhere = nodes[1].client().clone();
    assert!(testbed::eventually(testbed::PATIENCE, || { matches!(elsewhere.counts(queue.name()), Ok(Some((1, _)))) }));
    nodes[0].start_again().expect("the node starts again");
    queue.wait_ready(1);
}

#[test]
fn every_image_works() {
    for tag in ["3-management", "4-management", "4.3-management"] {
        let image = format!("rabbitmq:{tag}");
        if !image_present(&image) {
            missing(&format!("the image {image}"));
            continue;
        }
        let broker = Broker::options().image(&image).start().expect("the node starts");
        let queue = works(&broker, QueueKind::Quorum);
        queue.publish("kept");
        broker.ctl(&["add_vhost", "other"]).expect("rabbitmqctl works");
        broker.kill().expect("killed");
        broker.start_again().expect("the node starts again");
        queue.wait_ready(1);
        broker.freeze().expect("frozen");
        broker.thaw().expect("thawed");
        broker.restart().expect("the node restarts");
        queue.wait_ready(1);
    }
}
