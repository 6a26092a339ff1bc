"""Print what the installed package requires and this Python lacks, one requirement a line.

A base image brings SGLang and most of the rest in versions that must stay; only what is absent may
be added. A requirement that is there in a version that does not fit is an error.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

wrong = []
for line in requires("sglang-moe-routing") or []:
    requirement = Requirement(line)
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        continue
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        print(requirement)
        continue
    if not requirement.specifier.contains(found, prereleases=True):
        wrong.append(f"{requirement}, but the base image has {found}")
if wrong:
    sys.exit("\n".join(wrong))
