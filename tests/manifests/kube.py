"""A model of the parts of Kubernetes that it takes to run a manifest in Docker: a kubelet that starts a pod's container
with the manifest's image, command, environment, user and limits; and a Job controller that counts completions and
failures and delays replacement pods as Kubernetes 1.36 does.

It is for tests with many runs, with every version of RabbitMQ, or with minutes of back-off. It has no scheduler, no
cluster DNS, no lost nodes, no admission, and no API server: tests/kubernetes runs the manifests on a real cluster.
"""

import atexit
import base64
import itertools
import re
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml

import engine

# The pause before a failed pod is replaced: pkg/controller/job/job_controller.go.
FIRST_PAUSE, LONGEST_PAUSE = 10, 600
DOMAIN = "default.svc.cluster.local"


def load(text):
    """The documents of a manifest."""
    return [document for document in yaml.safe_load_all(text) if document]


def pod_spec(manifest):
    """The spec of the pods that a manifest starts; None if it starts none."""
    match manifest["kind"]:
        case "Job" | "StatefulSet":
            return manifest["spec"]["template"]["spec"]
        case "ScaledJob":
            return manifest["spec"]["jobTargetRef"]["template"]["spec"]
        case "Pod":
            return manifest["spec"]


@dataclass
class Pod:
    name: str
    index: int | None = None
    status: int | None = None
    action: str | None = None
    disrupted: bool = False
    # By `kubectl delete pod`. That isn't a disruption, so it counts, and the log is gone.
    deleted: bool = False
    # By the controller's clock.
    started: float = 0

    @property
    def logs(self):
        return "" if self.deleted else engine.logs(self.name)

    @property
    def termination_message(self):
        """The container's termination message, which `kubectl describe pod` shows."""
        return "" if self.deleted else termination_log(self.name).read_text()

    def stop(self):
        engine.docker("stop", self.name, check=False)

    def delete(self):
        self.deleted = True
        self.stop()


class BackOff:
    """The pause after failures: each one doubles it, also one that the podFailurePolicy ignores; a success ends it."""

    def __init__(self):
        self.failures, self.until = 0, 0.0

    def fail(self, now):
        self.failures += 1
        self.until = now + min(FIRST_PAUSE * 2 ** (self.failures - 1), LONGEST_PAUSE)

    def succeed(self):
        self.__init__()


class Clock:
    """Seconds since a Job's start. If nothing but waiting is left to do, the clock is put forward instead."""

    def __init__(self):
        self.begin, self.skipped = time.monotonic(), 0.0

    def now(self):
        return time.monotonic() - self.begin + self.skipped

    def skip_to(self, moment):
        self.skipped += max(0.0, moment - self.now())


@dataclass
class Outcome:
    """How a Job ended."""

    condition: str
    reason: str
    pods: list[Pod]
    most_at_a_time: int
    failed_indexes: list[int] = field(default_factory=list)

    @property
    def failed(self):
        """The Job's status.failed. It includes pods that were ignored or deleted, or stopped at the Job's end."""
        return sum(pod.status != 0 or pod.deleted for pod in self.pods)

    @property
    def statuses(self):
        return [pod.status for pod in self.pods]

    @property
    def logs(self):
        return "".join(pod.logs for pod in self.pods)


