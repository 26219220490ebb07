"""Runs containers as the manifests describe them, against a RabbitMQ that runs from its own manifest."""

import re
import threading

import pytest

import engine
import kube
from conftest import EXAMPLES, FRUITS, ROOT, manifest, shapes, shown
from test_valid import expanded  # noqa: F401  (expanded is a fixture)

pytestmark = pytest.mark.usefixtures("broker")


def processed(outcome):
    """The tasks that the workers started, in the order of the pods."""
    return re.findall(r"^Processing (.*)$", outcome.logs, re.MULTILINE)


def empty(broker, queue="job1"):
    return broker.queues()[queue] == 0


def endless(when):
    """The arguments of a worker that, under this condition, runs until it is stopped, so its pod can't succeed before."""
    return ["sh", "-c", f'task=$(cat); if [ {when} ]; then export WORK_SECONDS=1000000; fi; '
                        'printf %s "$task" | /usr/bin/worker.py']


def kill_at(task, times=100):
    """Kills the pods that start this task, as the OOM killer does: qconsume has no chance to close its connection."""
    killed = []

    def look(active):
        for pod in active:
            if len(killed) < times and pod not in killed and f"Processing {task}\n" in pod.logs:
                killed.append(pod)
                engine.docker("kill", pod.name)

    return look


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
    # The logs look as in the README.
    readme = EXAMPLES / "work-queue/README.md"
    assert shapes(filled.logs) == shapes(shown(readme, "kubectl logs job/fill-job1"))
    assert shapes(outcome.logs) == shapes(shown(readme, "kubectl logs -l job-name=job-wq-1"))


