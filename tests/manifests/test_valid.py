"""Validates the manifests without a cluster: against the schemas of every supported version, the API server's rules
that aren't in the schemas, and what the documentation says about them."""

import functools
import os
import re
import shutil
import subprocess

import kubernetes_validate
import kubernetes_validate.utils
import pytest
import yaml
from packaging.version import Version

import kube
from conftest import EXAMPLES, FRUITS, ROOT, VERSION

VERSIONS = sorted({kubernetes_validate.utils.major_minor(v) for v in kubernetes_validate.utils.all_versions()} - {"1.25"}, key=Version)

# qconsume's own exit statuses, by whether a retry can help. With 65 it can't, because the task is dead-lettered. With 66
# it can't if the number of tasks is known; a drainer never exits with 66.
RETRY = {69, 71, 75}
HOPELESS = {64, 65, 77, 78, 126, 127}


@functools.cache
def blocks(readme):
    """A README's blocks of shell commands."""
    return re.findall(r"```sh[^\n]*\n(.*?)```", (EXAMPLES / readme).read_text(), re.DOTALL)


@pytest.fixture(scope="session")
def expanded(tmp_path_factory):
    """A copy of the expansions' folder, in which the commands of its README were run."""
    folder = tmp_path_factory.mktemp("expansion") / "expansion"
    shutil.copytree(EXAMPLES / "expansion", folder)
    commands = [block for block in blocks("expansion/README.md") if "\\$ITEM" in block or "render_template" in block]
    # Scripts don't expand aliases by default. There is no cluster, so kubectl only reads its input.
    script = "shopt -s expand_aliases\nkubectl() { cat >/dev/null; }\nset -e\n" + "".join(commands)
    subprocess.run(["bash", "-c", script], cwd=folder, check=True, text=True, env=os.environ)
    return folder


@pytest.fixture(scope="session")
def everything(expanded):
    """Every document, by its file's name and its number in the file."""
    files = sorted(EXAMPLES.glob("*/*.yaml")) + sorted(expanded.glob("jobs*/*.yaml")) + sorted(expanded.glob("*s.yaml"))
    result = {}
    for file in files:
        if file.name.endswith("-tmpl.yaml"):
            continue
        for n, document in enumerate(kube.load(file.read_text())):
            result[f"{file.parent.name}/{file.name}#{n}"] = document
    return result


def jobs(everything):
    """Every Job, including the ScaledJob's."""
    for name, document in everything.items():
        if document["kind"] == "Job":
            yield name, document
        if document["kind"] == "ScaledJob":
            yield name, {"apiVersion": "batch/v1", "kind": "Job", "metadata": document["metadata"],
                         "spec": document["spec"]["jobTargetRef"]}


def is_since(document, version):
    """Whether this version supports the document: every cluster has backoffLimitPerIndex from 1.29 on."""
    return "backoffLimitPerIndex" not in document["spec"] or Version(version) >= Version("1.29")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_valid(everything, version):
    documents = {name: document for name, document in everything.items() if document["kind"] != "ScaledJob"}
    documents |= dict(jobs(everything))
    checked = 0
    for name, document in documents.items():
        if document["kind"] == "Job" and not is_since(document, version):
            continue
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{name} for {version}: {'.'.join(map(str, error.path))}: {error.message}")
        checked += 1
    assert checked > 15


@pytest.mark.parametrize("version", VERSIONS)
def test_every_whole_manifest_in_the_pages_is_valid(version):
    kinds = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```yaml\n(apiVersion:.*?)```", page.read_text(), re.DOTALL):
            for document in kube.load(block):
                try:
                    kubernetes_validate.validate(document, version, strict=True)
                except kubernetes_validate.ValidationError as error:
                    pytest.fail(f"{page.name} for {version}: {'.'.join(map(str, error.path))}: {error.message}")
                kinds.append(document["kind"])
    assert {"Job", "CronJob", "NetworkPolicy"} <= set(kinds)


def test_the_readmes_image_is_that_of_the_work_queue():
    [shown] = re.findall(r"```dockerfile\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    whole = (EXAMPLES / "work-queue/Dockerfile").read_text().splitlines()
    assert [line for line in shown.splitlines() if line not in whole] == []


def test_a_wrong_manifest_would_be_noticed(everything):
    job = dict(everything["work-queue/job.yaml#0"])
    job["spec"] = job["spec"] | {"completion": 8}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


def test_no_key_occurs_twice():
    """YAML parsers silently use the last one; the API server warns."""
    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key, deep) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            assert len(keys) == len(set(keys)), f"{node.start_mark}: {keys}"
            return super().construct_mapping(node, deep)

    for file in [*EXAMPLES.glob("*/*.yaml"), ROOT / "docker/compose.yaml"]:
        list(yaml.load_all(file.read_text(), Strict))