class Cluster:
    """An isolated network, the applied Secrets, and the images for the manifests' image names."""

    def __init__(self, dns_image):
        self.network = f"{engine.RUN}-net"
        self.secrets = {}
        self.images = {}
        self._numbers = itertools.count(1)
        TERMINATION_LOGS.mkdir(exist_ok=True)
        # A random IPv6 prefix, as Docker's default one would collide with that of another run.
        prefix = f"fd{time.time_ns() & 0xff:02x}:{time.time_ns() >> 8 & 0xffff:x}:{time.time_ns() >> 24 & 0xffff:x}::/64"
        engine.docker("network", "create", "--internal", "--ipv6", "--subnet", prefix, self.network)
        # Docker's DNS resolves the containers' names and forwards all other queries to this server, which answers that
        # there is no such name. So no query leaves the network, and search lists are as fast as with a cluster's DNS.
        self.dns = f"{engine.RUN}-dns"
        engine.docker("run", "--detach", "--name", self.dns, "--network", self.network, dns_image, "python3", "-c", NO_SUCH_NAME)
        self.dns_address = engine.address(self.dns, self.network)

    def apply(self, *manifests):
        for manifest in manifests:
            if manifest["kind"] == "Secret":
                values = {key: base64.b64decode(value).decode() for key, value in manifest.get("data", {}).items()}
                self.secrets[manifest["metadata"]["name"]] = values | manifest.get("stringData", {})

    def name(self, what):
        return f"{engine.RUN}-{what}-{next(self._numbers)}"

    def environment(self, container):
        result = {}
        for entry in container.get("env", []):
            if reference := entry.get("valueFrom", {}).get("secretKeyRef"):
                result[entry["name"]] = self.secrets[reference["name"]][reference["key"]]
            else:
                # $(NAME) is an earlier variable, $$ a dollar.
                result[entry["name"]] = expand(entry.get("value", ""), result)
        return result

    def resolver(self):
        """Docker's options for a pod's /etc/resolv.conf."""
        search = [f"--dns-search={DOMAIN.split('.', n)[n]}" for n in range(3)]
        return ["--dns", self.dns_address, *search, "--dns-opt", "ndots:5"]

    def start(self, spec, *, what="pod", environment=None, args=None, aliases=(), user=None, index=None, hostname=None,
              volumes=None):
        """Starts a pod's only container; returns its name. `user` replaces the manifest's, if the image lacks that;
        `volumes` are those of an earlier pod, by their names in the manifest."""
        [container] = spec["containers"]
        name = self.name(what)
        values = self.environment(container) | (environment or {})
        if index is not None:
            values["JOB_COMPLETION_INDEX"] = str(index)
        options = ["--detach", "--name", name, "--hostname", hostname or name[len(engine.RUN) + 1:], "--network", self.network]
        options += self.resolver()
        for key, value in values.items():
            options += ["--env", f"{key}={value}"]
        for alias in aliases:
            options += ["--network-alias", alias]
        options += ["--stop-timeout", str(spec.get("terminationGracePeriodSeconds", 30))]
        if memory := container.get("resources", {}).get("limits", {}).get("memory"):
            options += ["--memory", memory.rstrip("i").lower()]
        options += security(spec.get("securityContext", {}), container.get("securityContext", {}), user)
        # The kubelet makes it writable for any user.
        log = termination_log(name)
        log.touch()
        log.chmod(0o666)
        options += ["--volume", f"{log}:/dev/termination-log"]
        for mount in container.get("volumeMounts", []):
            volume = (volumes or {}).get(mount["name"], f"{name}-{mount['name']}")
            self.set_ownership(volume, spec.get("securityContext", {}), self.images[container["image"]])
            # A Kubernetes volume starts empty; without nocopy, Docker would copy the image's files into it.
            options += ["--volume", f"{volume}:{mount['mountPath']}:nocopy" + (",ro" if mount.get("readOnly") else "")]
        command = [expand(word, values) for word in container.get("command", [])]
        arguments = [expand(word, values) for word in (container.get("args", []) if args is None else args)]
        if command:
            options += ["--entrypoint", command[0]]
        engine.docker("run", *options, self.images[container["image"]], *command[1:], *arguments)
        return name

    def set_ownership(self, volume, context, image):
        """Changes a volume's owner as the kubelet does for a pod with an fsGroup: pkg/volume/volume_linux.go."""
        if "fsGroup" in context:
            engine.docker("run", "--rm", "--network=none", "--user=0", "--volume", f"{volume}:/volume:nocopy", "--entrypoint=sh",
                          image, "-c", SET_OWNERSHIP, "sh", context["fsGroup"], context.get("fsGroupChangePolicy", "Always"))

    @staticmethod
    def missing(indexed, completions, wanted, active, succeeded, failed_indexes):
        """The indexes of the pods to start, the lowest first; in a Job that isn't indexed, None for each. An index in
        back-off keeps its slot: no other index is started instead."""
        if not indexed:
            return [None] * (wanted - len(active))
        ended = {pod.index for pod in succeeded} | set(failed_indexes)
        running = {pod.index for pod in active}
        lowest = sorted(set(range(completions)) - ended)[:wanted]
        return [index for index in lowest if index not in running]

    def run_job(self, manifest, *, environment=None, args=None, timeout=1800, on_tick=None):
        """Runs a Job to its end, as the Job controller does, and stops its remaining pods."""
        spec = manifest["spec"]
        parallelism = spec.get("parallelism", 1)
        completions = spec.get("completions")
        indexed = spec.get("completionMode") == "Indexed"
        pods, active, counted, most = [], [], 0, 0
        succeeded, failed_indexes, index_failures = [], [], {}
        per_index = indexed and "backoffLimitPerIndex" in spec
        clock, back_offs = Clock(), {}
        deadline = time.monotonic() + timeout

        def back_off(pod):
            """The back-off of the whole Job, or, with backoffLimitPerIndex, of the pod's index."""
            return back_offs.setdefault(pod.index if per_index else None, BackOff())

        def finish(condition, reason=""):
            for pod in active:
                pod.stop()
                pod.status = engine.wait(pod.name)
            return Outcome(condition, reason, pods, most, failed_indexes)

        while True:
            # Pods that have ended.
            for pod in [pod for pod in active if not running(pod.name)]:
                active.remove(pod)
                pod.status = engine.wait(pod.name)
                if pod.status == 0 and not pod.deleted:
                    succeeded.append(pod)
                    back_off(pod).succeed()
                    continue
                back_off(pod).fail(clock.now())
                pod.action = pod_failure_action(spec, pod)
                if pod.action == "FailJob":
                    return finish("Failed", "PodFailurePolicy")
                if pod.action == "FailIndex":
                    failed_indexes.append(pod.index)
                if pod.action == "Count":
                    counted += 1
                    if per_index:
                        index_failures[pod.index] = index_failures.get(pod.index, 0) + 1
                        if index_failures[pod.index] > spec["backoffLimitPerIndex"]:
                            failed_indexes.append(pod.index)
                    elif counted > spec.get("backoffLimit", 6):
                        return finish("Failed", "BackoffLimitExceeded")
            # The Job's end.
            if completions is None:
                if succeeded and not active:
                    return finish("Complete")
            elif len(succeeded) >= completions:
                return finish("Complete")
            elif indexed and len(succeeded) + len(failed_indexes) == completions:
                return finish("Failed", "FailedIndexes")
            # Pods to start.
            if completions is None:
                wanted = parallelism if not succeeded else 0
            else:
                wanted = min(parallelism, completions - len(succeeded) - len(failed_indexes))
            waiting = []
            for index in self.missing(indexed, completions, wanted, active, succeeded, failed_indexes):
                pod = Pod("", index, started=clock.now())
                if back_off(pod).until > clock.now():
                    waiting.append(back_off(pod).until)
                    continue
                pod.name = self.start(spec["template"]["spec"], what=manifest["metadata"]["name"], environment=environment,
                                      args=args, index=index)
                pods.append(pod)
                active.append(pod)
            if waiting and not active:
                clock.skip_to(min(waiting))
                continue
            most = max(most, len(active))
            if on_tick:
                on_tick(active)
            if time.monotonic() > deadline:
                outcome = finish("Running", "out of the test's time")
                raise AssertionError(f"{outcome}\n{outcome.logs}")
            time.sleep(0.1)


