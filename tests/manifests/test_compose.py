"""Runs docker/compose.yaml."""

import os
import re
import subprocess

import pytest

import engine
from conftest import FRUITS, PYTHON, RABBITMQ, REVISION, ROOT, RUST, missing, need, shapes, shown

FILE = ROOT / "docker/compose.yaml"


@pytest.fixture(scope="module")
def compose(docker):
    """A function that runs either form of compose, in a project of this test run."""
    for client in (["docker", "compose"], ["docker-compose"]):
        try:
            if subprocess.run([*client, "version"], capture_output=True).returncode == 0:
                break
        except OSError:
            pass
    else:
        missing("docker compose and docker-compose are missing")
    need(RABBITMQ, PYTHON, RUST)
    name = f"{engine.RUN}-compose"
    environment = os.environ | {"QCONSUME_IMAGE": name, "COMPOSE_PROJECT_NAME": name, "REVISION": REVISION, "DOCKER_BUILDKIT":
                                os.environ.get("DOCKER_BUILDKIT", "0" if client == ["docker-compose"] else "1"),
                                "COMPOSE_HTTP_TIMEOUT": "600"}

    def run(*args, timeout=7200):
        return subprocess.run([*client, "--file", FILE, *args], env=environment, text=True, timeout=timeout,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    yield run
    run("down", "--volumes", "--remove-orphans", "--timeout", "1")


@pytest.fixture(scope="module")
def up(compose):
    done = compose("up", "--build")
    assert done.returncode == 0, done.stdout
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)


def test_it_comes_to_its_end_with_every_fruit_done(up):
    assert sorted(re.findall(r"^worker[-_]\d+ +\| Processing (\w+)$", up, re.MULTILINE)) == FRUITS
    for service, number in {"filler": 1, "worker": 8, "finish": 1}.items():
        ended = re.findall(rf"^\S*{service}[-_]\d+ exited with code (\d+)", up, re.MULTILINE)
        assert ended == ["0"] * number, service


def test_the_log_is_as_the_readme_shows_it(up):
    """Compares the workers' and the filler's lines, in any order."""
    def lines(log):
        said = re.findall(r"^(worker|filler)[-_]\d+ +\| (.*)$", log, re.MULTILINE)
        return shapes("\n".join(f"{service} says {line}" for service, line in said))

    assert lines(up) == lines(shown(ROOT / "docker/README.md", "up --build"))


def test_run_does_one_more(compose, up):
    done = compose("run", "--rm", "worker")
    assert done.returncode == 0, done.stdout
    assert len(re.findall(r"^Processing \w+\r?$", done.stdout, re.MULTILINE)) == 1
    queues = compose("exec", "-T", "rabbitmq", "rabbitmqctl", "-q", "list_queues", "name", "messages").stdout
    assert "job1\t7" in queues, queues
