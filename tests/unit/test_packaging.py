"""What SGLang finds of this package once it is installed."""

from __future__ import annotations

import tomllib
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[2]
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
