"""The manifests' broker, and the queue that set-up.sh creates, on every version of RabbitMQ."""

import json
import shlex

import pika
import pytest

import engine
import kube
from conftest import EXAMPLES, FRUITS, VERSION, manifest
from test_run import processed
from test_valid import blocks

pytestmark = pytest.mark.usefixtures("broker")


# The one-liner

def test_the_readmes_kubectl_run(cluster, broker):
    [block] = [block for block in blocks("work-queue/README.md") if "kubectl run" in block]
    words = shlex.split(block)
    options = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
    spec = json.loads(options["overrides"])["spec"]
    [container] = spec["containers"]
    assert (options["image"], options["restart"]) == (container["image"], "Never") == (f"qconsume:{VERSION}", "Never")
    # The Pod Security Standard "restricted" requires these.
    assert spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    pod = cluster.start(spec)
    assert engine.wait(pod) == 0, engine.logs(pod)
    assert broker.queues() == {"foo": 1}


# The broker

def test_the_queue_outlives_the_brokers_pod(start_broker):
    first = start_broker(aliases=()).wait()
    with first.channel() as channel:
        channel.queue_declare("job1", durable=True, arguments={"x-queue-type": "quorum"})
        channel.confirm_delivery()
        channel.basic_publish("", "job1", b"apple")
    [volume] = [mount["Name"] for mount in engine.inspect(first.name)["Mounts"] if mount["Type"] == "volume"]
    # Not by `docker stop`, as not every image forwards SIGTERM. If a node is killed within seconds of the queue's
    # declaration, it forgets its member of the queue (seen with 4.0.5).
    engine.docker("exec", first.name, "rabbitmqctl", "-q", "stop", check=False)
    engine.wait(first.name)
    engine.docker("rm", first.name)
    second = start_broker(aliases=(), volumes={"rabbitmq-data": volume}).wait()

    def is_there():
        # A quorum queue exists before it has a leader and counts its messages.
        try:
            return second.queues() == {"job1": 1}
        except pika.exceptions.AMQPError:
            return False

    engine.until("the message is in the queue again", is_there)


# The queue for production

@pytest.mark.parametrize("version", ["3", "4", "4.3"])
def test_the_queue_is_set_up_on_every_version(broker_of, version):
    broker = broker_of(version)
    broker.set_up()
    said = broker.set_up()
    broker.set_up("other.queue")
    policies = broker.policies()
    assert policies["job1"]["delivery-limit"] == 20
    assert policies["job1"]["dead-letter-strategy"] == "at-least-once"
    assert ("consumer-timeout" in policies["job1"]) == (version != "3")
    assert ("delayed-retry-type" in policies["job1"]) == (version == "4.3") == said.endswith("delayed retry")
    rows = broker.ctl("list_queues", "--no-table-headers", "name", "type", "policy").splitlines()
    assert {tuple(row.split("\t")) for row in rows} == {
        (name, "quorum", name if name in policies else "") for name in
        ("job1", "job1.dead", "other.queue", "other.queue.dead")}
    assert ("job1.dead" in policies) == (version != "3")


def test_a_drainer_waits_for_a_delayed_retry(cluster, broker_of):
    """The first retry is delayed by ten seconds, so a shorter wait than the manifest's minute is enough."""
    broker = broker_of("4.3")
    broker.set_up()
    where = {"BROKER_URL": f"amqp://guest:guest@{broker.name}"}
    cluster.run_job(manifest("work-queue/fill-job.yaml"), environment=where)
    outcome = cluster.run_job(manifest("work-queue/job-drain.yaml"), environment=where | {
        "FAIL_FIRST": "melon", "QCONSUME_WAIT": "30s"})
    assert outcome.condition == "Complete"
    assert outcome.statuses == [0, 0]
    assert sorted(processed(outcome)) == sorted([*FRUITS, "melon"])
    assert broker.queues() == {"job1": 0, "job1.dead": 0}


def test_the_dead_letters_are_looked_at_and_moved_back(cluster, broker, debian_image, fill):
    broker.set_up()
    fill("apple", queue="job1.dead")
    look, move_back = [block for block in blocks("rabbitmq/README.md") if "qconsume" in block]
    look = look.replace("--wait 1s", "--wait 60s")  # for a busy machine
    run = ["run", "--rm", "--network", cluster.network, *cluster.resolver(), "--env",
           f"BROKER_URL={cluster.secrets['rabbitmq-secret']['url']}", debian_image, "sh", "-c"]
    assert engine.docker(*run, look + "\necho $?").splitlines()[0::2] == ["apple", "1"]
    broker.comes_to({"job1": 0, "job1.dead": 1})
    engine.docker(*run, move_back)
    assert broker.queues() == {"job1": 1, "job1.dead": 0}
