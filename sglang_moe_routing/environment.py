"""Environment variables that this package reads. Children inherit them; flags would not reach."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping

from .errors import EngineError

CONFIG = "SGLANG_MOE_ROUTING_CONFIG"
"""Path of the routing config. Unset: the plugin leaves SGLang alone."""

CONFIG_SHA256 = "SGLANG_MOE_ROUTING_CONFIG_SHA256"
"""Set in the processes of an engine but the main one: digest of the config, which they must find
again."""

RELOAD_TOKEN = "_MOE_ROUTING_RELOAD_TOKEN"  # noqa: S105  # a name, not a secret
"""Set by the main process: secret that marks its reload requests to the schedulers."""

RECORD = "SGLANG_MOE_ROUTING_RECORD"
"""Folder for the debug recorder of MoE calls. Unset: off."""

FORCE = "SGLANG_MOE_ROUTING_FORCE"
"""Set to 1 by ``evaluate``: requests may dictate their own output, to be scored. Never in
production."""

FORCED_TOKENS = "moe_routing_forced_tokens"
"""Under `FORCE`: key of ``custom_params`` with the output tokens of a request, and of ``meta_info``
with the log-probability of each and the token that the model liked best."""

EMULATE_GRAPHS = "SGLANG_MOE_ROUTING_EMULATE_GRAPHS"
"""Set to 1 on the portable CPU platform: run SGLang's decode graph runner with a backend that
re-executes instead of replaying. For tests."""

CPU_EXPERTS = "SGLANG_MOE_ROUTING_CPU_EXPERTS"
"""What runs the experts on the portable CPU platform: ``native``, the compiled runner; ``torch``, a
loop of library products; ``auto`` (default), the compiled runner where it can be had."""

PLATFORM = "moe_routing_cpu"
"""Name of the portable CPU platform in SGLANG_PLATFORM."""

PLUGIN = "moe_routing"
"""Name of the routing plugin in SGLANG_PLUGINS."""

SGLANG = "sglang>=0.5.22,<0.5.24"
"""The releases that this package is written for, as its dependency. Each has a file in
`engine/releases`."""

INSTALL_SGLANG = f"pip install '{SGLANG}'"
"""What to run where it is missing or another one."""

EXIT_CODE = 78
"""Exit status of a server that must not start (EX_CONFIG)."""


def require_home(variables: Mapping[str, str]) -> None:
    """Raise `EngineError` if a process with these variables would have no home folder.

    Libraries of SGLang ask for it as they are imported, FlashInfer also where
    ``FLASHINFER_WORKSPACE_BASE`` is set.
    """
    if "HOME" in variables:
        return
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        raise EngineError(
            f"no home folder: HOME is not set, and user id {os.getuid()} has no entry in "
            "/etc/passwd; set HOME to a folder that this user may write to, where libraries can "
            "keep what they compile"
        ) from None
