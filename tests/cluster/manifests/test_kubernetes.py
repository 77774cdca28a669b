"""The manifests for Kubernetes: every field is one that there is, and their parts fit each other, the image and the
command line. They are not applied to a cluster here."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer.main
import yaml

from headwise.runtime.cli.main import app
from headwise.workers.collectives.shared_memory import file_bytes
from tests.cluster.manifests.kuberay import SCHEMAS

ROOT = Path(__file__).parents[3]
MANIFESTS = ROOT / "cluster" / "manifests"
FILES = ("raycluster.yaml", "rayjob.yaml", "service.yaml")
VERSIONS = ("1.30", kubernetes_validate.latest_version())
"""Of Kubernetes: the oldest that we promise, and the newest that the validator knows."""


@cache
def resources(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((MANIFESTS / file).read_text()))


def one(kind: str, file: str = "service.yaml") -> dict[str, Any]:
    [found] = [resource for resource in resources(file) if resource["kind"] == kind]
    return found


def cluster(file: str) -> dict[str, Any]:
    """The spec of the file's Ray cluster."""
    [spec] = [resource["spec"] for resource in resources(file) if resource["apiVersion"] == "ray.io/v1"]
    return dict(spec.get("rayClusterSpec", spec))


def templates(file: str) -> list[dict[str, Any]]:
    spec = cluster(file)
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def headwise_commands(file: str) -> Iterator[list[str]]:
    """The arguments of each ``headwise`` that the file has run."""
    texts = [resource["spec"].get("entrypoint", "") for resource in resources(file) if "spec" in resource]
    texts += [text for pod in templates(file) for one in pod["spec"]["containers"] for text in one.get("args", [])]
    for text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if "headwise" in words:
                yield words[words.index("headwise") + 1 :]


def options(words: list[str]) -> dict[str, Any]:
    """What a command line of ours says, by the names of its parameters.

    Raises:
        KeyError: there is no such command.
        click.UsageError: there is no such flag, or its value is none.
    """
    command, words = typer.main.get_command(app), list(words)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    context = command.make_context("headwise", words)
    return context.params


def megabytes(quantity: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 1, "Gi": 1024}[unit] * 1.048576


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", FILES)
def test_every_field_is_one_that_there_is(file: str, version: str) -> None:
    for resource in resources(file):
        if resource["apiVersion"] == "ray.io/v1":
            jsonschema.validate(resource, SCHEMAS[resource["kind"]])
        else:
            kubernetes_validate.validate(resource, version, strict=True)
    for template in templates(file):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
        kubernetes_validate.validate(pod, version, strict=True)
    if service := cluster(file)["headGroupSpec"].get("headService"):
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Service"} | service, version, strict=True)


def test_a_field_that_there_is_not_is_found() -> None:
    """Of a pod, a resource of KubeRay, and one of Kubernetes."""
    pod = {"containers": [{"name": "x", "image": "y", "livenesProbe": {}}]}
    template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": {"spec": pod}}
    budget = one("PodDisruptionBudget") | {"specs": {}}
    for wrong in (template, budget):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(one("RayCluster") | {"headGroup": {}}, SCHEMAS["RayCluster"])


@pytest.mark.parametrize("file", FILES)
def test_pods_are_no_more_than_they_need_to_be(file: str) -> None:
    for template in templates(file):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


@pytest.mark.parametrize("file", FILES)
def test_ray_asks_for_a_token_and_is_the_version_of_the_image(file: str) -> None:
    spec = cluster(file)
    assert spec["authOptions"] == {"mode": "token"}
    assert f"\nray=={spec['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("file", FILES)
