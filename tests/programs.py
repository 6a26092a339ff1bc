"""Programs that tests use and that no package of Python brings."""

from __future__ import annotations

import shutil

import pytest


def prometheus(program: str = "prometheus") -> str:
    """Path of `program`; skips the test where it is not installed. CI installs it."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed (Debian: apt install prometheus)")
    return found
