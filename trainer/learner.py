"""The draft being trained: one step, and its weights as they are published.

Parameters are float32 under FSDP2; compute runs in the job's training dtype. Shapes: K steps of the training-time test.
"""

import logging
import math
import pkgutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from sglang_specforge.checkpoint import load_checked, load_config
from sglang_specforge.drafts import as_served, kind_of
from sglang_specforge.target import final_softcap, load_embedding_and_head, load_target_config
from sglang_specforge.training_settings import Job
from trainer.draft import Draft
from trainer.evaluate import Simulated, simulate
from trainer.fused import fuse
from trainer.loss import FrozenTarget, Goal, unroll
from trainer.mfu import peak_flops
from trainer.optimizer import make_optimizers, set_learning_rates
from trainer.rows import Rows
from trainer.sample import Sample, count_rows, fields_of, pack
from trainer.share import gather
from trainer.vocabulary import take_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """One optimizer step, over all processes."""

    step: int  # steps taken so far, this one included
    loss: float | None  # None: it is not finite
    grad_norm: float | None  # likewise, and the step changed nothing
    accuracy_K: list[float]  # of each step, the share of rows whose top choice is the target's
    tokens_by_rank: list[int]
    skipped_steps: int = 0  # of this process's life, those that changed nothing
    taken_up: int = 0  # of this process's life, times that the weights became another draft's
    mfu: float | None = None  # ``trainer.mfu``; None where the draft's products or the device's peak are not known

    @property
    def tokens(self) -> int:
        return sum(self.tokens_by_rank)


