"""The deployment files agree with each other, with the package and with what SGLang measures."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sglang_moe_routing.config import load_config
from sglang_moe_routing.engine import signatures
from sglang_moe_routing.kernels import native
from sglang_moe_routing.runtime import metrics
from tests.programs import prometheus

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu"]
DASHBOARDS = sorted((DOCKER / "monitoring/grafana/dashboards/json").glob("*.json"))
RULES = DOCKER / "monitoring/rules.yaml"
YAML_FILES = sorted(DOCKER.rglob("*.yaml"))
SGLANG = Path(importlib.util.find_spec("sglang").origin).parent  # type: ignore[union-attr, arg-type]
COLLECTOR = SGLANG / "srt/observability/metrics_collector.py"

METRICS = {
    f"{metrics.PREFIX}{metric.name}{'_total' * (metric.kind == 'counter')}"
    for metric in metrics.METRICS
}
"""Every metric of this package."""


class ComposeLoader(yaml.SafeLoader):
    """YAML with Compose's merge tags."""


ComposeLoader.add_constructor("!reset", lambda loader, node: None)


def load_all(path: Path) -> list[Any]:
    return list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=ComposeLoader))


def load(path: Path) -> Any:
    (document,) = load_all(path)
    return document


def documents(kind: str) -> list[dict[str, Any]]:
    return [d for d in load_all(DOCKER / "kubernetes.yaml") if d["kind"] == kind]