def test_the_api_servers_rules_hold(everything):
    """Kubernetes' rules in pkg/apis/batch/validation/validation.go, for the fields that are used here."""
    for name, job in jobs(everything):
        spec, pod = job["spec"], kube.pod_spec(job)
        containers = {container["name"] for container in pod["containers"]}
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"]), name
        assert len(job["metadata"]["name"]) <= 63, name
        assert pod["restartPolicy"] in ("Never", "OnFailure"), name
        indexed = spec.get("completionMode") == "Indexed"
        if indexed:
            assert spec["completions"] > 0, name
        if "backoffLimitPerIndex" in spec or "maxFailedIndexes" in spec:
            assert indexed and spec["backoffLimitPerIndex"] >= 0, name
        if "podFailurePolicy" not in spec:
            continue
        assert pod["restartPolicy"] == "Never", name
        assert spec.get("podReplacementPolicy", "Failed") == "Failed", name
        rules = spec["podFailurePolicy"]["rules"]
        assert 0 < len(rules) <= 20, name
        for rule in rules:
            assert rule["action"] in ("Ignore", "FailJob", "Count") + ("FailIndex",) * ("backoffLimitPerIndex" in spec), name
            codes, conditions = rule.get("onExitCodes"), rule["onPodConditions"]
            assert bool(codes) != bool(conditions), name
            if codes:
                assert codes["operator"] in ("In", "NotIn"), name
                assert codes["containerName"] in containers, name
                values = codes["values"]
                assert 0 < len(values) <= 255 and values == sorted(set(values)), name
                assert codes["operator"] == "NotIn" or 0 not in values, name
            for condition in conditions:
                assert condition["type"] == "DisruptionTarget" and condition["status"] == "True", name


def test_the_policies_fit_the_statuses(everything):
    seen = 0
    for name, job in jobs(everything):
        [container] = kube.pod_spec(job)["containers"]
        rules = job["spec"].get("podFailurePolicy", {}).get("rules", [])
        if "QUEUE" not in names(container) or not rules:
            continue
        seen += 1
        values = {value["name"]: value.get("value") for value in container["env"]}
        # FailJob comes first: an eviction must not hide that a task was dead-lettered.
        assert [rule["action"] for rule in rules] == ["FailJob", "Ignore", "Ignore"] and rules[1]["onPodConditions"], name
        action = functools.partial(kube.pod_failure_action, job["spec"])
        assert {code for code in range(1, 256) if action(kube.Pod("p", status=code)) == "Ignore"} == RETRY, name
        assert {code for code in range(1, 256) if action(kube.Pod("p", status=code)) == "FailJob"} == (
            HOPELESS if "QCONSUME_DRAIN" in values else HOPELESS | {66}), name
        assert action(kube.Pod("p", status=143, disrupted=True)) == "Ignore", name
        assert action(kube.Pod("p", status=65, disrupted=True)) == "FailJob", name
        # The command's failures get a status of their own.
        assert action(kube.Pod("p", status=int(values["QCONSUME_FAILURE_EXIT_CODE"]))) == "Count", name
        assert action(kube.Pod("p", status=int(values["QCONSUME_REJECT_EXIT_CODE"]))) == "FailJob", name
        assert "QCONSUME_EMPTY_EXIT_CODE" not in values, name
    assert seen >= 6


def set_up(setting):
    """A number in set-up.sh's policy."""
    return int(re.search(rf'"{setting}": (\d+)', (EXAMPLES / "rabbitmq/set-up.sh").read_text())[1])


def seconds(duration):
    number, unit = re.fullmatch(r"(\d+)([smh])", duration).groups()
    return int(number) * {"s": 1, "m": 60, "h": 3600}[unit]


def settings(job):
    return {variable["name"]: variable.get("value") for variable in kube.pod_spec(job)["containers"][0].get("env", [])}


def consumers(everything):
    found = [(name, job, settings(job)) for name, job in jobs(everything) if "QUEUE" in settings(job)]
    assert len(found) >= 6
    return found


def test_no_task_is_dead_lettered_unnoticed(everything):
    """If the queue's delivery-limit dead-letters a task, no pod's status shows it. So qconsume must do it first; or, if it
    is killed each time, the Job must fail first. Before RabbitMQ 4.3 evictions count, too: leave room for ten of one
    task."""
    for name, job, values in consumers(everything):
        assert int(values["QCONSUME_MAX_ATTEMPTS"]) + job["spec"]["backoffLimit"] + 10 <= set_up("delivery-limit"), name


