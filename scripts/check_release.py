"""Fail unless the given tag is "v" and pyproject.toml's version, and the changelog knows it."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def problems(tag: str) -> list[str]:
    """What speaks against publishing under `tag`; empty if nothing does."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    version = project["project"]["version"]
    found = []
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, but pyproject.toml says version {version}: tag v{version}")
    headings = [
        line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line[:2] == "##"
    ]
    if not any(heading.removeprefix("##").split()[:1] == [version] for heading in headings):
        found.append(f"CHANGELOG.md has no heading '## {version}': give Unreleased its version")
    return found


def main() -> int:
    found = problems(sys.argv[1] if len(sys.argv) == 2 else "")
    print("\n".join(found), file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
