"""Which processes belong to an engine that starts, and which start engines of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from sglang_moe_routing import demo
from sglang_moe_routing.serving.server import free_port, server_environment

PROGRAM = """
import json, multiprocessing, os, sys
from sglang_moe_routing import environment


def tell(queue, *ignored):
    queue.put(environment.CONFIG_SHA256 in os.environ)  # what `install` goes by; cheap to ask


def controller(queue, *ignored):
    tell(queue)
    spawn(tell, queue)


def spawn(target, queue):
    process = multiprocessing.get_context("spawn").Process(target=target, args=(queue,))
    process.start()
    process.join()


if __name__ == "__main__":
    from functools import partial
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs

    queue = multiprocessing.get_context("spawn").SimpleQueue()
    try:
        Engine._launch_subprocesses(
            ServerArgs(**json.loads(sys.argv[1])),
            init_tokenizer_manager_func=lambda *_: (None, None),
            run_scheduler_process_func=partial(controller, queue),
            run_detokenizer_process_func=partial(tell, queue),
        )
    except RuntimeError as error:
        assert "died during initialization" in str(error), error
    found = {"own": [queue.get() for _ in range(3)]}
    spawn(tell, queue)
    found["later"] = queue.get()
    print("FOUND", json.dumps(found), flush=True)
"""


def test_only_the_processes_of_an_engine_belong_to_it_also_after_it_failed(tmp_path: Path) -> None:
    """Plugins are loaded late, as in `launch_server`; the scheduler starts one more and ends."""
    (tmp_path / "program.py").write_text(PROGRAM)
    config = tmp_path / "routing.yaml"
    config.write_text("version: 1\n")
    flags = {"model_path": str(demo.MODEL), "port": free_port(), "max_total_tokens": 4096}
    ended = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), json.dumps(flags)],
        env=server_environment(config, cpu=True, base={**os.environ, "OMP_NUM_THREADS": "1"}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line[6:] for line in ended.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, (ended.stdout + ended.stderr)[-4000:]
    assert json.loads(lines[0]) == {"own": [True, True, True], "later": False}
