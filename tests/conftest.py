"""How the tests share a machine: two processes, of which one alone starts servers."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)  # the groups are read in a hook of the same name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file stays in one process; so do all that start servers: ports and memory are scarce."""
    for item in items:
        path = item.path.relative_to(Path(__file__).parent)
        group = path.parts[0] if path.parts[0] == "e2e" else str(path)
        item.add_marker(pytest.mark.xdist_group(group))
