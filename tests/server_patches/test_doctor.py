"""``sglang-specforge doctor``: what keeps a server with draft training from starting is named, with what to do."""

import json
import os
import subprocess
import sys

import pytest

from server_patches.v0_5_23 import TARGETS


def examined(**variables):
    """Exit code, and the findings by what they are of."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG")}
    done = subprocess.run(
        [sys.executable, "-m", "sglang_specforge", "doctor", "--json"],
        env=environment | variables, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, {one["what"]: one for one in json.loads(done.stdout)}


def test_a_machine_on_which_a_server_starts_passes():
    code, findings = examined(SGLANG_USE_CPU_ENGINE="1")
    assert code == 0
    assert all(one["problem"] is None for one in findings.values())
    assert findings["kernels"]["found"].startswith("portable")
    assert findings["SGLang"]["found"] == f"0.5.23; {len(TARGETS)} of {len(TARGETS)} seams of 0.5.23 hold"


def test_what_is_missing_is_said_with_what_to_do():
    code, findings = examined(SGLANG_PLUGINS="others")
    assert code == 1
    assert findings["plugin of SGLang"]["problem"] == "SGLANG_PLUGINS=others leaves it out; add specforge"
    assert "SGLANG_USE_CPU_ENGINE=1" in findings["kernels"]["problem"]
    assert findings["SGLang"]["problem"] is None


@pytest.fixture(autouse=True)
def _no_gpu():
    import torch

    if torch.cuda.is_available():
        pytest.skip("is about machines without a GPU")
