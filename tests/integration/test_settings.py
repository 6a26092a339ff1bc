"""Every setting of the supported releases is classified: what is new in a release stands out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest

from scripts import make_signatures

settings = pytest.importorskip("sglang_moe_routing.integration.settings")
from sglang_moe_routing.engine import signatures  # noqa: E402

RELEASES = [signatures.Release.read(name) for name in signatures.supported()]


def test_variables_are_found_however_they_are_read() -> None:
    source = "envs.SGLANG_A.get(); get_bool_env_var('SGLANG_B'); os.environ['SGLANG_C']; SGLANG_D"
    assert make_signatures.variables(source) == {"SGLANG_A", "SGLANG_B", "SGLANG_C"}


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_every_setting_of_a_supported_release_is_classified(release: signatures.Release) -> None:
    """That the files name all settings of their release is held by test_signatures.py."""
    flags, variables = set(release.flags), set(release.variables)
    assert len(flags) > 500
    assert len(variables) > 200
    assert flags - settings.FLAGS == set(), "new flags: read what they do to the routing"
    assert variables - settings.VARIABLES == set(), (
        "new variables: read what they do to the routing"
    )


def test_no_setting_is_classified_that_no_supported_release_has() -> None:
    assert settings.FLAGS - {flag for release in RELEASES for flag in release.flags} == set()
    known = {name for release in RELEASES for name in release.variables}
    assert settings.VARIABLES - known == set()


@pytest.mark.parametrize(
    ("refused", "handled", "neutral"),
    [
        (settings.REFUSED_FLAGS, settings.HANDLED_FLAGS, settings.NEUTRAL_FLAGS),
        (settings.REFUSED_VARIABLES, settings.HANDLED_VARIABLES, settings.NEUTRAL_VARIABLES),
    ],
    ids=["flags", "variables"],
)
def test_no_setting_is_classified_twice(
    refused: Mapping[str, object], handled: Mapping[str, str], neutral: Mapping[str, str]
) -> None:
    listed = " ".join([*refused, *handled.values(), *neutral.values()]).split()
    assert [name for name, times in Counter(listed).items() if times > 1] == []