class Learner:
    """Starts from the draft that the server started with. All processes call each method together."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self._job, self._settings, self._device = job, job.settings, device
        self.step = self._skipped_steps = self._taken_up = 0
        self.begun = 0  # the step from which learning rates warm up
        self.acceptance_K = [0.0] * job.settings.ttt_steps  # mean acceptance rates, for lk_lambda
        dtype = getattr(torch, job.training_dtype)
        self.config = load_config(job.version_path(0))
        self.draft = load_draft(job, job.version_path(0)).to(device)
        self.target = load_target(job, dtype, device)
        self.draft.checkpoints_activations = self._settings.activation_checkpointing
        fuse(self._settings.compile)
        fully_shard(
            self.draft,
            mesh=init_device_mesh(device.type, (dist.get_world_size(),)),
            mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
            offload_policy=CPUOffloadPolicy() if self._settings.cpu_offload else OffloadPolicy(),
        )
        self.optimizers = make_optimizers(self.draft, self._settings)
        self._peak_flops = peak_flops(device, dtype)

    def train(self, passes: list[list[Sample]]) -> Trained:
        """One optimizer step on this process's passes; the others make as many.

        A step whose gradient is not finite changes nothing. Where a pass is empty, the process takes part in it
        without a row that counts.
        """
        settings, begun_s = self._settings, time.monotonic()
        samples = [sample for samples in passes for sample in samples]
        rows = count_rows(samples, settings.ttt_steps, settings.loss_on == "generated")
        own_tokens = [0] * dist.get_world_size()
        own_tokens[dist.get_rank()] = sum(map(len, samples))
        counts = list(map(int, self._summed([*rows, *own_tokens])))
        rows_K, tokens_by_rank = counts[: settings.ttt_steps], counts[settings.ttt_steps :]
        goal = Goal.of(settings, rows_K, self.acceptance_K)
        set_learning_rates(self.optimizers, settings, self.step, self.begun)
        told: list[Tensor] = []  # of each pass; read at the end, so that a GPU is still at one while the next is packed
        for i, own in enumerate(passes):
            self.draft.set_requires_gradient_sync(i == len(passes) - 1)
            found = unroll(self.draft, self.target, pack(own or [self._idle_sample()], self._device), goal)
            # The loss is a mean over all processes' rows already; FSDP takes the mean over processes once more.
            (found.loss * dist.get_world_size()).backward()
            flops = found.correct_K.new_full((), found.flops)
            sums = (found.loss.detach(), flops, found.correct_K, found.rate_K)
            told.append(torch.hstack([value.double() for value in sums]))
        norm = nn.utils.clip_grad_norm_(self.draft.parameters(), settings.grad_clip).full_tensor()
        is_finite = bool(norm.isfinite())
        for optimizer in self.optimizers:
            if is_finite:
                optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        loss, flops, *sums = self._summed(torch.stack(told).sum(0))
        shares = [s / max(1, rows) for s, rows in zip(sums, 2 * rows_K, strict=True)]
        accuracy_K, acceptance_K = shares[: settings.ttt_steps], shares[settings.ttt_steps :]
        if is_finite:
            self.acceptance_K = acceptance_K
        else:
            self._note_skipped()
        mfu = None
        if self._peak_flops and flops:
            mfu = flops / (time.monotonic() - begun_s) / (self._peak_flops * dist.get_world_size())
        finite = [value if math.isfinite(value) else None for value in (loss, norm.item())]
        return Trained(self.step, *finite, accuracy_K, tokens_by_rank, self._skipped_steps, self._taken_up, mfu)

    def simulate(self, passes: list[list[Sample]], checkpoint: Path | None = None) -> list[tuple[str, Simulated]]:
        """Greedy acceptance of the server's speculation: slice and result of each of this process's samples and all
        others', with the weights as they are, or with those of a checkpoint.

        A pass is of one sample, or of none.

        Raises:
            CheckpointError: it cannot be read.
        """
        draft = self.draft
        if checkpoint is not None:
            draft = load_draft(self._job, checkpoint).to(self._device, getattr(torch, self._job.training_dtype))
        found = []
        for own in passes:
            [sample] = own or [self._idle_sample()]
            found.append((sample.slice, simulate(draft, self.target, [sample], self._job.speculation)))
        everyones = gather(found, list[tuple[str, Simulated]])
        return [pair for pairs in everyones for pair in pairs if pair[1].sequences]

    @torch.no_grad()
    def choose_vocabulary(self, ids_D: Tensor) -> None:
        """From the next step on, the draft says these target ids, ascending int64 [D].

        What it has learnt of a token stays; of a new one, its head is the target's, as a random draft's is.
        """
        ids_D, draft = ids_D.to(self._device), self.draft
        row_D = (draft.t2d.cumsum(0) - 1)[ids_D].where(draft.t2d[ids_D], -1)  # of each token, where it has one
        draft.reshard()  # after a forward pass alone, the head is whole
        for name, parameter in draft.lm_head.named_parameters():
            take_rows(parameter, row_D, self.target.head_VH[ids_D] if name == "weight" else 0.0)
            for moment in (value for o in self.optimizers for value in o.state.get(parameter, {}).values()):
                if moment.shape == parameter.shape:
                    take_rows(moment, row_D, 0.0)
        draft.d2t.copy_(ids_D - torch.arange(ids_D.numel(), device=self._device))
        draft.t2d.zero_()[ids_D] = True

    def take_up(self, checkpoint: Path) -> None:
        """From the next step on, the weights and the vocabulary are a checkpoint's. What the optimizers know of those
        before is forgotten, so learning rates warm up again.

        Raises:
            CheckpointError: it cannot be read.
        """
        tensors = load_draft(self._job, checkpoint).state_dict()
        set_model_state_dict(self.draft, tensors, options=StateDictOptions(full_state_dict=True))
        for optimizer in self.optimizers:
            optimizer.state.clear()
        self.begun, self._taken_up = self.step, self._taken_up + 1
        logger.info("draft training: training goes on from the draft in service, %s", checkpoint)

    def export(self) -> dict[str, Tensor]:
        """Whole tensors on the host of the first process, in the served dtype, named as a checkpoint's."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        dtype = getattr(torch, self._job.served_dtype)
        tensors = get_model_state_dict(self.draft, options=options)
        return {n: t.to(dtype).contiguous() if t.is_floating_point() else t for n, t in tensors.items()}

    def _note_skipped(self) -> None:
        self._skipped_steps += 1
        if self._skipped_steps.bit_count() == 1:  # the first, and then ever fewer
            logger.warning(
                "draft training: %d steps changed nothing, as their gradients were not finite; the last one is step %d",
                self._skipped_steps,
                self.step,
            )

    def _summed(self, values: list[int] | Tensor) -> list[float]:
        """Over all processes."""
        total = torch.as_tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return total.tolist()

    def _idle_sample(self) -> Sample:
        """One row, which has no teacher."""
        H = self.target.head_VH.shape[1]
        row = Rows.of_text(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 3 * H), torch.zeros(1, H))
        generated_T, rejected_T = torch.zeros(1, dtype=torch.bool), torch.full((1,), -1)
        return Sample("", 0, **fields_of(row), generated_T=generated_T, rejected_T=rejected_T)


def load_draft(job: Job, folder: Path) -> Draft:
    """A draft with a checkpoint's weights, float32, on the host."""
    config = load_config(job.version_path(0))
    draft = pkgutil.resolve_name(kind_of(config).module)(as_served(config, job.overrides))
    draft.load_state_dict(load_checked(folder, config, job.target_fingerprint))
    return draft


def load_target(job: Job, dtype: torch.dtype, device: torch.device) -> FrozenTarget:
    """The embedding as served (its rounding is part of what the draft reads) and the head in ``dtype``."""
    embed_VH, head_VH = load_embedding_and_head(Path(job.target_path))
    softcap = final_softcap(load_target_config(Path(job.target_path)))
    return FrozenTarget(embed_VH.to(device, getattr(torch, job.served_dtype)), head_VH.to(device, dtype), softcap)
