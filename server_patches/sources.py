"""Any version's SGLang by its sources alone, so that its seams can be checked where it cannot be installed."""

import ast
import contextlib
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from server_patches.targets import NotThere, set_on_self


class Sources:
    """A ``targets.View`` of Python files. ``read`` gives a file's text by its path; None where there is none."""

    def __init__(self, read: Callable[[str], str | None]) -> None:
        self._read = read
        self._module = cache(self._parse)
        self._following: list[str] = []

    @classmethod
    def of_wheel(cls, wheel: Path) -> "Sources":
        archive = zipfile.ZipFile(wheel)
        names = set(archive.namelist())
        return cls(lambda path: archive.read(path).decode() if path in names else None)

    def find(self, path: str) -> tuple[str, ast.AST]:
        """The symbol's module and node."""
        parts = path.split(".")
        for cut in range(len(parts), 0, -1):
            module = ".".join(parts[:cut])
            if self._module(module) is None:
                continue
            try:
                return self._descend(module, parts[cut:])
            except NotThere as error:
                if cut > 1 or len(parts) < 3:
                    raise
                raise NotThere(f"no module {'.'.join(parts[:-1])}") from error
        raise NotThere(f"no module {parts[0]}")

    def parameters(self, path: str) -> list[str]:
        module, node = self.find(path)
        if isinstance(node, ast.ClassDef):
            made_by = self._of_class(module, node, "__init__")
            if made_by is None:  # a dataclass
                return [statement.target.id for statement in node.body if isinstance(statement, ast.AnnAssign)]
            node = made_by[1]
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            raise NotThere(f"{path} is no function")
        given = node.args
        variable = [one for one in (given.vararg, given.kwarg) if one]
        return [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs, *variable)]

    def members(self, path: str) -> Iterator[set[str]]:
        module, node = self.find(path)
        if not isinstance(node, ast.ClassDef):
            raise NotThere(f"{path} is no class")
        for _, one in self._lineage(module, node):
            yield set_on_self(one) | {name for statement in one.body for name in _named(statement)}

    def _parse(self, module: str) -> ast.Module | None:
        base = module.replace(".", "/")
        text = self._read(f"{base}.py") or self._read(f"{base}/__init__.py")
        return None if text is None else ast.parse(text)

    def _descend(self, module: str, names: list[str]) -> tuple[str, ast.AST]:
        node: ast.AST = self._module(module)
        place = module
        for name in names:
            found = (
                self._of_class(module, node, name)
                if isinstance(node, ast.ClassDef)
                else self._of_module(module, node, name)
            )
            if found is None:
                raise NotThere(f"no {name} in {place}")
            (module, node), place = found, f"{place}.{name}"
        return module, node

    def _of_class(self, module: str, node: ast.ClassDef, name: str) -> tuple[str, ast.AST] | None:
        for where, one in self._lineage(module, node):
            if found := next((s for s in one.body if name in _named(s)), None):
                return where, found
        return None

    def _of_module(self, module: str, node: ast.AST, name: str) -> tuple[str, ast.AST] | None:
        statements = list(_statements(node))
        if found := next((s for s in statements if name in _named(s)), None):
            return module, found
        imports = [
            (alias, _absolute(statement, module))
            for statement in statements  # some only where types are checked, and then in circles
            if isinstance(statement, ast.ImportFrom)
            for alias in statement.names
        ]
        for alias, origin in imports:
            if name == (alias.asname or alias.name):
                return self._imported(f"{origin}.{alias.name}")
        for alias, origin in imports:
            if alias.name == "*" and not name.startswith("_"):
                with contextlib.suppress(NotThere):
                    return self._imported(f"{origin}.{name}")
        return None

    def _imported(self, path: str) -> tuple[str, ast.AST]:
        if path in self._following:  # modules that import a name from each other
            raise NotThere(f"{path} is imported in a circle")
        self._following.append(path)
        try:
            return self.find(path)
        finally:
            self._following.pop()

    def _lineage(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """The class and, depth first, those of its bases that are SGLang's own."""
        yield module, node
        for base in node.bases:
            try:
                where, found = self._descend(module, ast.unparse(base).split("."))
            except NotThere:
                continue
            if isinstance(found, ast.ClassDef):
                yield from self._lineage(where, found)


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Of a module, those under conditions and in attempts included."""
    for part in ("body", "orelse", "handlers"):
        for statement in getattr(node, part, ()):
            yield statement
            if isinstance(statement, ast.If | ast.Try | ast.ExceptHandler):
                yield from _statements(statement)


def _named(statement: ast.stmt) -> list[str]:
    """What a statement defines."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _absolute(statement: ast.ImportFrom, module: str) -> str:
    if not statement.level:
        return statement.module or ""
    parent = module.split(".")[: -statement.level]
    return ".".join([*parent, *([statement.module] if statement.module else [])])
