"""The table of SGLang symbols that we hook or rely on, and its verification.

Every hook states the parameters that its target had when it was written. A renamed symbol, a
changed signature or a hook that SGLang did not apply is found at start-up, not at run time.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from .. import environment
from ..errors import EngineError
from .report import Finding

Kind = Literal["before", "after", "around"]


@dataclass(frozen=True)
class Hook:
    """One hooked SGLang symbol.

    Attributes:
        target: dotted path of a function or method.
        parameters: its parameter names, in order, as they were when the hook was written.
        kind: when `function` runs; see SGLang's `HookType` for what it gets and returns.
    """

    target: str
    parameters: tuple[str, ...]
    kind: Kind
    function: Callable[..., Any]


@dataclass(frozen=True)
class Symbol:
    """An SGLang symbol that is called or read but not hooked.

    Attributes:
        parameters: as for `Hook`; None where only existence matters.
    """

    target: str
    parameters: tuple[str, ...] | None = None


def check_version() -> str:
    """Version of the installed sglang.

    Raises:
        EngineError: it is missing or not the pinned release.
    """
    try:
        installed = version("sglang")
    except PackageNotFoundError:
        raise EngineError(
            f"sglang is not installed; run: pip install sglang=={environment.SGLANG_VERSION}"
        ) from None
    if installed != environment.SGLANG_VERSION:
        raise EngineError(
            f"sglang {installed} is installed, but this package is written for "
            f"{environment.SGLANG_VERSION}; run: pip install sglang=={environment.SGLANG_VERSION}"
        )
    return installed


def verify(entries: Iterable[Hook | Symbol]) -> list[Finding]:
    """Compare every symbol with what we expect of it."""
    return [Finding(entry.target, _problem(entry)) for entry in entries]


def _problem(entry: Hook | Symbol) -> str:
    try:
        found = pkgutil.resolve_name(entry.target)
    except (ImportError, AttributeError) as error:
        return f"not found in this sglang: {error}"
    if entry.parameters is None:
        return ""
    actual = tuple(inspect.signature(inspect.unwrap(found)).parameters)
    if isinstance(inspect.getattr_static(*_owner(entry.target)), classmethod):
        actual = ("cls", *(name for name in actual if name != "cls"))
    if actual == entry.parameters:
        return ""
    return f"has parameters {_list(actual)}, expected {_list(entry.parameters)}"


def _owner(target: str) -> tuple[Any, str]:
    path, _, name = target.rpartition(".")
    return pkgutil.resolve_name(path), name


def _list(names: Sequence[str]) -> str:
    return f"({', '.join(names)})"


def refuse_problems(findings: Iterable[Finding]) -> None:
    """Raise `EngineError` that lists every problem, if there is one."""
    problems = [f"{f.target} {f.problem}" for f in findings if not f.ok]
    if problems:
        listed = "\n  ".join(problems)
        raise EngineError(
            "SGLang is not what this package hooks into (modified or another version?):\n"
            f"  {listed}\nReinstall sglang=={environment.SGLANG_VERSION} and retry."
        )


def apply(hooks: Sequence[Hook], on_failure: Callable[[BaseException], Any]) -> None:
    """Register `hooks` and make SGLang's loader verify that each one really was applied.

    Args:
        on_failure: called with the error once SGLang has applied all hooks but not these.
    """
    for hook in hooks:
        HookRegistry.register(hook.target, hook.function, HookType(hook.kind))
    original = HookRegistry.apply_hooks.__func__

    def apply_and_verify(cls: type[HookRegistry]) -> None:
        original(cls)
        missing = [hook.target for hook in hooks if not _is_applied(cls, hook)]
        if missing:
            on_failure(
                EngineError(
                    f"routing hooks were not applied: {', '.join(missing)}. Another plugin may "
                    "have patched or removed them; restrict plugins with SGLANG_PLUGINS="
                    f"{environment.PLUGIN}"
                )
            )

    HookRegistry.apply_hooks = classmethod(apply_and_verify)


def _is_applied(registry: type[HookRegistry], hook: Hook) -> bool:
    registered = [function for _, function, _ in registry._hooks.get(hook.target, [])]
    if hook.function not in registered or hook.target not in registry._patched:
        return False
    return hasattr(pkgutil.resolve_name(hook.target), "__wrapped__")
