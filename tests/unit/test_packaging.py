"""What SGLang finds of this package once it is installed."""

from __future__ import annotations

import re
import subprocess
import tomllib
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

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