def test_a_delayed_retry_is_waited_for(everything):
    """A message whose retry is delayed isn't ready, so a drainer that doesn't wait would find the queue empty."""
    longest = set_up("delayed-retry-max") / 1000
    for name, job, values in consumers(everything):
        if job["metadata"]["name"] != "job-wq-1-scaled":  # KEDA starts another Job for it
            assert seconds(values["QCONSUME_WAIT"]) >= 2 * longest, name


def test_a_pod_waits_for_its_broker_inside(everything):
    """Each pod that gives up doubles the pause before the next one."""
    for name, _, values in consumers(everything):
        assert seconds(values["QCONSUME_CONNECT_TIMEOUT"]) >= 1800, name


def test_a_drainer_goes_on_after_a_failed_task(everything):
    for name, _, values in consumers(everything):
        assert ("QCONSUME_DRAIN" in values) == ("QCONSUME_KEEP_GOING" in values), name


def test_the_work_queues_jobs_can_stand_side_by_side(everything):
    found = [document["metadata"]["name"] for name, document in everything.items()
             if name.startswith(("work-queue", "keda")) and document["kind"] in ("Job", "ScaledJob")]
    assert len(found) == len(set(found)) == 4


def test_a_drainer_that_failed_is_replaced(everything):
    drainers = [job["spec"] for _, job in jobs(everything) if "QCONSUME_DRAIN" in names(kube.pod_spec(job)["containers"][0])]
    assert len(drainers) >= 5
    for spec in drainers:
        assert spec["completions"] == spec["parallelism"]


def test_there_is_time_to_hand_the_message_back(everything):
    for name, job, values in consumers(everything):
        assert seconds(values["QCONSUME_GRACE"]) + 10 <= kube.pod_spec(job)["terminationGracePeriodSeconds"], name


def test_every_pod_is_restricted(everything):
    """The Pod Security Standard "restricted", no service account, and, except for the broker, a read-only root."""
    for name, document in everything.items():
        pod = kube.pod_spec(document)
        if pod is None:
            continue
        [container] = pod["containers"]
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] > 0, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
        assert pod["automountServiceAccountToken"] is False, name
        assert set(container["resources"]["requests"]) == {"cpu", "memory"}, name
        if document["kind"] != "StatefulSet":
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, name


def test_passwords_are_in_secrets_only(everything):
    secrets = {document["metadata"]["name"]: document for document in everything.values() if document["kind"] == "Secret"}
    for name, document in everything.items():
        if document["kind"] == "Secret":
            continue
        assert "amqp://" not in yaml.dump(document), name
        for container in (kube.pod_spec(document) or {}).get("containers", []):
            for variable in container.get("env", []):
                if reference := variable.get("valueFrom"):
                    assert reference["secretKeyRef"]["key"] in secrets[reference["secretKeyRef"]["name"]]["stringData"], name


def test_the_secrets_url_is_that_of_its_user():
    [secret] = kube.load((EXAMPLES / "work-queue/rabbitmq-secret.yaml").read_text())
    values = secret["stringData"]
    assert values["url"] == f"amqp://{values['username']}:{values['password']}@rabbitmq-service:5672/"


def test_the_tutorials_names_are_kept(everything):
    assert everything["work-queue/rabbitmq-service.yaml#0"]["metadata"]["name"] == "rabbitmq-service"
    for variant, suffix in {"job": "", "job-drain": "-drain"}.items():
        job = everything[f"work-queue/{variant}.yaml#0"]
        assert job["metadata"]["name"] == "job-wq-1" + suffix
        [container] = kube.pod_spec(job)["containers"]
        assert container["name"] == "c"
        assert {"name": "QUEUE", "value": "job1"} in container["env"]
    job = everything["work-queue/job.yaml#0"]["spec"]
    assert (job["completions"], job["parallelism"]) == (8, 2)
    [fill] = kube.pod_spec(everything["work-queue/fill-job.yaml#0"])["containers"]
    assert fill["args"][-8:] == FRUITS
    assert "name: process-item-$ITEM" in (EXAMPLES / "expansion/job-tmpl.yaml").read_text()
    expansions = [document for name, document in everything.items() if name.startswith(("expansion/", "jobs"))]
    assert len(expansions) == 12
    for document in expansions:
        assert document["metadata"]["labels"] == {"jobgroup": "jobexample"}
        assert document["spec"]["template"]["metadata"]["labels"] == {"jobgroup": "jobexample"}


