"""Every setting of the installed SGLang is classified: what is new in a release stands out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("sglang")
from sglang.srt.server_args import ServerArgs

from sglang_moe_routing.integration import settings
from sglang_moe_routing.integration.neutral_settings import NEUTRAL_FLAGS, NEUTRAL_VARIABLES

SGLANG = Path(str(find_spec("sglang").origin)).parent  # type: ignore[union-attr]
PACKAGES = (
    *("srt/layers/moe", "srt/eplb", "srt/elastic_ep", "srt/state_capturer", "kernels/ops/moe"),
    *("srt/model_executor", "srt/batch_overlap", "srt/multiplex", "srt/kernel_plugins"),
    *("srt/managers", "srt/lora", "kernels/ops/lora"),
)
"""SGLang's MoE and router code; its graphs; its scheduler, and adapters on experts."""
VARIABLE = re.compile(r"""(?:envs\.|(["']))((?:SGLANG|SGL)_[A-Z0-9_]+)(?(1)\1)""")
"""`envs.NAME`, or the name in quotes, for whatever function reads it."""


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        assert (SGLANG / package).is_dir(), f"{package} is gone from SGLang: where did it move?"
        yield from (SGLANG / package).rglob("*.py")
    yield from (SGLANG / "kernels").glob("*.py")
    for model in (SGLANG / "srt" / "models").rglob("*.py"):
        if "layers.moe.topk" in model.read_text():
            yield model


def variables(source: str) -> set[str]:
    return {found[2] for found in VARIABLE.finditer(source)}


def test_variables_are_found_however_they_are_read() -> None:
    source = "envs.SGLANG_A.get(); get_bool_env_var('SGLANG_B'); os.environ['SGLANG_C']; SGLANG_D"
    assert variables(source) == {"SGLANG_A", "SGLANG_B", "SGLANG_C"}


def test_every_flag_is_classified() -> None:
    flags = set(ServerArgs.__struct_fields__)
    assert len(flags) > 500
    assert flags - settings.FLAGS == set(), "new flags: read what they do to the routing"
    assert settings.FLAGS - flags == set(), "flags that SGLang no longer has"


def test_every_variable_that_moe_graph_and_scheduler_code_reads_is_classified() -> None:
    found: dict[str, Path] = {}
    for path in sources():
        for name in variables(path.read_text()):
            found.setdefault(name, path.relative_to(SGLANG))
    assert len(found) > 200
    unknown = {name: str(path) for name, path in found.items() if name not in settings.VARIABLES}
    assert unknown == {}, "new variables: read what they do to the routing"
    assert settings.VARIABLES - set(found) == set(), "variables that SGLang no longer reads there"


@pytest.mark.parametrize(
    ("refused", "handled", "neutral"),
    [
        (settings.REFUSED_FLAGS, settings.HANDLED_FLAGS, NEUTRAL_FLAGS),
        (settings.REFUSED_VARIABLES, settings.HANDLED_VARIABLES, NEUTRAL_VARIABLES),
    ],
    ids=["flags", "variables"],
)
def test_no_setting_is_classified_twice(
    refused: Mapping[str, object], handled: Mapping[str, str], neutral: Mapping[str, str]
) -> None:
    listed = " ".join([*refused, *handled.values(), *neutral.values()]).split()
    assert [name for name, times in Counter(listed).items() if times > 1] == []
