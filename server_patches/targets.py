"""Checking, before anything is hooked, that SGLang still looks the way the hooks expect."""

import inspect
import pkgutil
from dataclasses import dataclass


class IncompatibleSGLang(RuntimeError):
    """A symbol that draft training hooks is missing or has another shape."""


@dataclass(frozen=True)
class Target:
    """A function by its dotted path and the parameters that a hook reads (in this order, others may be between)."""

    path: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Fields:
    """A dataclass by its dotted path and the fields that a hook reads."""

    path: str
    names: tuple[str, ...]


def verify(targets: tuple[Target | Fields, ...], supported: str, found: str) -> None:
    """Raises IncompatibleSGLang naming every target that differs, what was expected, and the supported versions."""
    problems = [problem for target in targets if (problem := _differs(target))]
    if problems:
        raise IncompatibleSGLang(
            "draft training does not fit this SGLang:\n  " + "\n  ".join(problems) + f"\nfound sglang {found}, "
            f"supported: {supported}. Install a supported version, or start without --enable-draft-training."
        )


def _differs(target: Target | Fields) -> str | None:
    wanted = target.parameters if isinstance(target, Target) else target.names
    expected = f"{target.path}({', '.join(wanted)})"
    try:
        symbol = pkgutil.resolve_name(target.path)
    except (ImportError, AttributeError) as error:
        return f"{target.path}: expected {expected}, but it is not there ({error})"
    if isinstance(target, Fields):
        missing = set(target.names) - set(getattr(symbol, "__dataclass_fields__", ()))
        return f"{target.path}: expected {expected}, without {', '.join(sorted(missing))}" if missing else None
    found = inspect.signature(inspect.unwrap(symbol))
    names = iter(found.parameters)
    if not all(name in names for name in target.parameters):
        return f"{target.path}: expected {expected}, found {found}"
    return None