TERMINATION_LOGS = Path(tempfile.gettempdir()) / engine.RUN
atexit.register(shutil.rmtree, TERMINATION_LOGS, ignore_errors=True)


def termination_log(name):
    """The file on the host that a container sees as /dev/termination-log."""
    return TERMINATION_LOGS / name


def running(name):
    return engine.docker("inspect", "--format", "{{.State.Running}}", name) == "true"


def pod_failure_action(spec, pod):
    """The action of the first rule of the podFailurePolicy that matches; without a match, Count."""
    for rule in spec.get("podFailurePolicy", {}).get("rules", []):
        if codes := rule.get("onExitCodes"):
            if (pod.status in codes["values"]) == (codes["operator"] == "In"):
                return rule["action"]
        elif any(pattern["type"] == "DisruptionTarget" and pod.disrupted for pattern in rule.get("onPodConditions", [])):
            return rule["action"]
    return "Count"


def security(pod, container, user=None):
    """Docker's options for the security contexts; `user` replaces their user."""
    context = pod | container
    options = []
    if user:
        options += ["--user", user]
    elif "runAsUser" in context:
        options += ["--user", f"{context['runAsUser']}:{context.get('runAsGroup', 0)}"]
    if context.get("readOnlyRootFilesystem"):
        options += ["--read-only"]
    if context.get("allowPrivilegeEscalation") is False:
        options += ["--security-opt", "no-new-privileges"]
    if "fsGroup" in context:
        options += ["--group-add", str(context["fsGroup"])]
    for capability in context.get("capabilities", {}).get("drop", []):
        options += ["--cap-drop", capability]
    return options


def expand(text, environment):
    """Expands $(NAME) as Kubernetes does in a command, an argument or a value; an unknown name stays as it is."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else environment.get(m[1], m[0]), str(text))


NO_SUCH_NAME = r"""
import socket
listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
listener.bind(("", 53))
while True:
    query, sender = listener.recvfrom(512)
    end = query.index(b"\0", 12) + 5
    listener.sendto(query[:2] + b"\x81\x83\0\1\0\0\0\0\0\0" + query[12:end], sender)
"""

SET_OWNERSHIP = r"""
cd /volume
[ "$2" = OnRootMismatch ] && [ -n "$(find . -maxdepth 0 -group "$1" -perm -2770)" ] && exit
chgrp -R "$1" . && find . -type d -exec chmod ug+rwx,g+s {} + && find . -type f -exec chmod ug+rw {} +
"""
