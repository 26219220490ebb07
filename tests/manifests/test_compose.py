"""Runs docker/compose.yaml."""

import os
import pathlib
import re
import subprocess

import pytest
import yaml

import engine
from conftest import FRUITS, PYTHON, RABBITMQ, REVISION, ROOT, RUST, missing, need, shapes, shown

FILE = ROOT / "docker/compose.yaml"
OAUTH2 = ROOT / "docker/oauth2/compose.yaml"


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

    def run(*args, files=(FILE,), timeout=7200, **more):
        return subprocess.run([*client, *(word for file in files for word in ("--file", file)), *args], env=environment, text=True, timeout=timeout,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)

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

    # The numbers of a quorum queue may be some seconds old.
    def seven_are_left():
        return "job1\t7" in compose("exec", "-T", "rabbitmq", "rabbitmqctl", "-q", "list_queues", "name", "messages").stdout

    engine.until("seven messages are left", seven_are_left, timeout=120)
    # The filler has declared the queue as set-up.sh needs it.
    done = compose("exec", "-T", "rabbitmq", "sh", "-s", input=(ROOT / "examples/rabbitmq/set-up.sh").read_text())
    assert done.returncode == 0, done.stdout


def test_the_override_for_oauth2_fits_the_file_that_it_changes(compose):
    """Its run takes minutes; tests/it/tokens.rs has the same tokens and renewals."""
    done = compose("config", files=(FILE, OAUTH2))
    assert done.returncode == 0, done.stdout
    config = yaml.safe_load(done.stdout[done.stdout.index("services:"):])
    assert not config["services"].keys() - yaml.safe_load(FILE.read_text())["services"].keys() - {"issuer"}
    for name in ("filler", "worker"):
        environment = config["services"][name]["environment"]
        assert environment["QCONSUME_PASSWORD_FILE"] == "/token/token", name
        # The settings of the first file are still there.
        assert environment.keys() >= yaml.safe_load(FILE.read_text())["services"][name]["environment"].keys(), name
    mounted = [volume for service in config["services"].values() for volume in service.get("volumes", [])]
    sources = [volume["source"] if isinstance(volume, dict) else volume.split(":")[0] for volume in mounted]
    files = {pathlib.Path(source) for source in sources if source.startswith("/")}
    assert {file.name for file in files} == {"advanced.config", "enabled_plugins", "issuer.py", "worker.py"}
    for file in files:
        assert file.is_file(), file
