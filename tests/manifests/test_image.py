"""The image: its content, and that its programs find the broker by every kind of name."""

import os
import re
import struct
import tarfile

import pytest

import engine
from conftest import RABBITMQ, URL, VERSION, Broker, need

HARDENED = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"]


@pytest.fixture(scope="session")
def files(image, tmp_path_factory):
    """The image's files, without those that Docker adds to every container."""
    archive = tmp_path_factory.mktemp("image") / "image.tar"
    container = engine.docker("create", "--name", f"{engine.RUN}-look", image)
    engine.docker("export", "--output", archive, container)
    engine.docker("rm", container)
    with tarfile.open(archive) as tar:
        return {member.name: (member, tar.extractfile(member).read() if member.isreg() else b"") for member in tar
                if not re.match(r"(dev|proc|sys|etc)(/|$)|\.dockerenv$", member.name)}


def program_headers(elf):
    """The types of an ELF file's segments, as `readelf -l` lists them."""
    assert elf[:5] == b"\x7fELF\x02"
    offset, = struct.unpack_from("<Q", elf, 0x20)
    size, number = struct.unpack_from("<HH", elf, 0x36)
    return [struct.unpack_from("<I", elf, offset + n * size)[0] for n in range(number)]


def test_it_holds_the_two_programs_and_nothing_else(files):
    assert set(files) == {"qconsume", "qpublish"}
    for member, _ in files.values():
        assert member.mode & 0o111 == 0o111 and member.uid == 0


def test_they_are_one_file(files):
    assert sorted(member.islnk() for member, _ in files.values()) == [False, True]
    assert [member.isreg() for member, _ in files.values()].count(True) == 1


def test_it_is_static(files):
    load, interpreter = 1, 3
    [content] = [content for member, content in files.values() if member.isreg()]
    types = program_headers(content)
    assert load in types and interpreter not in types


def test_its_size(image):
    """The size of all layers, so a file that is copied twice counts twice."""
    assert engine.inspect(image)["Size"] < 4_000_000


def test_its_user_labels_and_command(image):
    config = engine.inspect(image)["Config"]
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] is None
    assert config["Cmd"] == ["/qconsume", "--help"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == "qconsume"
    assert labels["org.opencontainers.image.licenses"] == "MIT OR Apache-2.0"
    assert labels["org.opencontainers.image.version"] == VERSION
    assert labels["org.opencontainers.image.revision"]
    assert labels["org.opencontainers.image.description"]
    if "QCONSUME_TEST_IMAGE" not in os.environ:
        assert labels["org.opencontainers.image.source"] == labels["org.opencontainers.image.url"] == URL
        assert labels["org.opencontainers.image.documentation"] == f"{URL}#readme"


@pytest.mark.parametrize("program", ["qconsume", "qpublish"])
def test_it_runs_without_any_rights(image, program):
    said = engine.docker("run", "--rm", "--network=none", *HARDENED, "--memory=16m", image, f"/{program}", "--version")
    revision = engine.inspect(image)["Config"]["Labels"]["org.opencontainers.image.revision"]
    assert said == f"{program} {VERSION} ({revision})"


# Names and addresses

@pytest.fixture(scope="module")
def somewhere(network):
    """A broker with names to look up."""
    need(RABBITMQ)
    broker = Broker(network.name("named"), network.network)
    engine.docker("run", "--detach", "--name", broker.name, "--network", network.network,
                  "--network-alias", "broker.somewhere.svc.example", RABBITMQ)
    return broker.wait()


def where(kind, somewhere):
    """A host for the URL, and Docker's options for a container to find it."""
    v4 = engine.address(somewhere.name, somewhere.network)
    v6 = engine.address(somewhere.name, somewhere.network, "GlobalIPv6Address")
    return {
        "a name of Docker's DNS": (somewhere.name, []),
        "a name in /etc/hosts": ("elsewhere", ["--add-host", f"elsewhere:{v4}"]),
        "an IPv6 address in /etc/hosts": ("elsewhere6", ["--add-host", f"elsewhere6:{v6}"]),
        # Docker's default is ndots:0, with which musl, unlike glibc, uses no search domain at all.
        "a search domain": ("broker", ["--dns-search", "somewhere.svc.example", "--dns-opt", "ndots:1"]),
        "a search domain and ndots:5": ("broker", ["--dns-search", "nowhere.svc.example", "--dns-search",
                                                  "somewhere.svc.example", "--dns-opt", "ndots:5"]),
        "a full name under ndots:5": ("broker.somewhere.svc.example", ["--dns-search", "somewhere.svc.example",
                                                                    "--dns-opt", "ndots:5"]),
        "an IPv4 address": (v4, []),
        "an IPv6 address": (f"[{v6}]", []),
    }[kind]


KINDS = ["a name of Docker's DNS", "a name in /etc/hosts", "an IPv6 address in /etc/hosts", "a search domain",
         "a search domain and ndots:5", "a full name under ndots:5", "an IPv4 address", "an IPv6 address"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_finds_its_broker_by(kind, image, network, somewhere):
    host, options = where(kind, somewhere)
    run = ["run", "--rm", "--network", network.network, "--dns", network.dns_address, *options, *HARDENED,
           "--env", f"BROKER_URL=amqp://{host}", "--env", "QUEUE=found", "--env", "QCONSUME_CONNECT_TIMEOUT=60s", image]
    engine.docker(*run, "/qpublish", "--declare", "-q", "found", "hello")
    engine.docker(*run, "/qpublish", "--declare", "-q", "handed-on")
    # The image has no other program, so qpublish publishes the message to a second queue.
    engine.docker(*run, "/qconsume", "--wait=60s", "--", "/qpublish", "-q", "handed-on")
    assert somewhere.queues() == {"found": 0, "handed-on": 1}
    somewhere.clear()


# In images of another libc

def test_it_works_in_debians_image(debian_image, network, somewhere):
    run = ["run", "--rm", "--network", network.network, "--dns", network.dns_address,
           "--dns-search", "somewhere.svc.example", "--dns-opt", "ndots:5", "--env", "BROKER_URL=amqp://broker", debian_image]
    engine.docker(*run, "qpublish", "--declare", "-q", "debian", "hello")
    assert engine.docker(*run, "qconsume", "-q", "debian", "--wait=60s", "--", "cat") == "hello"
    script = 'qpublish -q debian again && qconsume -q debian -- sh -c "exit 3"; echo $?; qconsume -q debian --drain -- cat'
    assert engine.docker(*run, "sh", "-c", script).splitlines()[-2:] == ["3", "again"]
