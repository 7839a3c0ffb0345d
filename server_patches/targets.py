"""The seams: what the hooks rely on in SGLang, and checking it before anything is hooked.

A seam is looked up in a view: the SGLang that is imported (``Imported``), or the sources of one that is not
(``sources.Sources``).
"""

import ast
import inspect
import pkgutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


class IncompatibleSGLang(RuntimeError):
    """A symbol that draft training hooks is missing or has another shape."""


class NotThere(LookupError):
    """A view has no such symbol; the message says why."""


class View(Protocol):
    """Some SGLang, by dotted paths. Each raises NotThere."""

    def find(self, path: str) -> None: ...
    def parameters(self, path: str) -> list[str]:
        """Of a function, or of making an instance of a class."""

    def members(self, path: str) -> Iterator[set[str]]:
        """Of a class and those that it inherits from: fields, methods, and attributes that methods set, in parts."""


@dataclass(frozen=True)
class Target:
    """A function, and the parameters that are read (in this order, others may be between)."""

    path: str
    parameters: tuple[str, ...]
    use: str  # what ours does there

    def differs(self, view: View) -> str | None:
        found = view.parameters(self.path)
        names = iter(found)
        return None if all(name in names for name in self.parameters) else f"found ({', '.join(found)})"

    def __str__(self) -> str:
        return f"{self.path}({', '.join(self.parameters)})"


@dataclass(frozen=True)
class Members:
    """A class, and what is read of its instances."""

    path: str
    names: tuple[str, ...]
    use: str

    def differs(self, view: View) -> str | None:
        missing = set(self.names)
        for found in view.members(self.path):
            missing -= found
            if not missing:  # what is left of a class takes long to read
                return None
        return f"found it without {', '.join(sorted(missing))}"

    def __str__(self) -> str:
        return f"{self.path} with {', '.join(self.names)}"


@dataclass(frozen=True)
class Symbol:
    """Anything that is imported by name."""

    path: str
    use: str

    def differs(self, view: View) -> str | None:
        view.find(self.path)
        return None

    def __str__(self) -> str:
        return self.path


Seam = Target | Members | Symbol


def difference(seam: Seam, view: View) -> str | None:
    """What is otherwise than expected; None where the seam holds."""
    try:
        found = seam.differs(view)
    except NotThere as error:
        found = f"it is not there ({error})"
    return f"expected {seam}, but {found}" if found else None


def differences(seams: tuple[Seam, ...], view: View) -> list[str]:
    """Of every seam that does not hold."""
    return [problem for seam in seams if (problem := difference(seam, view))]


def verify(seams: tuple[Seam, ...], supported: str, found: str) -> None:
    """Raises IncompatibleSGLang naming every seam that differs, what was expected, and the supported versions."""
    if problems := differences(seams, Imported()):
        raise IncompatibleSGLang(
            "draft training does not fit this SGLang:\n  " + "\n  ".join(problems) + f"\nfound sglang {found}, "
            f"supported: {supported}. Install a supported version, or start without --enable-draft-training."
        )


class Imported:
    """The SGLang of this process."""

    def find(self, path: str) -> object:
        try:
            return pkgutil.resolve_name(path)
        except (ImportError, AttributeError) as error:
            raise NotThere(str(error)) from error

    def parameters(self, path: str) -> list[str]:
        return list(inspect.signature(inspect.unwrap(self.find(path))).parameters)

    def members(self, path: str) -> Iterator[set[str]]:
        lineage = self.find(path).__mro__[:-1]
        for one in lineage:
            yield {*vars(one), *vars(one).get("__annotations__", ())}
        yield from map(_set_by_methods, lineage)


def set_on_self(node: ast.AST) -> set[str]:
    """Attributes that code assigns to ``self``."""
    return {
        inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute)
        and isinstance(inner.ctx, ast.Store)
        and isinstance(inner.value, ast.Name)
        and inner.value.id == "self"
    }


def _set_by_methods(one: type) -> set[str]:
    try:
        source = inspect.getsource(one)
    except (OSError, TypeError):  # written in C
        return set()
    return set_on_self(ast.parse(textwrap.dedent(source)))
