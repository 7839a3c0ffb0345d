"""The draft being trained: one step, evaluation, and its weights as they are published.

Parameters are float32 under FSDP2; compute runs in the run's training dtype.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from sglang_specforge.checkpoint import load_checked, load_config
from sglang_specforge.settings import Run
from sglang_specforge.target import load_embedding_and_head
from trainer.draft import Eagle3Draft
from trainer.loss import FrozenTarget, Unrolled, unroll
from trainer.sample import Sample, pack


class Learner:
    """Starts from the draft that the server started with."""

    def __init__(self, run: Run, device: torch.device) -> None:
        self.step, self._run, self._device = 0, run, device
        settings, dtype = run.settings, getattr(torch, run.training_dtype)
        self.config = load_config(run.version_path(0))
        self.draft = load_draft(run, run.version_path(0)).to(device)
        self.target = load_target(run, dtype, device)
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        fully_shard(
            self.draft, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        )
        self.optimizer = torch.optim.AdamW(
            self.draft.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
        )

    def train(self, samples: list[Sample]) -> float:
        """One optimizer step; returns the loss. A step whose gradient is not finite changes nothing."""
        settings = self._run.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (self.step + 1) / max(1, settings.warmup_steps))
        loss = self._unroll(samples, settings.ttt_steps).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.draft.parameters(), settings.grad_clip).full_tensor()
        if norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def acceptance_length(self, samples: list[Sample]) -> float | None:
        """Tokens a greedy chain of the served length would commit per verification, bonus included."""
        steps, committed, rows = self._run.draft_steps, 0, 0
        for sample in samples:
            c, r = self._unroll([sample], steps).acceptance_length(steps)
            committed, rows = committed + c, rows + r
        return committed / rows if rows else None

    def export(self) -> dict[str, Tensor]:
        """Whole tensors on the host, in the served dtype, as ``checkpoint.expected_shapes`` names them."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        dtype = getattr(torch, self._run.served_dtype)
        tensors = get_model_state_dict(self.draft, options=options)
        return {n: t.to(dtype).contiguous() if t.is_floating_point() else t for n, t in tensors.items()}

    def _unroll(self, samples: list[Sample], steps: int) -> Unrolled:
        settings = self._run.settings
        generated_only = settings.loss_on == "generated"
        packed = pack(samples, self._device)
        return unroll(self.draft, self.target, packed, steps, settings.ttt_decay, generated_only)


def load_draft(run: Run, folder: Path) -> Eagle3Draft:
    """A draft with a checkpoint's weights, float32, on the host."""
    config: dict[str, Any] = load_config(run.version_path(0))
    draft = Eagle3Draft(config)
    draft.load_state_dict(load_checked(folder, config, run.target_fingerprint))
    return draft


def load_target(run: Run, dtype: torch.dtype, device: torch.device) -> FrozenTarget:
    """The embedding as served (its rounding is part of what the draft reads) and the head in ``dtype``."""
    embed_VH, head_VH = load_embedding_and_head(Path(run.target_path))
    return FrozenTarget(embed_VH.to(device, getattr(torch, run.served_dtype)), head_VH.to(device, dtype))
