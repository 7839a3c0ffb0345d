"""The table of hook targets: it fits the SGLang that is installed, and what does not fit is named."""

import pytest

from server_patches import supported, v0_5_17, v0_5_20, v0_5_21, v0_5_22, v0_5_23
from server_patches.targets import IncompatibleSGLang, Members, Target, verify


def test_every_target_is_as_expected():
    supported.check()


@pytest.mark.parametrize(
    ("version", "support"),
    [
        ("0.5.14", v0_5_17),
        ("0.5.19", v0_5_17),
        ("0.5.20", v0_5_20),
        ("0.5.21", v0_5_21),
        ("0.5.22.post1", v0_5_22),
        ("0.5.23", v0_5_23),
        ("0.6.0rc1", v0_5_23),
    ],
)
def test_a_version_gets_the_newest_support_that_is_not_newer(version, support):
    assert supported.support_of(version) is support


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target("sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2.gone", ("self",), ""), "EAGLEWorkerV2.gone"),
        (
            Target("sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2.verify", ("self", "batches"), ""),
            r"expected .*verify\(self, batches\), but found \(self, batch",
        ),
        (Target("sglang.srt.nowhere.f", (), ""), r"sglang\.srt\.nowhere"),
        (Members("sglang.srt.managers.utils.GenerationBatchResult", ("accept_lenz",), ""), "without accept_lenz"),
    ],
)
def test_a_difference_is_named_with_what_was_expected_and_what_is_supported(target, message):
    with pytest.raises(IncompatibleSGLang, match=message) as error:
        verify((target,), "sglang==0.5.23", "0.9.9")
    assert "found sglang 0.9.9, supported: sglang==0.5.23" in str(error.value)
