"""Fixtures: the images, and a broker that runs from the work queue's manifests."""

import base64
import json
import os
import re
import subprocess
import tomllib
import urllib.parse
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pika
import pytest

import engine
import kube

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
VERSION = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
# A constant, so that all images share one compilation.
REVISION = "0123abc"
URL = "https://qconsume.example/project"
FRUITS = "apple banana cherry date fig grape lemon melon".split()

RABBITMQ = "rabbitmq:4-management"
PYTHON = "python:3-slim"
DEBIAN = "debian:bookworm-slim"
[RUST] = re.findall(r"(?m)^FROM .*(rust:\S+)", (ROOT / "docker/Dockerfile").read_text())


def missing(what):
    """Skips a test whose prerequisite this machine lacks; fails it with CI=true."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


def need(*images):
    for image in images:
        if not engine.has_image(image):
            missing(f"the image {image} is missing and can't be pulled")


@pytest.fixture(scope="session")
def docker():
    if not engine.available():
        missing("Docker is missing")
    engine.remove_orphans()
    yield engine
    engine.remove_own()


@pytest.fixture(scope="session")
def image(docker):
    """qconsume's image: the one that QCONSUME_TEST_IMAGE names, or else a new one."""
    if ready := os.environ.get("QCONSUME_TEST_IMAGE"):
        return ready
    need(RUST)
    subprocess.run(["make", "--directory", ROOT, "image", f"IMAGE={engine.RUN}", f"REVISION={REVISION}", f"URL={URL}"],
                   check=True, timeout=7200)
    return f"{engine.RUN}:{VERSION}"


@pytest.fixture(scope="session")
def worker_image(image):
    need(PYTHON)
    folder = EXAMPLES / "work-queue"
    text = (folder / "Dockerfile").read_text()
    assert text.count("--from=qconsume ") == 1
    return engine.build(f"{engine.RUN}:worker", folder, None, text=text.replace("--from=qconsume ", f"--from={image} "))


@pytest.fixture(scope="session")
def debian_image(image):
    """Both programs in Debian's image, which has a shell and another libc than theirs."""
    need(DEBIAN)
    text = f"FROM {DEBIAN}\nCOPY --from={image} /qconsume /qpublish /usr/bin/\n"
    return engine.build(f"{engine.RUN}:debian", ROOT / "examples", None, text=text)


@pytest.fixture(scope="session")
def network(docker):
    need(PYTHON)
    return kube.Cluster(PYTHON)


@pytest.fixture(scope="session")
def cluster(network, image, worker_image):
    need(RABBITMQ)
    network.images = {"job-wq-1:1": worker_image, f"qconsume:{VERSION}": image, RABBITMQ: RABBITMQ}
    for name in ("work-queue/rabbitmq-secret.yaml", "keda/scaledjob.yaml"):
        network.apply(*kube.load((EXAMPLES / name).read_text()))
    return network


class Broker:
    """A RabbitMQ in a container. Message counts come over AMQP, as those of the management API may be old."""

    def __init__(self, name, network, user="guest", password="guest"):
        self.name = name
        self.network = network
        self.user = user
        self.password = password

    @property
    def address(self):
        return engine.address(self.name, self.network)

    @contextmanager
    def channel(self):
        credentials = pika.PlainCredentials(self.user, self.password)
        parameters = pika.ConnectionParameters(self.address, credentials=credentials, socket_timeout=60, stack_timeout=120)
        with pika.BlockingConnection(parameters) as connection:
            yield connection.channel()

    def wait(self, timeout=600):
        def answers():
            assert kube.running(self.name), engine.logs(self.name)
            try:
                self.http("GET", "overview")
                with self.channel():
                    return True
            except (OSError, pika.exceptions.AMQPError):
                return False
        engine.until(f"{self.name} answers", answers, timeout)
        return self

    def http(self, method, *path):
        """The management API."""
        path = "/".join(urllib.parse.quote(part, safe="") for part in path)
        request = urllib.request.Request(f"http://{self.address}:15672/api/{path}", method=method)
        login = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        request.add_header("Authorization", f"Basic {login}")
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read() or "null")

    def queues(self):
        """The number of ready messages of each queue."""
        names = [queue["name"] for queue in self.http("GET", "queues", "/")]
        with self.channel() as channel:
            return {name: channel.queue_declare(name, passive=True).method.message_count for name in names}

    def comes_to(self, queues):
        """Waits for these numbers: messages are requeued or dead-lettered some time after their worker's end."""
        with suppress(AssertionError):
            engine.until("the queues' numbers", lambda: self.queues() == queues)
        assert self.queues() == queues

    def policies(self):
        return {policy["name"]: policy["definition"] for policy in self.http("GET", "policies", "/")}

    def clear(self):
        """Deletes all queues and policies."""
        for policy in self.policies():
            self.http("DELETE", "policies", "/", policy)
        for queue in self.http("GET", "queues", "/"):
            self.http("DELETE", "queues", "/", queue["name"])

    def ctl(self, *args):
        return engine.docker("exec", self.name, "rabbitmqctl", "-q", *args)

    def set_up(self, *queue):
        script = (EXAMPLES / "rabbitmq/set-up.sh").read_text()
        return engine.docker("exec", "--interactive", self.name, "sh", "-s", *queue, input=script)


