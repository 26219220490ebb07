"""Docker's command line. Everything that a run creates has the run's name, and is removed at its end.

If a run is killed, the next one recognizes its remains by their names and removes them.
"""

import json
import os
import re
import subprocess
import time
from pathlib import Path


def _started(pid):
    """When a process started, in the kernel's ticks: together with the process id, this identifies it for ever."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return None


# Process ids are only unique within a PID namespace, and a Docker daemon may serve several.
_NAMESPACE = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
RUN = f"qct-{_NAMESPACE}-{os.getpid()}-{_started(os.getpid())}"
_NAME = re.compile(r"qct-(\d+)-(\d+)-(\d+)")


def docker(*args, check=True, input=None, timeout=600, stderr=subprocess.PIPE):
    """Runs Docker's client; returns its output, stripped."""
    done = subprocess.run(["docker", *map(str, args)], input=input, stdout=subprocess.PIPE, stderr=stderr, text=True,
                          timeout=timeout)
    if check and done.returncode:
        raise RuntimeError(f"docker {' '.join(map(str, args))}: {done.returncode}: {done.stdout}{done.stderr or ''}")
    return done.stdout.strip()


def available():
    try:
        docker("info", timeout=120)
        return True
    except (OSError, RuntimeError, subprocess.TimeoutExpired):
        return False


def has_image(name):
    """Whether the image is here or can be pulled."""
    for attempt in (("image", "inspect", name), ("pull", "--quiet", name)):
        try:
            docker(*attempt)
            return True
        except (RuntimeError, subprocess.TimeoutExpired):
            pass
    return False


def build(tag, context, dockerfile, *, text=None, args=(), timeout=7200):
    """Builds an image. `text`, if given, is the Dockerfile's content."""
    command = ["build", "--quiet", "--tag", tag, "--file", "-" if text else dockerfile]
    for arg in args:
        command += ["--build-arg", arg]
    docker(*command, context, input=text, timeout=timeout)
    return tag


def inspect(name):
    return json.loads(docker("inspect", name))[0]


def address(name, network, key="IPAddress"):
    return inspect(name)["NetworkSettings"]["Networks"][network][key]


def wait(name, timeout=600):
    """Waits for a container's end; returns its exit status."""
    return int(docker("wait", name, timeout=timeout))


def logs(name):
    """A container's standard output and standard error, ordered by time."""
    done = subprocess.run(["docker", "logs", name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    return done.stdout


def until(what, condition, timeout=600, every=0.2):
    """Waits until the condition is true, and returns its value; after the timeout, fails with `what`."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout} s for this: {what}")
        time.sleep(every)


def _orphaned(name):
    match = _NAME.match(name)
    if not match:
        return False
    namespace, pid, started = match.groups()
    return namespace == _NAMESPACE and _started(pid) != started


def remove(condition):
    """Removes the containers, networks, volumes and images whose names fulfil the condition."""
    def named(*listing):
        return [name for name in docker(*listing, check=False).splitlines() if condition(name)]

    for listing, removal in (
        (("ps", "--all", "--format", "{{.Names}}"), ("rm", "--force", "--volumes")),
        (("network", "ls", "--format", "{{.Name}}"), ("network", "rm")),
        (("volume", "ls", "--format", "{{.Name}}"), ("volume", "rm", "--force")),
        (("images", "--format", "{{.Repository}}:{{.Tag}}"), ("rmi", "--force")),
    ):
        if names := named(*listing):
            docker(*removal, *names, check=False)


def remove_orphans():
    remove(_orphaned)


def remove_own():
    remove(lambda name: name.startswith(RUN))
