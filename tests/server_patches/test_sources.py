"""Seams by sources alone: of a version that is not installed, and of the installed one, where both views agree."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server_patches.__main__ import app
from server_patches.sources import Sources
from server_patches.supported import SUPPORTS
from server_patches.targets import Imported, Members, NotThere, Symbol, Target, difference
from server_patches.v0_5_23 import TARGETS

FILES = {
    "pkg/__init__.py": "from pkg.deep.one import Made as Renamed\nfrom .deep import two\n",
    "pkg/deep/__init__.py": "",
    "pkg/deep/one.py": """
from typing import TYPE_CHECKING
from pkg.deep.two import Base
if TYPE_CHECKING:
    from pkg.deep.two import Circle
class Made(Base):
    field: int
    def __init__(self, a, /, b, *rest, c=1, **more):
        self.kept, here = a, b
        print(self.read)
    @decorated
    async def run(self, batch): ...
try:
    import fast
except ImportError:
    def slow(x): ...
""",
    "pkg/deep/two.py": """
from pkg.deep.one import Circle
class Base:
    def inherited(self, x): self.counted += x
class Data:
    first: int
    second: int = 0
CONSTANT = 1
""",
    "pkg/all.py": "from pkg.deep.one import *\nfrom pkg.deep.two import *\n",
}
VIEW = Sources(FILES.get)


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("pkg.Renamed", ["self", "a", "b", "c", "rest", "more"]),
        ("pkg.deep.one.Made.run", ["self", "batch"]),
        ("pkg.deep.one.Made.inherited", ["self", "x"]),
        ("pkg.deep.two.Data", ["first", "second"]),
        ("pkg.deep.one.slow", ["x"]),
        ("pkg.all.slow", ["x"]),
        ("pkg.all.Data", ["first", "second"]),
    ],
)
def test_parameters_are_found_through_imports_bases_and_attempts(path, parameters):
    assert VIEW.parameters(path) == parameters


def test_members_are_fields_methods_and_what_methods_set_also_of_bases():
    expected = {"field", "__init__", "run", "kept", "inherited", "counted"}
    assert set().union(*VIEW.members("pkg.deep.one.Made")) == expected


@pytest.mark.parametrize(
    ("seam", "found"),
    [
        (Symbol("pkg.deep.two.CONSTANT", ""), None),
        (Symbol("pkg.deep.two.GONE", ""), "expected pkg.deep.two.GONE, but it is not there (no GONE in pkg.deep.two)"),
        (Symbol("pkg.gone.deep.f", ""), "it is not there (no module pkg.gone.deep)"),
        (Symbol("other.f", ""), "expected other.f, but it is not there (no module other)"),
        (Symbol("pkg.deep.one.Circle", ""), "imported in a circle"),
        (Target("pkg.deep.one.Made.run", ("self", "batches"), ""), "found (self, batch)"),
        (Target("pkg.deep.two.CONSTANT", ("x",), ""), "pkg.deep.two.CONSTANT is no function"),
        (Members("pkg.deep.one.Made", ("kept", "read"), ""), "found it without read"),
    ],
)
def test_what_differs_is_named(seam, found):
    assert (difference(seam, VIEW) is None) if found is None else found in difference(seam, VIEW)


def installed(changed=lambda path, text: text):
    root = Path(find_spec("sglang").submodule_search_locations[0]).parent

    def read(path):
        file = root / path
        return changed(path, file.read_text()) if file.is_file() else None

    return Sources(read)


def test_sources_and_the_imported_module_agree_on_every_seam():
    sources, imported = installed(), Imported()
    for seam in TARGETS:
        assert difference(seam, sources) is None
        assert difference(seam, imported) is None
        if isinstance(seam, Target) and not seam.path.endswith("SamplingParams"):
            assert set(sources.parameters(seam.path)) - {"cls"} == set(imported.parameters(seam.path))


def test_a_removed_method_is_named():
    gone = installed(lambda path, text: text.replace("def verify(", "def check("))
    assert [seam.path for seam in TARGETS if difference(seam, gone)] == [
        "sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2.verify"
    ]
    with pytest.raises(NotThere, match="no verify in sglang"):
        gone.parameters("sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2.verify")


@pytest.mark.parametrize("version", [support.VERSION for support in SUPPORTS])
def test_the_seams_hold_in_the_wheel_of_every_supported_version(version):
    told = CliRunner().invoke(app, ["check", "--sglang", version])
    if told.exit_code == 2:
        pytest.skip(told.output)  # no package index can be reached
    assert told.exit_code == 0, told.output


def test_a_file_that_is_not_named_as_a_wheel_is_refused(tmp_path):
    (tmp_path / "sglang.zip").touch()
    told = CliRunner().invoke(app, ["check", "--wheel", str(tmp_path / "sglang.zip")])
    assert told.exit_code == 2
    assert "sglang.zip is no wheel" in told.output


def test_the_command_says_which_seams_hold_and_exits_with_1_where_one_does_not(tmp_path):
    empty = tmp_path / "sglang-0.5.23-py3-none-any.whl"
    empty.write_bytes(b"PK\x05\x06" + bytes(18))  # an archive of no files
    told = CliRunner().invoke(app, ["check", "--wheel", str(empty)])
    assert told.exit_code == 1
    assert f"0 of {len(TARGETS)} seams hold" in told.output
    told = CliRunner().invoke(app, ["check"])
    assert told.exit_code == 0
    assert f"{len(TARGETS)} of {len(TARGETS)} seams hold" in told.output
