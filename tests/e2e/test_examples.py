"""The examples that need a server, against the one that most tests share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .conftest import Running

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_curl(served: Running) -> None:
    said = run(str(EXAMPLES / "curl.sh"), served.url, "sere-s2")
    assert "x-moe-routing-policy: sere-s2" in said.lower()
    assert said.count('"moe_routing_policy":"sere-s2"') >= 3  # header, body field, alias
    assert "unknown MoE routing policy 'nonesuch'" in said
    assert "\n400\n" in said
    assert '"id":"sere-s2"' in said
    assert '"active_experts_base"' in said


def test_openai_client(served: Running) -> None:
    first, streamed, refused = run(
        sys.executable, str(EXAMPLES / "openai_client.py"), served.url, "oea-k3"
    ).splitlines()
    assert first.startswith("oea-k3: '")
    assert len(streamed) > len("streamed: ''")
    assert "unknown MoE routing policy 'nonesuch'" in refused
