"""What every draft is to the trainer: a module that is unrolled for training-time test.

A new draft is a subclass with ``start`` and ``advance``, registered with its tensors' shapes
(``sglang_specforge.drafts``). Shapes: N rows of a pack of samples, H hidden, F features the draft starts from, V target
and D draft vocabulary, K steps, G key heads, P head size, L roots of chains.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.roots import Roots


@dataclass
class Past:
    """Keys and values of the steps so far: step 0's of all rows [G, N, P], the later ones' of the roots [G, L, P]."""

    roots: Roots
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


@dataclass
class Begun:
    """A draft before its first step, over a pack."""

    draft: "Draft"
    read_NF: Tensor
    state_NF: Tensor
    positions_N: Tensor
    past: Past

    def unroll(self, steps: int) -> list[Tensor]:
        """Hidden states of a chain of ``steps`` from each root [K, L, H].

        Row n of step k reads the embedding of token n+1+k and predicts token n+2+k of its sample. What a row reads
        beyond its sample's end is of no use, and no row with a teacher sees it.
        """
        hidden_KLH, state, rows, pick = [], self.state_NF, self.read_NF.shape[0], self.past.roots.pick
        read_NF = F.pad(self.read_NF, (0, 0, 0, steps))
        for k in range(steps):
            given = (read_NF[1 + k : 1 + k + rows], state, self.positions_N + k)
            if k > 0:
                given = map(pick, given)
            hidden_LH, state = map(pick, self.draft.advance_saving(*given, self.past))
            hidden_KLH.append(hidden_LH)
        return hidden_KLH


class Draft(nn.Module):
    """``config`` is the checkpoint's ``config.json``. Parameters are named as the checkpoint names them.

    Subclasses make ``lm_head`` (a linear layer to the draft vocabulary) and call ``super().__init__(config)`` first.
    """

    lm_head: nn.Linear
    turns_by_axes = False  # positions of packs that show images are [N, 3]

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.register_buffer("d2t", torch.zeros(config["draft_vocab_size"], dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(config["vocab_size"], dtype=torch.bool))
        self.checkpoints_activations = False

    def start(self, aux_N3H: Tensor) -> Tensor:
        """The state that step 0 begins with, from the captured aux hidden states."""
        raise NotImplementedError

    def read(self, embed_NH: Tensor) -> Tensor:
        """What a step reads of a token, made once for all steps; by default its embedding."""
        return embed_NH

    def advance(self, read_NF: Tensor, state_NF: Tensor, positions_N: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        """One step: the hidden state [N, H] that ``lm_head`` reads, and the state of the next step.

        Appends the step's keys and values to ``past``. Step 0 is given all rows, and the later ones the roots alone. A
        draft may make use of that at step 0 and return what it has for the roots (``past.roots.pick``).
        """
        raise NotImplementedError

    def products(self, rows: int, roots: int, steps: int) -> int:
        """How many weights all rows meet in a forward pass, those of ``lm_head`` left out; 0: nobody counted them."""
        return 0

    @property
    def target_ids_D(self) -> Tensor:
        """The target's id of each draft id."""
        return self.d2t + torch.arange(self.d2t.numel(), device=self.d2t.device)

    def forward(
        self,
        embed_NH: Tensor,
        aux_N3H: Tensor,
        positions_N: Tensor,
        roots: Roots,
        use: Callable[[Begun], Any],
    ) -> Any:
        """``use`` of a draft that has begun. It runs in here because parameters are whole only in here, under FSDP."""
        return use(Begun(self, self.read(embed_NH), self.start(aux_N3H), positions_N, Past(roots)))

    def advance_saving(
        self, read_NF: Tensor, state_NF: Tensor, positions_N: Tensor, past: Past
    ) -> tuple[Tensor, Tensor]:
        """``advance``, its activations made again in the backward pass if ``checkpoints_activations``."""
        if not (self.checkpoints_activations and torch.is_grad_enabled()):
            return self.advance(read_NF, state_NF, positions_N, past)
        steps = len(past.keys)

        def pure(read_NF: Tensor, state_NF: Tensor, positions_N: Tensor, *pairs: Tensor) -> tuple[Tensor, ...]:
            inner = Past(past.roots, list(pairs[:steps]), list(pairs[steps:]))
            hidden_NH, next_NF = self.advance(read_NF, state_NF, positions_N, inner)
            return hidden_NH, next_NF, *inner.keys[steps:], *inner.values[steps:]

        hidden_NH, next_NF, *new = checkpoint(
            pure, read_NF, state_NF, positions_N, *past.keys, *past.values, use_reentrant=False
        )
        past.keys += new[: len(new) // 2]
        past.values += new[len(new) // 2 :]
        return hidden_NH, next_NF
