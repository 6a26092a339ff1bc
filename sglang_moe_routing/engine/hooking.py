"""The SGLang symbols that we hook or rely on, their verification, and the hooks' registration.

A hook takes what it reads of its target's parameters under their own names and in their own places,
and the rest as ``*args`` and ``**kwargs``. So Python hands it what it reads, at no cost, and a
renamed or moved parameter is found at start-up, not at run time.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import Any, Literal

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from .. import environment
from ..errors import EngineError
from . import signatures
from .report import Finding

MODIFIED = "SGLang is not what this package hooks into, so it must be modified"

Kind = Literal["before", "after", "around"]


@dataclass(frozen=True)
class Hook:
    """One hooked SGLang symbol.

    Attributes:
        target: dotted path of a function or method.
        kind: when `function` runs; see SGLang's `HookType` for what it gets and returns.
        function: its parameters are those of the target that it reads; after the result or the
            original, which all kinds but "before" get first.
    """

    target: str
    kind: Kind
    function: Callable[..., Any]


@dataclass(frozen=True)
class Symbol:
    """An SGLang symbol that is called or read but not hooked.

    Attributes:
        reads: attributes of the instances of a class, separated by spaces.
    """

    target: str
    reads: str = ""


def verify(entries: Sequence[Hook | Symbol], release: signatures.Release) -> list[Finding]:
    """Compare every symbol with what we read of it, and with what it is in `release`."""
    findings = signatures.compare(release, [entry.target for entry in entries])
    return [_verify(entry, found) for entry, found in zip(entries, findings, strict=True)]


def _verify(entry: Hook | Symbol, compared: Finding) -> Finding:
    """What is read decides; `compared` tells of all other differences."""
    try:
        found = signatures.find(entry.target)
    except (ImportError, AttributeError):
        return compared
    problem = (
        _misread_parameters(entry, found)
        if isinstance(entry, Hook)
        else _missing_attributes(entry.reads.split(), found)
    )
    return Finding(entry.target, problem, compared.diff) if problem else compared


def _misread_parameters(hook: Hook, target: Callable[..., Any]) -> str:
    """Why `hook` cannot take every call of its target, under the names that it reads."""
    ours = list(inspect.signature(hook.function).parameters.values())
    ours = ours if hook.kind == "before" else ours[1:]
    theirs = list(inspect.signature(target).parameters.values())
    named = [p for p in ours if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    for place, parameter in enumerate(named):
        other = theirs[place] if place < len(theirs) else None
        if other is None or parameter.name != other.name:
            return f"has no parameter {parameter.name!r} at place {place}, which the hook reads"
        if parameter.default is Parameter.empty and other.default is not Parameter.empty:
            return f"may be called without {parameter.name!r}, which the hook reads"
    others = [p.name for p in theirs[len(named) :]]
    for name in (p.name for p in ours if p.kind is Parameter.KEYWORD_ONLY):
        if name not in others:
            return f"has no parameter {name!r}, which the hook reads"
        others.remove(name)
    takes_others = any(p.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD) for p in ours)
    if others and not takes_others:
        return f"has the parameters {', '.join(others)} as well, which the hook does not take"
    return ""


def _missing_attributes(names: Sequence[str], kind: type) -> str:
    if not names:
        return ""
    missing = sorted(set(names) - set(signatures.attributes(kind)))
    return f"has no attribute {', '.join(missing)}, which we read" if missing else ""


def refuse_problems(findings: Iterable[Finding]) -> None:
    """Raise `EngineError` that lists every problem, if there is one."""
    problems = [line for finding in findings for line in finding.lines()]
    if problems:
        listed = "\n  ".join(problems)
        raise EngineError(f"{MODIFIED}:\n  {listed}\n{remedy()}")


def remedy() -> str:
    """What to do about a modified SGLang."""
    return (
        "Reinstall it and retry: pip install --force-reinstall --no-deps "
        f"sglang=={signatures.installed()}"
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
