"""The examples of deployment: linters accept them, and they say what the command line and the package understand."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from jaxpaged.serve.app import app
from jaxpaged.serve.server.run import CLOSE_TIMEOUT
from tests.support.repository import ROOT, SOURCE_FOLDERS, repository_files

DEPLOY = ROOT / "deploy"
MANIFESTS = ("kubernetes.yaml", "autoscaling.yaml")
# The oldest Kubernetes with a preStop of its own that sleeps, and the newest that the validator knows.
KUBERNETES_VERSIONS = ("1.30.0", None)


def expect_no_complaint(name: str, *arguments: str) -> None:
    """Runs a linter, of this environment or of the system, which must not complain."""
    folders = (str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))
    program = shutil.which(name, path=os.pathsep.join(folders))
    if program is None:
        pytest.skip(f"needs {name}, which is not installed")
    result = subprocess.run([program, *arguments], cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def manifest(kind: str) -> dict[str, Any]:
    [found] = [document for name in MANIFESTS for document in documents(name) if document["kind"] == kind]
    return found


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = manifest("Deployment")["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    [only] = pod()["containers"]
    assert isinstance(only, dict)
    return only


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, comments left out and continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word
    ]


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The options of a command line of ``jaxpaged serve``; fails for one that it does not understand."""
    assert arguments[0] == "serve"
    group: Any = typer.main.get_command(app)
    with group.commands["serve"].make_context("serve", arguments[1:]) as context:
        params: dict[str, Any] = context.params
    return params


def test_hadolint_accepts_the_dockerfile() -> None:
    expect_no_complaint("hadolint", "Dockerfile")


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_kubernetes_schemas_accept_the_manifests(version: str | None) -> None:
    chosen = () if version is None else ("--kubernetes-version", version)
    expect_no_complaint("kubernetes-validate", "--strict", *chosen, *MANIFESTS)


def test_yamllint_accepts_the_manifests() -> None:
    rules = "{extends: default, rules: {line-length: {max: 130}}}"
    expect_no_complaint("yamllint", "--strict", "--config-data", rules, *MANIFESTS)


def test_image_is_built_of_what_the_package_is() -> None:
    copied = [rest.split()[:-1] for word, rest in instructions() if word == "COPY" and "--from" not in rest]
    sources = {name for names in copied for name in names}
    assert sources == {"pyproject.toml", "setup.py", "README.md", "LICENSE", *SOURCE_FOLDERS}
    top = {path.parts[0] for path in repository_files()}
    assert sources <= top
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[1] == "*", "everything but what is named"
    assert {line[1:] for line in ignored if line.startswith("!")} == sources
    [extras] = [rest.partition("=")[2].split(",") for word, rest in instructions() if word == "ARG"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras) <= set(project["optional-dependencies"])


def test_image_ends_gracefully_and_is_nobody() -> None:
    last = dict(instructions())
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last["USER"]), "a number other than root's"
    assert "/health" in last["HEALTHCHECK"]
    assert last["ENTRYPOINT"] == '["jaxpaged"]'
    options = parsed(yaml.safe_load(last["CMD"]))
    assert f"127.0.0.1:{options['port']}/health" in last["HEALTHCHECK"]
    assert last["EXPOSE"] == str(options["port"])
    assert str(options["compilation_cache"]) in last["VOLUME"]


def test_commands_told_in_comments_are_understood() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    [command] = re.findall(r"^#\s+jaxpaged (serve .*)$", text, re.MULTILINE)
    assert parsed(shlex.split(command))["host"] == "0.0.0.0"


def test_pod_has_time_to_compile_and_to_drain() -> None:
    server, options = container(), parsed(container()["args"])
    probes = {name: server[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {probe["httpGet"]["path"] for probe in probes.values()} == {"/health"}
    startup = probes["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1200, (
        "503 while it compiles is no failure"
    )
    assert manifest("Deployment")["spec"]["progressDeadlineSeconds"] > 1200
    needed = server["lifecycle"]["preStop"]["sleep"]["seconds"] + options["drain_timeout"] + CLOSE_TIMEOUT
    assert pod()["terminationGracePeriodSeconds"] >= needed + 10


def test_pod_listens_where_it_is_asked_and_writes_where_it_may() -> None:
    server, options = container(), parsed(container()["args"])
    assert options["host"] == "0.0.0.0"
    assert [port["containerPort"] for port in server["ports"]] == [options["port"]]
    annotations = manifest("Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(options["port"])
    mounts = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
    assert mounts[str(options["api_key_file"].parent)]["readOnly"]
    assert mounts[str(options["folder"].parent)]["readOnly"]
    assert not mounts[str(options["compilation_cache"])].get("readOnly")
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    assert {mount["name"] for mount in mounts.values()} == set(volumes)
    assert "secret" in volumes[mounts[str(options["api_key_file"].parent)]["name"]]


def test_pod_is_confined_and_has_a_gpu() -> None:
    server = container()
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod()["securityContext"]["runAsNonRoot"] is True
    user = dict(instructions())["USER"]
    assert user == f"{pod()['securityContext']['runAsUser']}:{pod()['securityContext']['runAsGroup']}"
    inner = server["securityContext"]
    assert inner["readOnlyRootFilesystem"] is True
    assert inner["allowPrivilegeEscalation"] is False
    assert inner["capabilities"] == {"drop": ["ALL"]}
    assert pod()["automountServiceAccountToken"] is False


def test_manifests_speak_of_the_same_pods() -> None:
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert manifest("Deployment")["spec"]["selector"]["matchLabels"] == labels
    assert manifest("Service")["spec"]["selector"] == labels
    assert manifest("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert manifest("NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels
    assert manifest("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["name"] == "jaxpaged"
    namespaces = {document["metadata"]["namespace"] for name in MANIFESTS for document in documents(name)}
    assert namespaces == {"jaxpaged"}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert container()["image"].endswith(f"/jaxpaged:{version}")
    assert "Secret" not in {document["kind"] for name in MANIFESTS for document in documents(name)}
