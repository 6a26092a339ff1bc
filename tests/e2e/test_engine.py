"""The offline `sglang.Engine`, as the example uses it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from sglang_moe_routing import demo
from sglang_moe_routing.serving.server import server_environment

EXAMPLE = Path(__file__).parents[2] / "examples" / "offline_engine.py"


def test_engine_serves_policies_per_item(config: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(EXAMPLE), str(demo.MODEL), "oea-k3"],
        env=server_environment(config, cpu=True, base={**os.environ, "OMP_NUM_THREADS": "1"}),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert re.search(r"^oea-k3: '", run.stdout, re.MULTILINE), run.stdout
    assert re.search(r"^vanilla: '", run.stdout, re.MULTILINE)
    assert re.search(r"^refused: .*unknown MoE routing policy 'nonesuch'", run.stdout, re.MULTILINE)
    layers = re.findall(
        r"^layer \d: 5 steps, ([\d.]+) -> ([\d.]+) experts$", run.stdout, re.MULTILINE
    )
    assert len(layers) == 4
    assert all(float(after) < float(before) for before, after in layers)
