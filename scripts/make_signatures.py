"""Write the file of the installed SGLang release: engine/releases/<version>.json.

It holds the signature of every symbol that the package hooks or relies on, the flags of the server,
and the environment variables that SGLang's MoE, router, graph and scheduler code reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = (
    *("srt/layers/moe", "srt/eplb", "srt/elastic_ep", "srt/state_capturer", "kernels/ops/moe"),
    *("srt/model_executor", "srt/batch_overlap", "srt/multiplex", "srt/kernel_plugins"),
    *("srt/managers", "srt/lora", "kernels/ops/lora"),
)
"""SGLang's MoE and router code; its graphs; its scheduler, and adapters on experts."""
MISSING = {"0.5.22": {"srt/kernel_plugins"}}
"""Those that a release does not have."""
VARIABLE = re.compile(r"""(?:envs\.|(["']))((?:SGLANG|SGL)_[A-Z0-9_]+)(?(1)\1)""")
"""`envs.NAME`, or the name in quotes, for whatever function reads it."""


def current() -> dict[str, Any]:
    """What the file of the installed release must hold."""
    from sglang.srt.server_args import ServerArgs

    from sglang_moe_routing.engine import signatures
    from sglang_moe_routing.integration.hooks import entries

    targets = sorted({entry.target for entry in entries()})
    return {
        "symbols": {target: signatures.signature(target) for target in targets},
        "flags": sorted(ServerArgs.__struct_fields__),
        "variables": sorted(set().union(*map(variables, sources(signatures.installed())))),
    }


def sources(release: str) -> Iterator[str]:
    """Texts of the files whose variables count."""
    root = Path(str(find_spec("sglang").origin)).parent  # type: ignore[union-attr]
    for package in set(PACKAGES) - MISSING.get(release, set()):
        if not (root / package).is_dir():
            raise FileNotFoundError(f"{package} is gone from SGLang: where did it move?")
        yield from (path.read_text() for path in (root / package).rglob("*.py"))
    yield from (path.read_text() for path in (root / "kernels").glob("*.py"))
    for model in (root / "srt" / "models").rglob("*.py"):
        if "layers.moe.topk" in (text := model.read_text()):
            yield text


def variables(source: str) -> set[str]:
    """The environment variables that a source names."""
    return {found[2] for found in VARIABLE.finditer(source)}


def main() -> None:
    from sglang_moe_routing.engine import signatures

    path = signatures.FOLDER / f"{signatures.installed()}.json"
    path.write_text(json.dumps(current(), indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