def test_shared_memory_has_room_for_ray_and_for_ranks_that_add_up(file: str) -> None:
    spec = cluster(file)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        [limit] = [one["emptyDir"]["sizeLimit"] for one in pod["volumes"] if one["name"] == "shm"]
        [container] = pod["containers"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        store = int(group["rayStartParams"]["object-store-memory"])
        assert (
            store + file_bytes(8)
            < megabytes(limit) * 1e6
            < megabytes(container["resources"]["limits"]["memory"]) * 1e6 / 2
        )


@pytest.mark.parametrize("file", FILES)
def test_every_command_has_the_flags_that_headwise_has(file: str) -> None:
    commands = list(headwise_commands(file))
    assert len(commands) == (file != "raycluster.yaml")
    for words in commands:
        assert options(words)["tp"] == 2


def serve_options() -> dict[str, str]:
    [words] = headwise_commands("service.yaml")
    assert words[0] == "serve" and len(words) % 2 == 1
    return dict(zip(words[1::2], words[2::2], strict=True))


def test_what_is_said_to_change_for_gpus_can_be_changed() -> None:
    text = (MANIFESTS / "service.yaml").read_text()
    header, text = text.split("apiVersion", 1)
    for here, there in (("headwise:demo", "headwise:cuda"), ("CPU=4", "GPU=2"), ("--cpus-per-rank 2", "--device cuda")):
        assert here in text and there in header
        text = text.replace(here, there)
    [changed] = [one for one in yaml.safe_load_all(f"apiVersion{text}") if one["kind"] == "RayCluster"]
    head, worker = changed["spec"]["headGroupSpec"], changed["spec"]["workerGroupSpecs"][0]
    script = head["template"]["spec"]["containers"][0]["args"][0].replace("\\\n", " ").replace("--kv-memory 1GiB", "")
    words = shlex.split(script)
    said = options(words[words.index("serve") :])
    assert said["device"] == "cuda" and said["tp"] == 2 and said["kv_memory"] is None and said["cpus_per_rank"] is None
    worker["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] = "2"
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": worker["template"]}
    kubernetes_validate.validate(pod, VERSIONS[-1], strict=True)


def test_the_server_has_the_files_that_it_is_given() -> None:
    [head] = templates("service.yaml")[0]["spec"]["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in head["volumeMounts"]}
    flags = serve_options()
    assert flags["--tls-cert"] == f"{mounts['tls']}/tls.crt" and flags["--tls-key"] == f"{mounts['tls']}/tls.key"
    assert flags["--token-file"] == f"{mounts['tokens']}/tokens"
    volumes = {volume["name"]: volume for volume in templates("service.yaml")[0]["spec"]["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert volumes["scripts"]["configMap"]["name"] == one("ConfigMap")["metadata"]["name"]
    for script in re.findall(r"/etc/headwise/scripts/(\S+?\.py)", yaml.safe_dump(head)):
        assert script in one("ConfigMap")["data"]


def test_ports_and_labels_fit_each_other() -> None:
    [head] = templates("service.yaml")[0]["spec"]["containers"]
    ports, flags = {port["name"]: port["containerPort"] for port in head["ports"]}, serve_options()
    assert ports["grpc"] == int(flags["--port"]) and ports["scrape"] == int(flags["--metrics-port"])
    assert {port["targetPort"]: port["port"] for port in one("Service")["spec"]["ports"]}.items() <= ports.items()
    for probe in ("startupProbe", "livenessProbe"):
        assert head[probe]["tcpSocket"]["port"] in ports
    assert f"localhost:{ports['grpc']}" in head["readinessProbe"]["exec"]["command"]
    name = one("RayCluster")["metadata"]["name"]
    assert one("Service")["spec"]["selector"] == {"ray.io/cluster": name, "ray.io/node-type": "head"}
    for kind, key in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        assert one(kind)["spec"][key]["matchLabels"] == {"ray.io/cluster": name}


def test_the_server_waits_for_what_the_ranks_want() -> None:
    head, worker = (template["spec"]["containers"][0] for template in templates("service.yaml"))
    [(kind, amount)] = re.findall(r"start\.py (\w+)=(\d+) headwise serve", head["args"][0])
    flags = serve_options()
    assert kind == "CPU" and int(amount) == int(flags["--tp"]) * int(flags["--cpus-per-rank"])
    assert int(worker["resources"]["limits"]["cpu"]) == int(amount)
    assert cluster("service.yaml")["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_a_drain_has_the_time_it_needs_and_the_ranks_outlive_it() -> None:
    head, worker = (template["spec"] for template in templates("service.yaml"))
    drain, grace = int(serve_options()["--drain-timeout"]), head["terminationGracePeriodSeconds"]
    [command] = [one["lifecycle"]["preStop"]["exec"]["command"] for one in worker["containers"]]
    sleep = int(command[1])
    assert drain + 30 < grace and drain + 20 < sleep < worker["terminationGracePeriodSeconds"] - 20


@pytest.mark.parametrize("container", ["ray-head", "ray-worker"])
def test_the_commands_of_containers_are_shell(container: str) -> None:
    [text] = [
        one["args"][0]
        for template in templates("service.yaml")
        for one in template["spec"]["containers"]
        if one["name"] == container
    ]
    done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True, timeout=10)
    assert done.returncode == 0 and not done.stderr


def run_script(
    name: str, *arguments: str, folder: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a script of the manifest, from a file in ``folder``."""
    (folder / name).write_text(one("ConfigMap")["data"][name])
    command = [sys.executable, str(folder / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_start_waits_for_ray_and_becomes_the_command(tmp_path: Path) -> None:
    """With a stand-in for Ray, whose second CPU comes late."""
    (tmp_path / "ray.py").write_text(
        "found = [1.0, 2.0]\n"
        "def init(address, **_): assert address == 'auto'\n"
        "def cluster_resources(): return {'CPU': found.pop(0)}\n"
        "def shutdown(): assert not found\n"
    )
    done = run_script("start.py", "CPU=2", "echo", "it", "serves", folder=tmp_path)
    assert done.returncode == 0 and done.stdout == "it serves\n", done.stderr
