"""The offline `sglang.Engine`, in a program of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from sglang_moe_routing import demo
from sglang_moe_routing.serving.server import server_environment

PROGRAM = """
import json, sys
import sglang

if __name__ == "__main__":
    engine = sglang.Engine(model_path=sys.argv[1], random_seed=0)
    params = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    oea = {**params, "custom_params": {"moe_routing_policy": "oea-k3"}}
    answers = engine.generate(["The first", "The second"], [oea, params])
    found = {"policies": [a["meta_info"]["moe_routing_policy"] for a in answers]}
    try:
        engine.generate("The", {"custom_params": {"moe_routing_policy": "no-such"}})
    except ValueError as error:
        found["error"] = str(error)
    state = engine.get_server_info()["internal_states"][0]["moe_routing"]
    found["layers"] = state["layers"]
    print("FOUND " + json.dumps(found))
    engine.shutdown()
"""


def test_engine_serves_policies_per_item(tmp_path: Path, config: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    run = subprocess.run(
        [sys.executable, str(program), str(demo.MODEL)],
        env=server_environment(config, cpu=True, base={**os.environ, "OMP_NUM_THREADS": "1"}),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, run.stdout[-2000:] + run.stderr[-4000:]
    found = json.loads(lines[0].removeprefix("FOUND "))
    assert found["policies"] == ["oea-k3", "vanilla"]
    assert "unknown MoE routing policy 'no-such'" in found["error"]
    for layer in found["layers"]:
        assert layer["calls"] == 5
        assert layer["active_experts"] < layer["active_experts_base"]
