"""What is in the manifests, run: each container as its manifest describes it, against a RabbitMQ that runs from its own."""

import re
import shlex
import threading
import time

import pika
import pytest

import engine
import kube
from conftest import EXAMPLES, FRUITS, VERSION, manifest, shapes, shown
from test_valid import blocks, expanded  # noqa: F401  (expanded is a fixture)

pytestmark = pytest.mark.usefixtures("broker")


def processed(outcome):
    """The tasks that workers have started on, in the order of the pods."""
    return re.findall(r"^Processing (.*)$", outcome.logs, re.MULTILINE)


def empty(broker, queue="job1"):
    return broker.queues()[queue] == 0


# The work queue

def test_the_eight_fruits_come_out(cluster, broker, fill):
    filled = fill()
    assert broker.queues() == {"job1": 8}
    outcome = cluster.run_job(manifest("work-queue/job.yaml"))
    assert outcome.condition == "Complete"
    assert outcome.statuses == [0] * 8
    assert sorted(processed(outcome)) == FRUITS
    assert outcome.most_at_a_time == 2
    assert empty(broker)
    # And it looks as the README says.
    readme = EXAMPLES / "work-queue/README.md"
    assert shapes(filled.logs) == shapes(shown(readme, "kubectl logs job/fill-job1"))
    assert shapes(outcome.logs) == shapes(shown(readme, "kubectl logs -l job-name=job-wq-1"))


def test_a_fruit_that_fails_comes_back_and_is_done(cluster, broker, fill):
    fill()
    outcome = cluster.run_job(manifest("work-queue/job.yaml"), environment={"FAIL_FIRST": "cherry"})
    assert outcome.condition == "Complete"
    assert sorted(outcome.statuses) == [0] * 8 + [1]
    assert [pod.action for pod in outcome.pods if pod.status] == ["Count"]
    assert sorted(processed(outcome)) == sorted([*FRUITS, "cherry"])
    assert empty(broker)


def test_a_job_is_not_complete_while_a_task_keeps_failing(cluster, broker, fill):
    fill("apple", "")
    outcome = cluster.run_job(manifest("work-queue/job.yaml", completions=2, backoffLimit=3))
    assert (outcome.condition, outcome.reason) == ("Failed", "BackoffLimitExceeded")
    assert sorted(outcome.statuses) == [0, 1, 1, 1, 1]
    assert broker.queues()["job1"] == 1


def test_fewer_completions_leave_messages_in_the_queue(cluster, broker, fill):
    fill()
    outcome = cluster.run_job(manifest("work-queue/job.yaml", completions=6))
    assert outcome.condition == "Complete"
    assert len(processed(outcome)) == 6
    assert broker.queues()["job1"] == 2


def test_more_completions_end_well_after_the_wait(cluster, broker, fill):
    fill()
    outcome = cluster.run_job(manifest("work-queue/job.yaml", completions=10), environment={"QCONSUME_WAIT": "2s"})
    assert outcome.condition == "Complete"
    assert outcome.statuses == [0] * 10
    assert sorted(processed(outcome)) == FRUITS


def test_a_pod_whose_success_was_not_counted_is_made_up_for(cluster, broker, fill):
    """The tutorial's race: the message is acknowledged, and the node is gone before the pod's status is known."""
    fill("apple", "banana")
    job = manifest("work-queue/job.yaml", completions=2, parallelism=1)
    lost = cluster.start(kube.pod_spec(job), what="lost")
    assert engine.wait(lost) == 0
    outcome = cluster.run_job(job, environment={"QCONSUME_WAIT": "2s"})
    assert outcome.condition == "Complete"
    assert len(processed(outcome)) == 1
    assert empty(broker)


def test_an_eviction_is_ignored_and_its_task_done_by_another(cluster, broker, fill):
    fill("apple", "banana")
    evicted = []

    def evict_one(active):
        for pod in active:
            if not evicted and "Processing" in pod.logs:
                pod.disrupted = True
                evicted.append(pod)
                threading.Thread(target=engine.docker, args=("stop", pod.name)).start()

    outcome = cluster.run_job(manifest("work-queue/job.yaml", completions=2, backoffLimit=0),
                              environment={"WORK_SECONDS": "5"}, on_tick=evict_one)
    assert outcome.condition == "Complete"
    assert [pod.action for pod in evicted] == ["Ignore"]
    # As a failure of the command from the outside: --failure-exit-code is for those, too.
    assert sorted(outcome.statuses) in ([0, 0, 1], [0, 0, 143])
    assert sorted(set(processed(outcome))) == ["apple", "banana"]
    assert empty(broker)


