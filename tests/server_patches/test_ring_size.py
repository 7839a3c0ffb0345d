"""The ring has room for what a server's longest passes capture, unless its size was given."""

from types import SimpleNamespace

import pytest

from server_patches.common import process
from sglang_specforge.settings import Run
from sglang_specforge.training_settings import Speculation

MIB = 1 << 20


@pytest.mark.parametrize(
    ("hidden_size", "chunk", "served", "settings", "mib"),
    [
        (192, 8192, "float32", {}, 256),
        (4096, 8192, "bfloat16", {}, 4 * 256),
        (4096, 8192, "float32", {"capture_dtype": "bfloat16"}, 4 * 256),
        (4096, -1, "bfloat16", {}, 4 * 1024),
        (4096, None, "bfloat16", {}, 4 * 1024),
        (16384, 32768, "bfloat16", {}, 8192),
        (4096, 8192, "bfloat16", {"ring_mb": 2}, 2),
    ],
)
def test_four_of_the_longest_passes_fit(monkeypatch, tmp_path, hidden_size, chunk, served, settings, mib):
    monkeypatch.setattr(process, "get_schedule", lambda: SimpleNamespace(chunked_prefill_size=chunk))
    run = Run(
        settings={"run_dir": tmp_path, **settings}, target_path="", target_fingerprint="", draft_path="",
        served_dtype=served, speculation=Speculation(3, 1), spans_endpoint="", control_endpoint="",
    )  # fmt: skip
    target = SimpleNamespace(hidden_size=hidden_size, context_len=32768)
    assert process._ring_bytes(run, target) == mib * MIB
