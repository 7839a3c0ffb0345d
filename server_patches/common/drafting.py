"""Drafting switched on and off between two steps: SGLang's adaptive controller, with two depths and a policy of ours.

With no draft steps SGLang verifies the last token alone (a plain decode), and still runs the draft over what was
committed unless it is told not to: its KV cache then is whole whenever drafting is switched on again.
"""

from sglang.srt.environ import envs

from sglang_specforge.drafting import Depth


class Switch:
    """``AdaptiveSpecPolicy`` of SGLang: the depth that the server was started with, or none."""

    def __init__(self, steps: int) -> None:
        self.candidate_steps = [0, steps]
        self.set(Depth.WARM)
        self._batch_sizes: list[int] | None = None

    def set(self, depth: Depth) -> None:
        """From the next step on."""
        self._depth = depth
        envs.SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND.set(depth is Depth.ASLEEP)

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        self._batch_sizes = cuda_graph_bs

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        return self._batch_sizes

    def get_steps_for_batch(self, batch_size: int) -> int:
        return self.candidate_steps[self._depth is Depth.ON]

    def on_verify_complete(self, num_correct_drafts_per_req: list[int], batch_size: int) -> None:
        return None
