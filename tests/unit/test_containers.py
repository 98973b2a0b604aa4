"""The files of `packaging/docker`, as far as they can be checked without building."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_emssd.config import parse_speculative_config

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "packaging" / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
INSTRUCTIONS = {"FROM", "RUN", "COPY", "ENV", "EXPOSE", "ENTRYPOINT"}


def instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", "", path.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_dockerfile(path: Path) -> None:
    found = instructions(path)
    assert {name for name, _ in found} <= INSTRUCTIONS
    assert found[0][0] == "FROM"
    assert found[-1][0] == "ENTRYPOINT"
    assert json.loads(found[-1][1])[-1] == "serve"
    for name, arguments in found:
        if name == "RUN":
            assert shlex.split(arguments)  # quotes are closed
        if name == "COPY":
            source, target = arguments.split()
            assert (ROOT / source).exists()
            assert any(target in text for kind, text in found if kind == "RUN")
        for used in re.findall(r"/src/([\w./-]+)", arguments):
            assert (ROOT / used).exists()


def test_what_doctor_wants_of_the_system_is_installed() -> None:
    doctor = ROOT / "vllm_emssd" / "integration" / "doctor.py"
    wanted = set(re.findall(r"apt-get install ([\w+.-]+)", doctor.read_text()))
    assert wanted >= {"g++", "libnuma1"}
    name, arguments = instructions(DOCKER / "Dockerfile.cpu")[1]
    assert name == "RUN"
    assert wanted <= set(shlex.split(arguments))


def test_both_dockerfiles_are_there() -> None:
    assert [path.suffix for path in DOCKERFILES] == [".cpu", ".cuda"]


def test_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (cpu,) = project["optional-dependencies"]["cpu"]
    assert cpu in (DOCKER / "Dockerfile.cpu").read_text()
    version = cpu.split("==")[1]
    assert f"vllm-openai:v{version}\n" in (DOCKER / "Dockerfile.cuda").read_text()


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((DOCKER / name).read_text())


def test_compose_mounts_what_is_there() -> None:
    compose = read("compose.yml")
    services = compose["services"]
    build = services["vllm"]["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    for service in services.values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            is_named = source in compose["volumes"]
            assert is_named or (DOCKER / source).exists(), source


def test_compose_serves_with_emssd() -> None:
    model, flag, options = read("compose.yml")["services"]["vllm"]["command"]
    assert "/" in model
    assert flag == "--speculative-config"
    config, _ = parse_speculative_config(json.loads(options), ["method"])
    assert config.proposer == "llma"


def test_prometheus_and_grafana_find_each_other() -> None:
    services = read("compose.yml")["services"]
    (job,) = read("prometheus.yml")["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert f"{port}:{port}" in services[host]["ports"]
    (source,) = read("grafana/datasources.yml")["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert f"{port}:{port}" in services[host]["ports"]
    (provider,) = read("grafana/dashboards.yml")["providers"]
    mounts = dict(m.split(":")[1::-1] for m in services["grafana"]["volumes"])
    folder = DOCKER / mounts[provider["options"]["path"]]
    assert list(folder.glob("*.json"))
