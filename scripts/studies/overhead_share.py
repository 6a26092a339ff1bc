"""What share of a scheduler's time this package takes, on the bundled demo model or another.

Samples the scheduler with py-spy (`pip install py-spy`; it may need root), and counts the samples
whose innermost Python frame is this package's, or SGLang's hook machinery. The experts and products
of the portable CPU platform, which run without policies too, do not count. `wrappers` is the part
of the hook machinery, `counting` that of statistics and metrics, but for what kernels count. What
two servers differ by from start to start does not blur this, as it does a comparison of their times
(scripts/studies/overhead.py).
"""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from sglang_moe_routing import demo
from sglang_moe_routing.serving.load import Job, LoadClient
from sglang_moe_routing.serving.machine import describe_machine
from sglang_moe_routing.serving.server import running_server

RATE = 400
PLATFORM = ("cpu/", "kernels/native.py")
"""Files that run without policies too."""
COUNTING = ("runtime/statistics.py", "runtime/metrics.py", "RowCounts.")


def is_ours(stack: str) -> bool:
    """Whether the innermost frame is this package's, or of SGLang's hooks."""
    frame = stack.rpartition(";")[-1]
    if is_wrapper(stack):
        return True
    return "sglang_moe_routing/" in frame and not any(part in frame for part in PLATFORM)


def is_wrapper(stack: str) -> bool:
    """Whether the innermost frame is SGLang's, around a function that is hooked."""
    return "plugins/hook_registry.py" in stack.rpartition(";")[-1]


def is_counting(stack: str) -> bool:
    """Whether statistics or metrics run, also in a thread of their own, which mostly sleeps."""
    is_asleep = "Exporter._run" in stack.rpartition(";")[-1]
    return not is_asleep and any(part in stack for part in COUNTING)


def summarize(samples: Path) -> dict[str, Any]:
    """Shares of the samples of the event loop, with their standard errors."""
    total = 0
    found = dict.fromkeys(("all", "wrappers", "counting"), 0)
    for line in samples.read_text().splitlines():
        stack, _, number = line.rpartition(" ")
        is_step = "event_loop" in stack
        total += int(number) * is_step
        found["all"] += int(number) * ((is_step and is_ours(stack)) or is_counting(stack))
        found["wrappers"] += int(number) * (is_step and is_wrapper(stack))
        found["counting"] += int(number) * is_counting(stack)
    shares = {name: number / total for name, number in found.items()}
    return {"samples": total} | {
        name: {
            "share": round(share, 5),
            "standard_error": round(math.sqrt(share * (1 - share) / total), 5),
        }
        for name, share in shares.items()
    }


def main(
    policies: Annotated[
        list[str] | None, typer.Argument(help="Policies of the load; vanilla by default.")
    ] = None,
    model: Path = demo.MODEL,
    routing_config: Path = demo.CONFIG,
    concurrency: int = 8,
    num_tokens: int = 256,
    seconds: int = 60,
    output: Path = Path("build/overhead-share.json"),
) -> None:
    """Serve, load, sample, write JSON."""
    output.parent.mkdir(parents=True, exist_ok=True)
    found = {}
    prompts = demo.read_prompts()
    with tempfile.TemporaryDirectory() as scratch:
        samples = Path(scratch) / "samples"
        with running_server(
            model,
            config=routing_config,
            flags=["--random-seed", "0", "--max-total-tokens", "16384", "--enable-metrics"],
            environment={"OMP_NUM_THREADS": "1"},
            log=Path(scratch) / "log",
            cpu=True,
        ) as server:
            program = str(Path(sysconfig.get_path("scripts")) / "py-spy")
            client = LoadClient(server.url)
            family = psutil.Process(server.process.pid).children(recursive=True)
            (scheduler,) = [p for p in family if "scheduler" in " ".join(p.cmdline())]
            command = [program, "record", "--pid", str(scheduler.pid), "--rate", str(RATE)]
            command += ["--format", "raw", "--output", str(samples), "--duration", str(seconds)]
            for policy in policies or ["vanilla"]:
                jobs = [Job(prompts[i % len(prompts)], policy) for i in range(concurrency)]
                asyncio.run(client.run(jobs, max_tokens=num_tokens))
                with subprocess.Popen(command, stdout=subprocess.DEVNULL):
                    end = time.monotonic() + seconds
                    while time.monotonic() < end:
                        asyncio.run(client.run(jobs, max_tokens=num_tokens))
                found[policy] = summarize(samples)
                print(policy, json.dumps(found[policy]), flush=True)
    result = json.loads(output.read_text()) if output.exists() else {"models": {}}
    result["machine"] = describe_machine()
    result["models"][model.name] = {"concurrency": concurrency, "policies": found}
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
