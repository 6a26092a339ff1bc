"""What SGLang finds of this package once it is installed."""

from __future__ import annotations

import re
import subprocess
import tomllib
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

from scripts import check_release

ROOT = Path(__file__).parents[2]
OF_A_MACHINE = re.compile(
    rb"(?<![\w.}])/(?:work|workspace|root|home|Users|mnt|tmp)/[\w.-]+|Linux \d+\.\d+\.\d+-\S+"
)
OF_THE_IMAGE = rb"/home/serve"
PLATFORM = ROOT / "sglang_moe_routing/cpu/distribution"


def test_plugin_and_platform_are_distributions_of_their_own_in_one_wheel() -> None:
    """SGLang skips the plugins of a distribution whose platform is not the selected one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["project"]["entry-points"]
    assert "sglang.srt.plugins" in groups
    assert "sglang.srt.platforms" not in groups
    entry_points = ConfigParser()
    entry_points.read(PLATFORM / "entry_points.txt")
    assert entry_points.sections() == ["sglang.srt.platforms"]
    metadata = Parser().parsestr((PLATFORM / "PKG-INFO").read_text())
    assert metadata["Name"] != project["project"]["name"]
    assert metadata["Version"] == project["project"]["version"]
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included[str(PLATFORM.relative_to(ROOT))].endswith(".egg-info")


def test_the_audit_asks_no_index_for_the_platform() -> None:
    """The name is on no index of ours: advisories of another's package would be taken for it."""
    metadata = Parser().parsestr((PLATFORM / "PKG-INFO").read_text())
    assert (
        f"freeze --exclude-editable --exclude {metadata['Name']} |"
        in (ROOT / "scripts/audit.sh").read_text()
    )


def test_every_place_says_the_version_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    said = {"CITATION.cff": yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]}
    for file in ("docker/Dockerfile", "docker/Dockerfile.cpu"):
        (said[file],) = re.findall(r"^ARG VERSION=(.*)$", (ROOT / file).read_text(), re.MULTILINE)
    assert said == dict.fromkeys(said, version)


def test_a_tag_must_be_the_version_and_the_changelog_know_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_release, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.3 (2026-12-01)\n\n## 1.2.2\n")
    assert check_release.problems("v1.2.3") == []
    (wrong_tag,) = check_release.problems("v1.2.4")
    assert "the tag is v1.2.4, but pyproject.toml says version 1.2.3: tag v1.2.3" in wrong_tag
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\nfor 1.2.3\n")
    (unknown,) = check_release.problems("v1.2.3")
    assert "CHANGELOG.md has no heading '## 1.2.3'" in unknown


def test_commit_hooks_are_the_steps_of_the_check() -> None:
    """One list: a hook calls a step, and every step is a hook."""
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook["entry"] for hook in local["hooks"]]
    (steps,) = re.findall(
        r"\|\| set -- (.*)$", (ROOT / "scripts/check.sh").read_text(), re.MULTILINE
    )
    assert hooks == [f"scripts/check.sh {step}" for step in steps.split()]


def committed() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    command = ["git", "-C", ROOT, "ls-files", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_no_committed_file_tells_of_the_machine_that_made_it() -> None:
    """Nor do the headers of models and pictures. Dockerfiles name paths of their own image."""
    found = {
        f"{path.relative_to(ROOT)}: {match[0].decode()}"
        for path in committed()
        if path.parent.name != "docker"
        for match in OF_A_MACHINE.finditer(path.read_bytes())
        if match[0] != OF_THE_IMAGE
    }
    assert sorted(found) == []


def test_the_wheel_has_no_simulator() -> None:
    """All of csrc is in the wheel."""
    assert not [*(ROOT / "csrc").rglob("simt*")]
