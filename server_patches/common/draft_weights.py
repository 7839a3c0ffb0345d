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

    def __init__(self, worker: Any, place: BankPlace, slots: int) -> None:
        self._worker = worker.draft_worker
        self._model = self._worker.draft_runner.model
        self._place = place
        self._device = torch.get_device_module(worker.device)
        self._forward_stream = worker.target_worker.model_runner.forward_stream
        self._copied: torch.cuda.Event | None = None  # of the last swap, on a GPU
        self._free = [self._new_room() for _ in range(slots)]  # now: SGLang's KV cache takes what memory is left

    def load_shadows(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Shadows:
        """This rank's part of a checkpoint in the bank's memory, in the live parameters' layout.

        ``LlamaForCausalLMEagle3.load_weights`` runs on stand-ins for the live parameters, so stacking and TP
        sharding are SGLang's. Safe beside serving: it only reads the live model's shapes.
        """
        room = self._take_room()
        try:
            # A thread begins on the first GPU, whosever it is.
            with torch.cuda.device_of(next(self._model.parameters())):
                if self._copied is not None:
                    self._copied.synchronize()
                stand_in = _StandIn((name, p, room[name]) for name, p in self._swappable())
                type(self._model).load_weights(stand_in, tensors)
                room |= {name: p.data for name, p in stand_in.parameters.items()}
                live, new = self._worker.hot_token_id, stand_in.hot_token_id
                if live is not None and new is not None:
                    room["hot_token_id"] = self._room_for(live).copy_(new)
        except Exception:
            self.release(room)
            raise
        return room

    def release(self, shadows: Shadows) -> None:
        """Nobody needs what they hold; their memory is kept for the next."""
        self._free.append(shadows)

    def copy_in(self, shadows: Shadows) -> None:
        """Make the shadows the live weights; between two steps only."""
        # With overlap, the step before is still under way, on a stream that this one need not be behind.
        stream = self._device.current_stream()
        stream.wait_stream(self._forward_stream)
        live = self._live()
        names = [name for name in live if name in shadows]
        with torch.no_grad():
            torch._foreach_copy_([live[n] for n in names], [shadows[n] for n in names], non_blocking=True)
        if self._device is torch.cuda:
            self._copied = stream.record_event()

    def copy_out(self) -> Shadows:
        """The live weights, in memory of their own."""
        room = self._take_room()
        for name, tensor in self._live().items():
            room[name] = (room[name] if name in room else self._room_for(tensor)).copy_(tensor)
        return room

    def _take_room(self) -> Shadows:
        return self._free.pop() if self._free else self._new_room()

    def _new_room(self) -> Shadows:
        """For all but the token map, which is small, and not there yet when the first ones are made."""
        return {name: self._room_for(p.data) for name, p in self._swappable()}

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