def test_the_service_finds_the_stateful_set(everything):
    service, stateful_set = (everything[f"work-queue/rabbitmq-{kind}.yaml#0"] for kind in ("service", "statefulset"))
    labels = stateful_set["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert stateful_set["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert stateful_set["spec"]["serviceName"] == service["metadata"]["name"]
    ports = {port["containerPort"] for port in kube.pod_spec(stateful_set)["containers"][0]["ports"]}
    assert {port["port"] for port in service["spec"]["ports"]} <= ports


def test_the_images_are_this_version(everything):
    """With a tag, a kubelet uses the image that was loaded into it; it would pull "latest"."""
    for name, document in everything.items():
        for container in (kube.pod_spec(document) or {}).get("containers", []):
            assert container["image"] in (f"qconsume:{VERSION}", "job-wq-1:1", "rabbitmq:4-management"), name


def test_the_scaled_job_has_only_fields_of_kedas_reference(everything):
    """keda.sh/docs: reference/scaledjob-spec and scalers/rabbitmq-queue, 2.16 to 2.20."""
    document = everything["keda/scaledjob.yaml#1"]
    assert (document["apiVersion"], document["kind"]) == ("keda.sh/v1alpha1", "ScaledJob")
    spec = document["spec"]
    assert set(spec) <= {"jobTargetRef", "pollingInterval", "successfulJobsHistoryLimit", "failedJobsHistoryLimit",
                         "envSourceContainerName", "minReplicaCount", "maxReplicaCount", "rollout", "scalingStrategy", "triggers"}
    for number in ("pollingInterval", "successfulJobsHistoryLimit", "failedJobsHistoryLimit", "maxReplicaCount"):
        assert isinstance(spec[number], int)
    assert set(spec["rollout"]) <= {"strategy", "propagationPolicy"} and spec["rollout"]["strategy"] in ("immediate", "gradual")
    assert set(spec["scalingStrategy"]) <= {
        "strategy", "customScalingQueueLengthDeduction", "customScalingRunningJobPercentage", "pendingPodConditions",
        "multipleScalersCalculation"}
    [trigger] = spec["triggers"]
    assert trigger["type"] == "rabbitmq"
    metadata = trigger["metadata"]
    assert set(metadata) <= {
        "host", "protocol", "mode", "value", "activationValue", "queueName", "vhostName", "hostFromEnv", "usernameFromEnv",
        "passwordFromEnv", "unsafeSsl", "useRegex", "pageSize", "operation", "timeout", "excludeUnacknowledged"}
    assert all(isinstance(value, str) for value in metadata.values())
    assert metadata["mode"] == "QueueLength"
    # Over AMQP, KEDA counts only ready messages, as the strategy "accurate" needs.
    assert (metadata["protocol"], spec["scalingStrategy"]["strategy"]) == ("amqp", "accurate")
    # The pod has the variable that KEDA reads, and its URL works for both.
    [container] = kube.pod_spec(document)["containers"]
    assert metadata["hostFromEnv"] in names(container)
    assert {"name": "QUEUE", "value": metadata["queueName"]} in container["env"]
    url = everything["keda/scaledjob.yaml#0"]["stringData"]["url"]
    assert re.fullmatch(r"amqp://\w+:[\w-]+@rabbitmq-service\.default\.svc:5672/", url)


def names(container):
    return {variable["name"] for variable in container.get("env", [])}


def test_the_files_that_the_readmes_name_exist(expanded):
    named = 0
    for readme in sorted(EXAMPLES.glob("*/README.md")):
        folder = expanded if readme.parent.name == "expansion" else readme.parent
        for block in blocks(readme.relative_to(EXAMPLES)):
            for file in re.findall(r"kubectl (?:create|apply) -f (\S+)|-s <(\S+)", block):
                name = "".join(file)
                named += 1
                assert name == "-" or (folder / name).exists(), f"{readme}: {name}"
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", readme.read_text()):
            assert (readme.parent / link).exists(), f"{readme}: {link}"
    assert named > 10


def test_a_queue_named_like_a_number_stays_text():
    for item in ("2024", "yes", "null"):
        text = (EXAMPLES / "expansion/job-queue-tmpl.yaml").read_text().replace("$ITEM", item)
        [job] = kube.load(text)
        assert {"name": "QUEUE", "value": item} in kube.pod_spec(job)["containers"][0]["env"]