@pytest.mark.parametrize("what, changes, status", [
    ("the command isn't there", {"args": ["/usr/bin/no-such-worker.py"]}, 127),
    ("the command can't be run", {"args": ["/etc/passwd"]}, 126),
    ("the queue isn't there", {"environment": {"QUEUE": "no-such-queue", "QCONSUME_CONNECT_TIMEOUT": "1s"}}, 78),
    ("the password is wrong", {"environment": {"BROKER_URL": "amqp://jobs:wrong@rabbitmq-service"}}, 77),
    ("the URL is none", {"environment": {"BROKER_URL": "rabbitmq-service:5672"}}, 64),
])
def test_what_can_not_be_mended_fails_the_job_at_once(cluster, broker, fill, what, changes, status):
    fill()
    outcome = cluster.run_job(manifest("work-queue/job.yaml", parallelism=1), **changes)
    assert (outcome.condition, outcome.reason) == ("Failed", "PodFailurePolicy"), outcome.logs
    assert outcome.statuses == [status]
    assert broker.queues()["job1"] == 8


def test_the_commands_own_77_does_not_fail_the_job(cluster, broker, fill):
    fill("apple")
    outcome = cluster.run_job(manifest("work-queue/job.yaml", completions=1, parallelism=1, backoffLimit=1),
                              args=["sh", "-c", '[ "$MESSAGE_REDELIVERED" = true ] || exit 77'])
    assert outcome.condition == "Complete"
    assert outcome.statuses == [1, 0]


def test_a_broker_that_is_not_there_yet_costs_no_tries(cluster, broker, fill):
    fill("apple")
    job = manifest("work-queue/job.yaml", completions=1, parallelism=1, backoffLimit=0)
    where = {"BROKER_URL": "amqp://jobs:change-me@not-there-yet:5672", "QCONSUME_CONNECT_TIMEOUT": "1s"}

    def ended(active):
        if len(tried) < 2 and active[0].name not in tried:
            tried.append(active[0].name)
        elif len(tried) == 2:
            raise StopIteration

    tried = []
    with pytest.raises(StopIteration):
        cluster.run_job(job, environment=where, on_tick=ended)
    assert engine.wait(tried[0]) == 69


# Short tasks

# Without the minute that the manifest's drainers wait for delayed retries; this broker has none.
SOON = {"QCONSUME_WAIT": "0s"}


def test_two_drainers_empty_the_queue(cluster, broker, fill):
    fill()
    outcome = cluster.run_job(manifest("work-queue/job-drain.yaml"), environment=SOON)
    assert outcome.condition == "Complete"
    assert outcome.statuses == [0, 0]
    assert sorted(processed(outcome)) == FRUITS
    assert empty(broker)


def test_a_drainer_whose_task_failed_is_replaced(cluster, broker, fill):
    fill()
    outcome = cluster.run_job(manifest("work-queue/job-drain.yaml"), environment=SOON | {"FAIL_FIRST": "melon"})
    assert outcome.condition == "Complete"
    assert sorted(outcome.statuses) == [0, 0, 1]
    assert sorted(processed(outcome)) == sorted([*FRUITS, "melon"])
    assert empty(broker)


def test_without_completions_a_failed_task_stays_behind(cluster, broker, fill):
    """What job-drain.yaml warns of, and why it has completions."""
    fill("melon")
    job = manifest("work-queue/job-drain.yaml")
    del job["spec"]["completions"]

    def let_it_fail(active):
        """As soon as the other drainer has found the queue empty, and ended."""
        if len(active) == 1:
            engine.docker("exec", active[0].name, "touch", "/dev/shm/go", check=False)

    outcome = cluster.run_job(job, environment=SOON, on_tick=let_it_fail, args=[
        "sh", "-c", "until [ -e /dev/shm/go ]; do sleep 0.1; done; exit 1"])
    assert outcome.condition == "Complete"
    assert sorted(outcome.statuses) == [0, 1]
    assert broker.queues()["job1"] == 1


