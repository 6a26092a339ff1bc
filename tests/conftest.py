"""How the tests share a machine: two processes, one of which starts servers (scripts/test.sh)."""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling


class Scheduler(LoadScopeScheduling):
    """A file stays in one process; so do all that start servers: ports and memory are scarce."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return "e2e" if path.startswith("tests/e2e/") else path


@pytest.hookimpl
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Scheduler:
    return Scheduler(config, log)