def container() -> dict[str, Any]:
    (deployment,) = documents("Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return container


def instructions(dockerfile: Path, name: str) -> Iterator[str]:
    """Arguments of every instruction of one kind, with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(encoding="utf-8"), flags=re.M)
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == name:
            yield rest.strip()


def copied(dockerfile: Path) -> list[str]:
    """Paths that a Dockerfile takes from the build context."""
    return [
        source
        for arguments in instructions(dockerfile, "COPY")
        if not arguments.startswith("--from=")
        for source in arguments.split()[:-1]
    ]


def sources(dockerfile: Path) -> set[str]:
    """What the ignore file beside a Dockerfile lets into the build context."""
    ignore = dockerfile.with_name(f"{dockerfile.name}.dockerignore")
    lines = ignore.read_text(encoding="utf-8").splitlines()
    return {line[1:] for line in lines if line.startswith("!")}


def dashboard_queries() -> Iterator[str]:
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text(encoding="utf-8"))
        for panel in dashboard["panels"]:
            yield from (target["expr"] for target in panel.get("targets", []))
        yield from (
            variable["definition"]
            for variable in dashboard["templating"]["list"]
            if variable["type"] == "query"
        )


def rule_queries() -> Iterator[str]:
    for group in load(RULES)["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]


def promtool(*arguments: str | Path) -> None:
    result = subprocess.run([prometheus("promtool"), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_no_complaint(dockerfile: Path) -> None:
    hadolint = shutil.which("hadolint", path=sysconfig.get_path("scripts")) or shutil.which(
        "hadolint"
    )
    assert hadolint, "hadolint is missing; install the test extra"
    result = subprocess.run([hadolint, "--no-color", dockerfile], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_copied_paths_exist_and_are_exactly_the_build_context(dockerfile: Path) -> None:
    paths = copied(dockerfile)
    assert all((ROOT / path).exists() for path in paths), paths
    assert {path.removeprefix("./") for path in paths} == sources(dockerfile)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_a_numbered_user_that_is_not_root(dockerfile: Path) -> None:
    *_, user = instructions(dockerfile, "USER")
    assert user == "10001:10001"


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_serves_and_checks_its_health(dockerfile: Path) -> None:
    (entrypoint,) = instructions(dockerfile, "ENTRYPOINT")
    assert json.loads(entrypoint) == ["tini", "--", "sglang-moe-routing", "serve"]
    (health,) = instructions(dockerfile, "HEALTHCHECK")
    assert ":30000/health'" in health
    (command,) = instructions(dockerfile, "CMD")
    assert json.loads(command)[-3:] == ["--port", "30000", "--enable-metrics"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_prebuilt_kernels_lie_where_the_server_looks(dockerfile: Path) -> None:
    settings = " ".join(instructions(dockerfile, "ENV")).split()
    assert f"{native.CACHE}=/opt/moe-routing/kernels" in settings
    assert any("sglang-moe-routing build" in command for command in instructions(dockerfile, "RUN"))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_the_link_to_the_demo_is_made_by_a_python_that_ignores_the_checkout(
    dockerfile: Path,
) -> None:
    (command,) = (run for run in instructions(dockerfile, "RUN") if "demo.MODEL" in run)
    assert re.search(r"python3? -I -c 'from sglang_moe_routing import demo", command)


def test_the_gpu_image_is_based_on_the_supported_sglang() -> None:
    first, *_ = instructions(DOCKERFILES[0], "ARG")
    *_, newest = signatures.supported()
    assert first == f"BASE=lmsysorg/sglang:v{newest}"


def test_the_gpu_image_compiles_for_every_target_architecture() -> None:
    (given,) = (a for a in instructions(DOCKERFILES[0], "ARG") if a.startswith("ARCHITECTURES="))
    architectures = given.partition("=")[2].strip('"').split()
    assert set(native.TARGET_ARCHITECTURES) <= set(architectures)


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(DOCKER)))
def test_every_yaml_file_parses(path: Path) -> None:
    assert all(isinstance(document, dict) for document in load_all(path))


def test_the_config_that_compose_mounts_is_valid() -> None:
    assert "oea-k3" in load_config(DOCKER / "routing/routing.yaml").config.names


def test_the_config_in_the_config_map_is_valid_and_the_same(tmp_path: Path) -> None:
    (config_map,) = documents("ConfigMap")
    (name,) = config_map["data"]
    path = tmp_path / name
    path.write_text(config_map["data"][name])
    load_config(path)
    assert yaml.safe_load(config_map["data"][name]) == load(DOCKER / "routing/routing.yaml")


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cpu.yaml"])
def test_what_compose_mounts_and_builds_exists(name: str) -> None:
    compose = load(DOCKER / name)
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).exists(), source
                assert volume.endswith(":ro"), volume
            else:
                assert source in compose["volumes"]
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_prometheus_scrapes_the_server_of_compose_and_reads_the_rules() -> None:
    config = load(DOCKER / "monitoring/prometheus.yaml")
    (job,) = config["scrape_configs"]
    (targets,) = (static["targets"] for static in job["static_configs"])
    assert targets == ["server:30000"]
    assert "server" in load(DOCKER / "compose.yaml")["services"]
    assert config["rule_files"] == [RULES.name]


def test_grafana_finds_its_dashboards_where_compose_mounts_them() -> None:
    (provider,) = load(DOCKER / "monitoring/grafana/dashboards/config/dashboard.yaml")["providers"]
    mounts = load(DOCKER / "compose.yaml")["services"]["grafana"]["volumes"]
    (mount,) = (m for m in mounts if m.endswith(f":{provider['options']['path']}:ro"))
    assert (DOCKER / mount.split(":")[0]).resolve() == DASHBOARDS[0].parent


@pytest.mark.parametrize("arguments", ["compose.yaml", "compose.cpu.yaml", "kubernetes.yaml"])
def test_servers_read_mounted_files_and_export_metrics(arguments: str) -> None:
    if arguments == "kubernetes.yaml":
        command = container()["args"]
        folders = [mount["mountPath"] for mount in container()["volumeMounts"]]
    else:
        command = load(DOCKER / arguments)["services"]["server"]["command"]
        server = load(DOCKER / "compose.yaml")["services"]["server"]
        folders = [volume.split(":")[1] for volume in server["volumes"]]
        folders += [config["target"] for config in server["configs"]]
    assert "--enable-metrics" in command
    for flag in ("--routing-config", "--config"):
        path = command[command.index(flag) + 1]
        assert any(Path(path).is_relative_to(folder) for folder in folders), path


def test_the_config_map_is_mounted_as_a_folder_so_that_changes_arrive() -> None:
    assert not [mount for mount in container()["volumeMounts"] if "subPath" in mount]


def test_probes_ask_for_health_and_wait_as_long_as_sglang_may_take() -> None:
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container()[name]
        assert probe["httpGet"]["path"] == "/health"
        assert probe["timeoutSeconds"] > 20


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_panel_ids_are_unique_and_panels_do_not_overlap(path: Path) -> None:
    panels = json.loads(path.read_text(encoding="utf-8"))["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(ids) == len(set(ids))
    cells = [
        cell
        for place in (panel["gridPos"] for panel in panels)
        for cell in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
    ]
    assert len(cells) == len(set(cells))


def test_every_metric_of_ours_is_documented_and_used() -> None:
    queries = "\n".join([*dashboard_queries(), *rule_queries()])
    assert set(re.findall(r"sglang_moe_routing_\w+", queries)) == METRICS


def test_every_metric_of_sglang_exists_there() -> None:
    names = set(re.findall(r"sglang:\w+", "\n".join(dashboard_queries())))
    assert names
    defined = set(re.findall(r'name="(sglang:\w+)"', COLLECTOR.read_text(encoding="utf-8")))
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in names} <= defined


def test_the_rule_on_kernels_knows_the_reference_by_its_name() -> None:
    """The label goes on with the reason."""
    assert [query for query in rule_queries() if f'kernels=~"{native.REFERENCE}.*"' in query]


def test_prometheus_accepts_its_config_and_the_rules() -> None:
    promtool("check", "config", DOCKER / "monitoring/prometheus.yaml")


def test_alerts_are_raised_when_they_should_be_and_not_before() -> None:
    promtool("test", "rules", Path(__file__).with_name("alerts.yaml"))


def test_prometheus_parses_every_query_of_the_dashboard(tmp_path: Path) -> None:
    """As recording rules; Grafana fills in its variables first."""
    queries = [query for query in dashboard_queries() if not query.startswith("label_values(")]
    assert len(queries) > 10
    filled = [query.replace("$__rate_interval", "1m") for query in queries]
    rules = [{"record": f"query{i}", "expr": query} for i, query in enumerate(filled)]
    path = tmp_path / "queries.yaml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", path)


def test_no_file_holds_a_key_or_password() -> None:
    """A value behind such a name is a variable of compose or the name of a file."""
    secret = re.compile(r"(?:key|password|token)[\"']?\s*[:=]\s*[\"']?([^\s\"']+)", re.I)
    for path in (p for p in DOCKER.rglob("*") if p.is_file() and p.suffix != ".json"):
        lines = path.read_text(encoding="utf-8").splitlines()
        for line in (line for line in lines if not line.lstrip().startswith("#")):
            for value in secret.findall(line):
                assert value == "false" or value.startswith("${"), f"{path.name}: {line}"
