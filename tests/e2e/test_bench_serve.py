"""`bench serve` on a real server, at tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .conftest import Running


def test_bench_serve_reports_active_experts_beside_times(served: Running, tmp_path: Path) -> None:
    sizes = ["--concurrency", "4", "--num-prompts", "4", "--input-len", "4", "--output-len", "24"]
    command = ["bench", "serve", "--url", served.url, "--policies", "vanilla,topk-k3", *sizes]
    command += ["--rounds", "1", "--out", str(tmp_path), "--json"]
    run = subprocess.run(
        [sys.executable, "-m", "sglang_moe_routing", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert [r["policy"] for r in found["runs"]] == ["vanilla", "topk-k3"]
    vanilla, pruned = found["policies"]["vanilla"], found["policies"]["topk-k3"]
    assert vanilla["active_experts"] == vanilla["active_experts_base"]
    assert pruned["active_experts"] <= 3 * 4  # k0 experts of each row
    assert pruned["active_experts"] < pruned["active_experts_base"]
    for figures in (vanilla, pruned):
        assert 1 < figures["rows_per_step"] <= 4
        assert figures["tpot_ms"] > 0
        assert figures["output_tokens_per_s"] > 0