def test_a_drainer_finds_an_empty_queue_and_is_done(cluster, broker, fill):
    fill("apple")
    cluster.run_job(manifest("work-queue/job-drain.yaml", completions=1, parallelism=1), environment=SOON)
    outcome = cluster.run_job(manifest("work-queue/job-drain.yaml"), environment=SOON)
    assert (outcome.condition, outcome.statuses) == ("Complete", [0, 0])


# Tasks that may fail for good

def test_an_indexed_job_does_the_others_and_says_how_many_failed(cluster, broker, fill):
    broker.set_up()
    # One is bad at sight (a 65), one fails every time; six are fruits.
    fill("", "bad", *FRUITS[:6])
    outcome = cluster.run_job(manifest("work-queue/job-indexed.yaml"), args=[
        "sh", "-c", 'task=$(cat); [ "$task" = bad ] && exit 9; printf %s "$task" | WORK_SECONDS=0 /usr/bin/worker.py'])
    assert (outcome.condition, outcome.reason) == ("Failed", "FailedIndexes")
    assert sorted(processed(outcome)) == FRUITS[:6]
    assert len(outcome.failed_indexes) == 2
    assert sorted(outcome.statuses) == [0] * 6 + [1, 1] + [65, 65]
    assert broker.queues() == {"job1": 0, "job1.dead": 2}


# KEDA

def test_kedas_pods_take_one_message_each_and_a_surplus_one_ends_well(cluster, broker, fill):
    fill("apple", "banana")
    [_, scaled_job] = kube.load((EXAMPLES / "keda/scaledjob.yaml").read_text())
    job = {"kind": "Job", "metadata": scaled_job["metadata"], "spec": scaled_job["spec"]["jobTargetRef"]}
    pods = [cluster.start(kube.pod_spec(job), what="keda") for _ in range(3)]
    begin = time.monotonic()
    assert [engine.wait(pod) for pod in pods] == [0, 0, 0]
    assert time.monotonic() - begin < 20
    assert sorted(re.findall("^Processing (.*)$", "".join(map(engine.logs, pods)), re.MULTILINE)) == ["apple", "banana"]
    assert empty(broker)


# Expansions

def documents(expanded, pattern):
    return [document for file in sorted(expanded.glob(pattern)) for document in kube.load(file.read_text())]


@pytest.mark.parametrize("pattern, tasks", [
    ("jobs/*.yaml", ["apple", "banana", "cherry"]),
    ("jobs.yaml", [f"http://dbpedia.org/resource/{fruit}" for fruit in ("Apple", "Banana", "Cherry?a=1&b=it's")]),
])
def test_a_job_per_item(cluster, expanded, pattern, tasks):  # noqa: F811
    outcomes = [cluster.run_job(job) for job in documents(expanded, pattern)]
    assert [outcome.condition for outcome in outcomes] == ["Complete"] * 3
    assert [processed(outcome) for outcome in outcomes] == [[task] for task in tasks]


@pytest.mark.parametrize("pattern", ["jobs-queues/*.yaml", "queue-jobs.yaml"])
def test_a_job_per_queue(cluster, broker, fill, expanded, pattern):  # noqa: F811
    jobs = documents(expanded, pattern)
    assert len(jobs) == 3
    queues = [cluster.environment(kube.pod_spec(job)["containers"][0])["QUEUE"] for job in jobs]
    for queue in queues:
        fill(*(f"{queue}-{n}" for n in (1, 2, 3)), queue=queue)
    for job, queue in zip(jobs, queues):
        outcome = cluster.run_job(job)
        assert outcome.condition == "Complete"
        assert sorted(processed(outcome)) == [f"{queue}-{n}" for n in (1, 2, 3)]
    assert set(broker.queues().values()) == {0}


# The one-liners

def kubectl_runs():
    """Every "kubectl run" of the READMEs, as (options, command)."""
    for readme in ("work-queue/README.md", "expansion/README.md"):
        for block in blocks(readme):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip().startswith("kubectl run "):
                    words = shlex.split(line.replace("$i", "apple"))
                    options = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
                    yield pytest.param(options, words[words.index("--") + 1:], id=f"{readme}: {words[2]}")