def test_the_job_of_the_front_page_works(cluster, broker, fill):
    """Its dozen lines, with the image and the Secret of the work queue."""
    [text] = re.findall(r"```yaml\n(apiVersion:.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [job] = kube.load(text.replace("name: broker,", "name: rabbitmq-secret,"))
    fill()
    outcome = cluster.run_job(job)
    assert outcome.condition == "Complete", outcome.logs
    assert outcome.statuses == [0] * 8
    assert sorted(processed(outcome)) == FRUITS
    assert outcome.most_at_a_time == 2
    assert empty(broker)


def test_a_fruit_that_fails_comes_back_and_is_done(cluster, broker, fill):
    fill()
    outcome = cluster.run_job(manifest("work-queue/job.yaml"), environment={"FAIL_FIRST": "cherry"})
    assert outcome.condition == "Complete"
    assert sorted(outcome.statuses) == [0] * 8 + [1]
    assert [pod.action for pod in outcome.pods if pod.status] == ["Count"]
    assert sorted(processed(outcome)) == sorted([*FRUITS, "cherry"])
    assert empty(broker)


def test_a_job_is_not_complete_while_a_task_keeps_failing(cluster, broker, fill):
    """If nothing dead-letters the task, backoffLimit ends the Job. The pauses before are 10, 20 and 40 s."""
    fill("apple", "banana")
    outcome = cluster.run_job(manifest("work-queue/job.yaml", completions=2, backoffLimit=3), environment={
        "QCONSUME_MAX_ATTEMPTS": "100"}, args=["sh", "-c", '[ "$(cat)" = banana ]'])
    assert (outcome.condition, outcome.reason) == ("Failed", "BackoffLimitExceeded")
    assert outcome.statuses.count(1) == 4
    # The apple may be left, too, because a requeued message is delivered first.
    broker.comes_to({"job1": 2 - outcome.statuses.count(0)})


def test_fewer_completions_leave_messages_in_the_queue(cluster, broker, fill):
    fill()
    outcome = cluster.run_job(manifest("work-queue/job.yaml", completions=6))
    assert outcome.condition == "Complete"
    assert len(processed(outcome)) == 6
    assert broker.queues()["job1"] == 2


def test_more_completions_fail_after_the_wait(cluster, broker, fill):
    fill()
    outcome = cluster.run_job(manifest("work-queue/job.yaml", completions=10), environment={"QCONSUME_WAIT": "20s"})
    assert (outcome.condition, outcome.reason) == ("Failed", "PodFailurePolicy")
    assert 66 in outcome.statuses
    assert sorted(processed(outcome)) == FRUITS
    assert empty(broker)


ALWAYS_FAILS = ["sh", "-c", 'task=$(cat); [ "$task" = cherry ] && exit 9; printf %s "$task" | WORK_SECONDS=0 /usr/bin/worker.py']
# A drainer always waits for the whole time; it must be longer than another drainer's task takes on a busy machine.
WAITS = [("job", "5m"), ("job-drain", "20s")]


@pytest.mark.parametrize("file, wait", WAITS)
def test_a_job_is_never_complete_with_a_task_undone(cluster, broker, fill, file, wait):
    """With the queue that set-up.sh creates, and a task that always fails."""
    broker.set_up()
    fill()
    outcome = cluster.run_job(manifest(f"work-queue/{file}.yaml"), args=ALWAYS_FAILS, environment={"QCONSUME_WAIT": wait})
    assert (outcome.condition, outcome.reason) == ("Failed", "PodFailurePolicy")
    assert 65 in outcome.statuses
    engine.until("the task is dead-lettered", lambda: broker.queues()["job1.dead"] == 1)
    if file == "job-drain":
        assert sorted(processed(outcome)) == sorted(set(FRUITS) - {"cherry"})
        assert empty(broker)


@pytest.mark.parametrize("file, wait", WAITS)
def test_dead_letters_may_be_wanted(cluster, broker, fill, file, wait):
    broker.set_up()
    fill()
    outcome = cluster.run_job(manifest(f"work-queue/{file}.yaml"), args=ALWAYS_FAILS,
                              environment={"QCONSUME_WAIT": wait, "QCONSUME_REJECT_EXIT_CODE": "0"})
    assert outcome.condition == "Complete"
    assert sorted(processed(outcome)) == sorted(set(FRUITS) - {"cherry"})
    broker.comes_to({"job1": 0, "job1.dead": 1})


def test_a_task_that_kills_its_pod_fails_the_job(cluster, broker, fill):
    """qconsume is killed, too, so only the queue counts the attempts."""
    broker.set_up()
    fill("apple", "banana")
    outcome = cluster.run_job(manifest("work-queue/job-drain.yaml", parallelism=1, completions=1),
                              args=endless('"$task" = banana'), on_tick=kill_at("banana"))
    assert (outcome.condition, outcome.reason) == ("Failed", "BackoffLimitExceeded")
    assert outcome.statuses == [137] * 7
    broker.comes_to({"job1": 1, "job1.dead": 0})


def test_a_deleted_pod_counts_and_its_log_is_gone(cluster, broker, fill):
    fill("apple", "banana")
    deleted = []

    def delete_one(active):
        for pod in active:
            if not deleted and "Processing apple\n" in pod.logs:
                deleted.append(pod)
                pod.delete()

    outcome = cluster.run_job(manifest("work-queue/job.yaml", completions=2), on_tick=delete_one,
                              args=endless('"$task$MESSAGE_ATTEMPT" = apple1'))
    assert outcome.condition == "Complete"
    assert [pod.action for pod in deleted] == ["Count"]
    assert (outcome.failed, deleted[0].logs) == (1, "")
    assert empty(broker)


def test_the_end_of_a_job_stops_the_others_and_counts_them(cluster, broker, fill):
    """The stopped pods' messages are requeued."""
    fill("apple")
    added = []

    def add_one(active):
        """Publishes the task that fails the Job, once the other task has started."""
        if not added and any("Processing apple\n" in pod.logs for pod in active):
            added.append("")
            with broker.channel() as channel:
                channel.confirm_delivery()
                channel.basic_publish("", "job1", b"")

    outcome = cluster.run_job(manifest("work-queue/job.yaml", completions=2), args=endless('"$task" = apple'), on_tick=add_one)
    assert (outcome.condition, outcome.failed) == ("Failed", 2)
    assert sorted(outcome.statuses) == [1, 65]
    assert "dead-lettered" in next(pod for pod in outcome.pods if pod.status == 65).termination_message
    broker.comes_to({"job1": 1})


def test_a_pod_whose_success_was_not_counted_is_made_up_for(cluster, broker, fill):
    """The tutorial's race: the message is acknowledged, but the node is lost before the pod's status is recorded."""
    fill("apple", "banana")
    job = manifest("work-queue/job.yaml", completions=2, parallelism=1)
    lost = cluster.start(kube.pod_spec(job), what="lost")
    assert engine.wait(lost) == 0
    outcome = cluster.run_job(job, environment={"QCONSUME_WAIT": "10s"})
    # A false alarm: all tasks are done, as the empty queue shows.
    assert (outcome.condition, outcome.statuses) == ("Failed", [0, 66])
    assert len(processed(outcome)) == 1
    assert empty(broker)


def test_an_eviction_is_ignored_and_its_task_done_by_another(cluster, broker, fill):
    fill("apple", "banana")
    evicted = []

    def evict_one(active):
        for pod in active:
            if not evicted and "Processing apple\n" in pod.logs:
                pod.disrupted = True
                evicted.append(pod)
                threading.Thread(target=engine.docker, args=("stop", pod.name)).start()

    outcome = cluster.run_job(manifest("work-queue/job.yaml", completions=2, backoffLimit=0),
                              args=endless('"$task$MESSAGE_ATTEMPT" = apple1'), on_tick=evict_one)
    assert outcome.condition == "Complete"
    assert [pod.action for pod in evicted] == ["Ignore"]
    # The evicted command failed, and --failure-exit-code applies to that failure, too.
    assert sorted(outcome.statuses) == [0, 0, 1]
    assert sorted(processed(outcome)) == ["apple", "apple", "banana"]
    assert empty(broker)


@pytest.mark.parametrize("what, changes, status", [
    ("the command isn't there", {"args": ["/usr/bin/no-such-worker.py"]}, 127),
    ("the command can't be run", {"args": ["/etc/passwd"]}, 126),
    ("the queue isn't there", {"environment": {"QUEUE": "no-such-queue", "QCONSUME_CONNECT_TIMEOUT": "20s"}}, 78),
    ("the password is wrong", {"environment": {"BROKER_URL": "amqp://jobs:wrong@rabbitmq-service"}}, 77),
    ("the URL is malformed", {"environment": {"BROKER_URL": "rabbitmq-service:5672"}}, 64),
])
def test_an_error_that_no_retry_can_fix_fails_the_job_at_once(cluster, broker, fill, what, changes, status):
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


def test_pods_that_give_up_come_ever_more_slowly(cluster, broker, fill):
    """Ignored failures delay the next pod, too; therefore the manifests' QCONSUME_CONNECT_TIMEOUT is long."""
    fill("apple")
    where = {"BROKER_URL": "amqp://jobs:change-me@not-there-yet:5672", "QCONSUME_CONNECT_TIMEOUT": "1s"}
    started = []

    def look(active):
        started.extend(pod.started for pod in active if pod.started not in started)
        if len(started) == 4:
            raise StopIteration

    with pytest.raises(StopIteration):
        cluster.run_job(manifest("work-queue/job.yaml", completions=1, parallelism=1), environment=where, on_tick=look)
    assert [later - earlier >= pause for earlier, later, pause in zip(started, started[1:], (10, 20, 40))] == [True] * 3


def test_a_broker_that_comes_late_costs_no_pod(cluster, broker, fill):
    """qconsume waits in the pod, up to the manifest's QCONSUME_CONNECT_TIMEOUT."""
    fill("apple")
    engine.docker("pause", broker.name)
    try:
        pod = cluster.start(kube.pod_spec(manifest("work-queue/job.yaml")), what="early")
        engine.until("qconsume logs that it waits", lambda: "still waiting for the AMQP handshake" in engine.logs(pod))
        assert kube.running(pod)
    finally:
        engine.docker("unpause", broker.name)
    assert engine.wait(pod) == 0
    assert empty(broker)


# Short tasks

# The manifest's drainers wait a minute for delayed retries, which this broker doesn't have.
SOON = {"QCONSUME_WAIT": "0s"}


def test_two_drainers_empty_the_queue(cluster, broker, fill):
    fill()
    outcome = cluster.run_job(manifest("work-queue/job-drain.yaml"), environment=SOON)
    assert outcome.condition == "Complete"
    assert outcome.statuses == [0, 0]
    assert sorted(processed(outcome)) == FRUITS
    assert empty(broker)


def test_failed_tasks_cost_drainers_no_pause(cluster, broker, fill):
    """Four of eight tasks fail once. If failures ended drainers, the next ones would start after 10, 20, 40 … seconds."""
    fill()
    outcome = cluster.run_job(manifest("work-queue/job-drain.yaml"), environment=SOON, args=[
        "sh", "-c", 'task=$(cat); case $task in [a-d]*) [ "$MESSAGE_REDELIVERED" = true ] || exit 9;; esac; '
                    'printf %s "$task" | /usr/bin/worker.py'])
    assert (outcome.condition, outcome.statuses) == ("Complete", [0, 0])
    assert sorted(processed(outcome)) == FRUITS
    assert empty(broker)


def test_tasks_that_fail_for_good_hold_up_no_other(cluster, broker, fill):
    """In an indexed Job, an index in back-off would keep its slot, and its tasks would wait."""
    broker.set_up()
    fill("", "bad", *FRUITS[:6])
    outcome = cluster.run_job(manifest("work-queue/job-drain.yaml"), environment={"QCONSUME_WAIT": "20s"}, args=[
        "sh", "-c", 'task=$(cat); [ "$task" = bad ] && exit 9; printf %s "$task" | WORK_SECONDS=0 /usr/bin/worker.py'])
    assert (outcome.condition, outcome.reason) == ("Failed", "PodFailurePolicy")
    assert sorted(processed(outcome)) == FRUITS[:6]
    assert len(outcome.pods) == 2
    broker.comes_to({"job1": 0, "job1.dead": 2})


def test_a_drainer_that_died_is_replaced(cluster, broker, fill):
    fill()
    # Not SOON: the broker first has to notice that the killed drainer's connection is gone.
    outcome = cluster.run_job(manifest("work-queue/job-drain.yaml"), environment={"QCONSUME_WAIT": "20s"},
                              args=endless('"$task$MESSAGE_ATTEMPT" = melon1'), on_tick=kill_at("melon", times=1))
    assert outcome.condition == "Complete"
    assert sorted(outcome.statuses) == [0, 0, 137]
    assert sorted(processed(outcome)) == sorted([*FRUITS, "melon"])
    assert empty(broker)


def test_without_completions_a_failed_task_stays_behind(cluster, broker, fill):
    """The reason why job-drain.yaml has completions, as its comment says."""
    fill("melon")
    job = manifest("work-queue/job-drain.yaml")
    del job["spec"]["completions"]
    # A failed task doesn't end a drainer, so it is killed.

    def kill_the_last(active):
        """Kills the drainer that holds the message, once the other has found the queue empty and ended."""
        if len(active) == 1:
            engine.docker("kill", active[0].name, check=False)

    outcome = cluster.run_job(job, environment=SOON, on_tick=kill_the_last, args=["sleep", "infinity"])
    assert outcome.condition == "Complete"
    assert sorted(outcome.statuses) == [0, 137]
    broker.comes_to({"job1": 1})


def test_a_drainer_finds_an_empty_queue_and_is_done(cluster, broker, fill):
    fill("apple")
    cluster.run_job(manifest("work-queue/job-drain.yaml", completions=1, parallelism=1), environment=SOON)
    outcome = cluster.run_job(manifest("work-queue/job-drain.yaml"), environment=SOON)
    assert (outcome.condition, outcome.statuses) == ("Complete", [0, 0])


# KEDA

def test_kedas_pods_take_one_message_each_and_a_surplus_one_ends_well(cluster, broker, fill):
    fill("apple", "banana")
    [_, scaled_job] = kube.load((EXAMPLES / "keda/scaledjob.yaml").read_text())
    job = {"kind": "Job", "metadata": scaled_job["metadata"], "spec": scaled_job["spec"]["jobTargetRef"]}
    pods = [cluster.start(kube.pod_spec(job), what="keda") for _ in range(3)]
    assert [engine.wait(pod) for pod in pods] == [0, 0, 0]
    logs = "".join(map(engine.logs, pods))
    assert sorted(re.findall("^Processing (.*)$", logs, re.MULTILINE)) == ["apple", "banana"]
    # The surplus pod waits no longer than this, as it takes another pod's place.
    assert re.findall(r"no message in queue .* within (\S+) \(--wait\)", logs) == ["10s"]
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
        outcome = cluster.run_job(job, environment=SOON)
        assert outcome.condition == "Complete"
        assert sorted(processed(outcome)) == [f"{queue}-{n}" for n in (1, 2, 3)]
    assert set(broker.queues().values()) == {0}
