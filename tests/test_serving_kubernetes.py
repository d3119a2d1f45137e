"""The manifests under deploy/: what each kind must have, names that refer to each other, options and settings that exist."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import uso_engine.cli.serve  # noqa: F401  adds its commands
from uso_engine.cli.app import app
from uso_engine.config import list_configs
from uso_engine.serving.ray.arguments import read_arguments, server_settings

Manifest = dict[str, Any]
VERSIONS = {
    "Namespace": "v1",
    "PersistentVolumeClaim": "v1",
    "Service": "v1",
    "Job": "batch/v1",
    "Deployment": "apps/v1",
    "PodDisruptionBudget": "policy/v1",
    "RayService": "ray.io/v1",
}
# Versions of Kubernetes: about the oldest that a cloud still runs, and newer ones.
SCHEMAS = ("1.30", "1.33", "1.36")
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti)?")
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def pods(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Every pod's specification, with a word for messages."""
    name = f"{manifest['kind']} {manifest['metadata']['name']}"
    if manifest["kind"] == "RayService":
        cluster = manifest["spec"]["rayClusterConfig"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            yield f"{name} {group.get('groupName', 'head')}", group["template"]["spec"]
    elif "template" in manifest.get("spec", {}):
        yield name, manifest["spec"]["template"]["spec"]


def problems(manifests: list[Manifest]) -> list[str]:
    """What is wrong with the manifests of a file; a claim may be in another one."""
    wrong = []
    for manifest in manifests:
        kind, name = manifest.get("kind"), manifest.get("metadata", {}).get("name", "")
        if VERSIONS.get(str(kind)) != manifest.get("apiVersion"):
            wrong.append(f"{kind} has apiVersion {manifest.get('apiVersion')}")
            continue
        if not NAME.fullmatch(name):
            wrong.append(f"{kind} is called {name!r}")
        if kind != "Namespace" and manifest["metadata"].get("namespace") != "uso":
            wrong.append(f"{kind} {name} is in no namespace of ours")
        for place, spec in pods(manifest):
            wrong += [f"{place}: {text}" for text in pod_problems(spec)]
        wrong += [f"{kind} {name}: {text}" for text in selector_problems(manifest, manifests)]
    return wrong


def pod_problems(spec: Manifest) -> Iterator[str]:
    """Privileges, resources, volumes and probes of a pod."""
    security = spec.get("securityContext", {})
    if not (security.get("runAsNonRoot") is True and security.get("seccompProfile") == {"type": "RuntimeDefault"}):
        yield "runs with privileges"
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    for container in spec["containers"]:
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{container['name']} may gain privileges"
        image = container["image"].rpartition(":")
        if not image[1] or image[2] == "latest":
            yield f"{container['image']} is no fixed version"
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        values = [*requests.values(), *limits.values()]
        if not all(isinstance(value, str) and QUANTITY.fullmatch(value) for value in values):
            yield f"quantities {values}"
        for resource in ("memory", "nvidia.com/gpu"):
            if requests.get(resource) != limits.get(resource):
                yield f"{resource} is asked for and limited differently"
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        if mounted != mounted & volumes or "scratch" not in mounted:
            yield f"mounts {sorted(mounted)}, has {sorted(volumes)}"
        ports = {port["name"] for port in container.get("ports", [])}
        if not all(len(port) <= 15 for port in ports):
            yield f"port names {sorted(ports)}"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe in container and container[probe]["httpGet"]["port"] not in ports:
                yield f"{probe} asks at no port"
        for variable in container.get("env", []):
            if not isinstance(variable.get("value", ""), str):
                yield f"{variable['name']} is no string"


def selector_problems(manifest: Manifest, manifests: list[Manifest]) -> Iterator[str]:
    """Selectors that select nothing."""
    labels = [m["spec"]["template"]["metadata"]["labels"] for m in manifests if m["kind"] in ("Deployment", "Job")]
    selector = manifest.get("spec", {}).get("selector")
    if selector is not None:
        wanted = selector.get("matchLabels", selector)
        if not any(wanted.items() <= found.items() for found in labels):
            yield f"selects {wanted}, which no pod has"


@pytest.fixture(params=["kubernetes.yaml", "kuberay.yaml"])
def manifests(request: pytest.FixtureRequest, repository: Path) -> list[Manifest]:
    return list(yaml.safe_load_all((repository / "deploy" / request.param).read_text()))


def test_manifests_have_what_their_kinds_must_have(manifests: list[Manifest]) -> None:
    assert problems(manifests) == []


@pytest.fixture(scope="module")
def validate() -> Callable[..., str]:
    """Kubernetes' own schemas of every version, applied strictly: unknown fields are errors."""
    missing = "kubernetes-validate is not installed: pip install kubernetes-validate (110 MB, with the schemas)"
    found: Callable[..., str] = pytest.importorskip("kubernetes_validate", reason=missing).validate
    return found


@pytest.mark.parametrize("version", SCHEMAS)
def test_manifests_keep_to_kubernetes_schemas(version: str, manifests: list[Manifest], validate: Callable[..., str]) -> None:
    """Of a RayService, which is KubeRay's, the pods."""
    for manifest in manifests:
        if manifest["kind"] != "RayService":
            validate(manifest, version, strict=True)
        for place, spec in pods(manifest):
            validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": place}, "spec": spec}, version, strict=True)


def test_the_schemas_find_what_is_no_field(manifests: list[Manifest], validate: Callable[..., str]) -> None:
    (_, spec), *_ = (found for manifest in deepcopy(manifests) for found in pods(manifest))
    spec["containers"][0]["volumeMount"] = spec["containers"][0].pop("volumeMounts")
    with pytest.raises(Exception, match="volumeMount"):
        validate({"apiVersion": "v1", "kind": "Pod", "spec": spec}, SCHEMAS[-1], strict=True)


def test_the_server_is_probed_and_given_options_that_exist(repository: Path) -> None:
    found = list(yaml.safe_load_all((repository / "deploy" / "kubernetes.yaml").read_text()))
    (deployment,) = (one for one in found if one["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    assert server["command"] == ["uso-engine", "serve"]
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    options = {name for parameter in serve.params for name in parameter.opts}
    given = dict(argument.split("=", 1) for argument in server["args"])
    assert set(given) <= options and given["--config"] in list_configs()
    assert {"--keys", "--storage"} <= set(given) and given["--port"] == str(server["ports"][0]["containerPort"])
    assert {server[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe")} == {"/readyz"}
    assert server["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert pod["terminationGracePeriodSeconds"] > int(given["--drain"])
    claims = {one["metadata"]["name"] for one in found if one["kind"] == "PersistentVolumeClaim"}
    used = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
    assert used <= claims


def test_the_ray_service_builds_an_application_that_has_room(repository: Path) -> None:
    (service,) = yaml.safe_load_all((repository / "deploy" / "kuberay.yaml").read_text())
    document = yaml.safe_load(service["spec"]["serveConfigV2"])
    (one,) = document["applications"]
    assert one["import_path"] == "uso_engine.serving.ray.application:build"
    arguments = read_arguments(one["args"])
    assert arguments.config in list_configs()
    deadline_s = server_settings(arguments.server, has_keys=True).bounds.deadline_s
    cluster = service["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    # A worker holds a replica, and the cluster may grow to as many as the application may ask for.
    assert arguments.replicas.cpus <= float(worker["resources"]["requests"]["cpu"])
    assert group["minReplicas"] >= arguments.replicas.least and group["maxReplicas"] >= arguments.replicas.most
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > deadline_s
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {"serve": document["http_options"]["port"]}.items() <= {p["name"]: p["containerPort"] for p in head["ports"]}.items()
    assert all(isinstance(value, str) for g in (cluster["headGroupSpec"], group) for value in g["rayStartParams"].values())


def _container(manifests: list[Manifest]) -> Manifest:
    found: Manifest = next(spec for manifest in manifests for _, spec in pods(manifest))["containers"][0]
    return found


FAULTS: dict[str, Callable[[list[Manifest]], object]] = {
    "apiVersion": lambda m: m[-1].update(apiVersion="v2"),
    "privileges": lambda m: next(spec for one in m for _, spec in pods(one)).pop("securityContext"),
    "gain privileges": lambda m: _container(m).pop("securityContext"),
    "no fixed version": lambda m: _container(m).update(image="registry.example/uso-engine:latest"),
    "quantities": lambda m: _container(m)["resources"]["requests"].update(cpu=2),
    "limited differently": lambda m: _container(m)["resources"]["limits"].update(memory="1Gi"),
    "mounts": lambda m: _container(m)["volumeMounts"].append({"name": "missing", "mountPath": "/x"}),
    "no string": lambda m: _container(m)["env"].append({"name": "N", "value": 0}),
}


@pytest.mark.parametrize("said", FAULTS)
def test_a_seeded_fault_is_found(said: str, manifests: list[Manifest]) -> None:
    broken = deepcopy(manifests)
    FAULTS[said](broken)
    assert any(said in problem for problem in problems(broken))
