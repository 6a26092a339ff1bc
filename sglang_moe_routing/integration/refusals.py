"""Refuse at start-up, with the remedy, what this package cannot serve with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from sglang.srt.arg_groups.model_override_base import resolved_view
from sglang.srt.environ import envs
from sglang.srt.lora.trtllm_lora_temp.environ import lora_envs

from .. import environment
from ..errors import EngineError
from . import settings


def refuse_unsupported(server_args: Any) -> None:
    """Raise `EngineError` that lists every server flag and variable that we cannot serve with."""
    problems = [*_refused_flags(server_args), *_unknown_flags(server_args), *_refused_variables()]
    if problems:
        listed = "\n  ".join(problems)
        raise EngineError(
            f"not supported together with MoE routing policies:\n  {listed}\n"
            f"Drop these settings, or unset {environment.CONFIG} to serve without policies"
        )


def _refused_flags(server_args: Any) -> Iterator[str]:
    resolved = resolved_view(server_args)
    for name, refusal in settings.REFUSED_FLAGS.items():
        value = getattr(resolved, name, None)  # not every release has each
        if value is not None and refusal.when.holds(value):
            yield f"{_flag(name)} {value}: {refusal.reason}"


def _unknown_flags(server_args: Any) -> Iterator[str]:
    """Flags of a changed SGLang: nobody has read what they do, so only their defaults pass."""
    kind = type(server_args)
    resolved, defaults = resolved_view(server_args), kind(model_path=server_args.model_path)
    for name in sorted(set(kind.__struct_fields__) - settings.FLAGS):
        value = getattr(resolved, name)
        if value != getattr(defaults, name):
            yield f"{_flag(name)} {value}: this package does not know what it does to the routing"


def _refused_variables() -> Iterator[str]:
    for name, refusal in settings.REFUSED_VARIABLES.items():
        value = _variable(name)
        if refusal.when.holds(value):
            yield f"{name}={os.environ.get(name, value)}: {refusal.reason}"


def _variable(name: str) -> Any:
    """What SGLang takes a variable for: its default may depend on others."""
    return getattr(lora_envs if hasattr(lora_envs, name) else envs, name).get()


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def refuse_recording_under_graphs(server_args: Any) -> None:
    """Raise `EngineError` if the recorder is on where replayed graphs would run no Python."""
    if os.environ.get(environment.RECORD) and uses_decode_graphs(server_args):
        raise EngineError(
            f"{environment.RECORD} needs eager decoding; "
            "add --cuda-graph-backend-decode disabled, or unset it"
        )


def replays_decode_steps(server_args: Any) -> bool:
    """Whether decode steps replay captured graphs, emulated ones included."""
    return os.environ.get(environment.EMULATE_GRAPHS) == "1" or uses_decode_graphs(server_args)


def uses_decode_graphs(server_args: Any) -> bool:
    """Whether decode steps replay captured device graphs."""
    if os.environ.get(environment.EMULATE_GRAPHS) == "1":
        return False  # the emulation re-executes
    return bool(resolved_view(server_args).cuda_graph_config.decode.backend != "disabled")
