"""The live draft's parameters: shadows filled by SGLang's own loader, then copied in place between two steps.

In-place copies keep CUDA graphs valid. The embedding is the target's and is never part of a swap.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sglang_specforge.settings import BankPlace

Shadows = dict[str, torch.Tensor]
_SHARED = ("embed_tokens",)


class LiveDraft:
    """The draft of an ``EAGLEWorkerV2`` on this rank, sharded as SGLang sharded it."""

    def __init__(self, worker: Any, place: BankPlace) -> None:
        self._worker = worker.draft_worker
        self._model = self._worker.draft_runner.model
        self._place = place
        self._device = torch.get_device_module(worker.device)
        self._forward_stream = worker.target_worker.model_runner.forward_stream

    def load_shadows(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Shadows:
        """This rank's part of a checkpoint in the bank's memory, in the live parameters' layout.

        ``LlamaForCausalLMEagle3.load_weights`` runs on stand-ins for the live parameters, so stacking and TP
        sharding are SGLang's. Safe beside serving: it only reads the live model's shapes.
        """
        with torch.cuda.device_of(next(self._model.parameters())):  # a thread begins on the first GPU, whose ever it is
            stand_in = _StandIn((name, p, self._room_for(p.data)) for name, p in self._swappable())
            type(self._model).load_weights(stand_in, tensors)
            shadows = {name: p.data for name, p in stand_in.parameters.items()}
            live, new = self._worker.hot_token_id, stand_in.hot_token_id
            if live is not None and new is not None:
                shadows["hot_token_id"] = self._room_for(live).copy_(new)
            return shadows

    def copy_in(self, shadows: Shadows) -> None:
        """Make the shadows the live weights; between two steps only."""
        # With overlap, the step before is still under way, on a stream that this one need not be behind.
        self._device.current_stream().wait_stream(self._forward_stream)
        live = self._live()
        names = [name for name in live if name in shadows]
        with torch.no_grad():
            torch._foreach_copy_([live[n] for n in names], [shadows[n] for n in names], non_blocking=True)

    def copy_out(self) -> Shadows:
        """The live weights, in memory of their own."""
        return {name: self._room_for(tensor).copy_(tensor) for name, tensor in self._live().items()}

    def _room_for(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of the bank's memory, for a tensor of the device."""
        if self._place == "device":
            return torch.empty_like(tensor)
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)

    def _live(self) -> Shadows:
        """Every tensor that a swap changes."""
        live = {name: p.data for name, p in self._swappable()}
        if self._worker.hot_token_id is not None:
            # The captured draft graph indexes this very tensor; the model's own copy is read at start only.
            live["hot_token_id"] = self._worker.hot_token_id
        return live

    def _swappable(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self._model.named_parameters() if not any(s in n for s in _SHARED)]


class _StandIn:
    """What ``load_weights`` reads of a model: parameters with their loaders, and a place for the token map."""

    def __init__(self, live: Iterable[tuple[str, nn.Parameter, torch.Tensor]]) -> None:
        self.hot_token_id: torch.Tensor | None = None
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter, room in live:
            shadow = nn.Parameter(room, requires_grad=False)
            shadow.__dict__.update(parameter.__dict__)  # weight_loader, output_dim and their like
            self.parameters[name] = shadow

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self.parameters.items()