@pytest.mark.parametrize("options, command", list(kubectl_runs()))
def test_the_readmes_kubectl_run(cluster, broker, fill, options, command):
    assert options["image"] == f"qconsume:{VERSION}"
    assert options["restart"] == "Never"
    fill("apple", queue="job1")
    name, value = options["env"].split("=", 1)
    assert (name, value) == ("BROKER_URL", "$url")
    before = sum(broker.queues().values())
    pod = cluster.start({"containers": [{"image": options["image"], "args": command}]},
                        environment={name: cluster.secrets["rabbitmq-secret"]["url"]})
    assert engine.wait(pod) == 0, engine.logs(pod)
    after = sum(broker.queues().values())
    assert after > before if "/qpublish" in command else after == before - 1


# The broker

def test_the_queue_outlives_the_brokers_pod(start_broker):
    first = start_broker(aliases=()).wait()
    with first.channel() as channel:
        channel.queue_declare("job1", durable=True, arguments={"x-queue-type": "quorum"})
        channel.confirm_delivery()
        channel.basic_publish("", "job1", b"apple")
    [volume] = [mount["Name"] for mount in engine.inspect(first.name)["Mounts"] if mount["Type"] == "volume"]
    # In its own words, as not every image passes a TERM on. A node that is killed within seconds of the queue's declaration
    # forgets the queue's member, seen with 4.0.5.
    engine.docker("exec", first.name, "rabbitmqctl", "-q", "stop", check=False)
    engine.wait(first.name)
    engine.docker("rm", first.name)
    second = start_broker(aliases=(), volumes={"rabbitmq-data": volume}).wait()

    def is_there():
        # A quorum queue is there before it has a leader, and before its messages are counted.
        try:
            return second.queues() == {"job1": 1}
        except pika.exceptions.AMQPError:
            return False

    engine.until("the message is there again", is_there)


# The queue for production

@pytest.mark.parametrize("version", ["3", "4", "4.3"])
def test_the_queue_is_set_up_on_every_version(broker_of, version):
    broker = broker_of(version)
    broker.set_up()
    said = broker.set_up()
    broker.set_up("other.queue")
    policies = broker.policies()
    assert policies["job1"]["delivery-limit"] == 5
    assert policies["job1"]["dead-letter-strategy"] == "at-least-once"
    assert ("consumer-timeout" in policies["job1"]) == (version != "3")
    assert ("delayed-retry-type" in policies["job1"]) == (version == "4.3") == said.endswith("delayed retry")
    rows = broker.ctl("list_queues", "--no-table-headers", "name", "type", "policy").splitlines()
    assert {tuple(row.split("\t")) for row in rows} == {
        (name, "quorum", name if name in policies else "") for name in
        ("job1", "job1.dead", "other.queue", "other.queue.dead")}
    assert ("job1.dead" in policies) == (version != "3")


def test_a_drainer_waits_for_a_delayed_retry(cluster, broker_of):
    """After the first failure it is ten seconds, so that this needn't be the manifest's whole minute."""
    broker = broker_of("4.3")
    broker.set_up()
    where = {"BROKER_URL": f"amqp://guest:guest@{broker.name}"}
    cluster.run_job(manifest("work-queue/fill-job.yaml"), environment=where)
    outcome = cluster.run_job(manifest("work-queue/job-drain.yaml"), environment=where | {
        "FAIL_FIRST": "melon", "QCONSUME_WAIT": "20s"})
    assert outcome.condition == "Complete"
    assert sorted(outcome.statuses) == [0, 0, 1]
    assert sorted(processed(outcome)) == sorted([*FRUITS, "melon"])
    assert broker.queues() == {"job1": 0, "job1.dead": 0}


def test_the_dead_letters_are_looked_at_and_moved_back(cluster, broker, debian_image, fill):
    broker.set_up()
    fill("apple", queue="job1.dead")
    look, move_back = [block for block in blocks("rabbitmq/README.md") if "qconsume" in block]
    run = ["run", "--rm", "--network", cluster.network, *cluster.resolver(), "--env",
           f"BROKER_URL={cluster.secrets['rabbitmq-secret']['url']}", debian_image, "sh", "-c"]
    assert engine.docker(*run, look + "\necho $?").splitlines()[0::2] == ["apple", "1"]
    assert broker.queues() == {"job1": 0, "job1.dead": 1}
    engine.docker(*run, move_back)
    assert broker.queues() == {"job1": 1, "job1.dead": 0}