@pytest.fixture(scope="session")
def start_broker(cluster):
    """A function that starts the pod of the work queue's stateful set, with a new volume or an earlier pod's."""
    [service] = kube.load((EXAMPLES / "work-queue/rabbitmq-service.yaml").read_text())
    [stateful_set] = kube.load((EXAMPLES / "work-queue/rabbitmq-statefulset.yaml").read_text())
    spec = kube.pod_spec(stateful_set)
    # The official image has a user with this id. An image built from a distribution's package has one with another id.
    users = engine.docker("run", "--rm", "--network=none", "--entrypoint=cat", RABBITMQ, "/etc/passwd")
    user = None if f":{spec['securityContext']['runAsUser']}:" in users else "rabbitmq"
    secret = cluster.secrets["rabbitmq-secret"]

    def start(aliases=(f"{service['metadata']['name']}.{kube.DOMAIN}",), **more):
        name = cluster.start(spec, what="rabbitmq", user=user, aliases=aliases,
                             hostname=f"{stateful_set['metadata']['name']}-0", **more)
        return Broker(name, cluster.network, secret["username"], secret["password"])

    return start


@pytest.fixture(scope="session")
def shared_broker(start_broker):
    """The broker that the work queue's manifests describe."""
    return start_broker().wait()


@pytest.fixture(scope="session")
def broker_of(network):
    """A function that returns an empty broker of a version; tests share it."""
    brokers = {}

    def get(version):
        image = f"rabbitmq:{version}-management"
        need(image)
        if version not in brokers:
            name = network.name("broker")
            engine.docker("run", "--detach", "--name", name, "--network", network.network, image)
            brokers[version] = Broker(name, network.network).wait()
        brokers[version].clear()
        return brokers[version]

    return get


@pytest.fixture
def broker(shared_broker):
    shared_broker.clear()
    return shared_broker


def manifest(path, **changes):
    """The single document of a manifest, with changes to its spec."""
    [document] = kube.load((EXAMPLES / path).read_text())
    document["spec"] |= changes
    return document


def shapes(log):
    """The set of a log's lines, with their fruits and numbers made equal."""
    return {re.sub(r"\b[\d.]+\b", "0", re.sub(rf"\b({'|'.join(FRUITS)})\b", "fruit", line.rstrip()))
            for line in log.splitlines() if line.strip()}


def shown(readme, after):
    """The first block of output after these words in a README."""
    text = readme.read_text()
    return re.search(r"```text\n(.*?)```", text[text.index(after):], re.DOTALL)[1]


@pytest.fixture
def fill(cluster, broker):
    """A function that runs the fill Job, perhaps with other tasks or another queue."""
    def run(*tasks, queue="job1"):
        job = manifest("work-queue/fill-job.yaml")
        [container] = kube.pod_spec(job)["containers"]
        options = list(container["args"][:-len(FRUITS)])
        options[options.index("job1")] = queue
        outcome = cluster.run_job(job, args=[*options, *(tasks or FRUITS)])
        assert outcome.condition == "Complete", outcome.logs
        return outcome
    return run
