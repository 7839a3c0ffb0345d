"""Another device than the host, on a machine that has none: its tensors compute on the CPU and refuse to meet the
host's, as a GPU's do.

It goes by the name of ``meta``, the one device that autograd asks no driver about.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

OTHER = torch.device("meta")
_aten = torch.ops.aten
_CROSSING = {_aten._to_copy.default, _aten.copy_.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
_WAITING = {_aten._local_scalar_dense.default, _aten.nonzero.default}


class Elsewhere(Tensor):
    """A tensor of the other device."""

    @staticmethod
    def __new__(cls, host: Tensor) -> "Elsewhere":
        return Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype, device=OTHER
        )

    def __init__(self, host: Tensor) -> None:
        self.host = host

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a tensor of another device has no memory that NumPy can read")


class OtherDevice(TorchDispatchMode):
    """While it is entered, ``OTHER`` is a device. ``waits``: operations so far that waited for what it computes, as
    copies either way do, but for those to it with ``non_blocking``."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = _run(op, args, kwargs)
        if op in _CROSSING:
            source = args[1] if op is _aten.copy_.default else args[0]
            at_once = isinstance(found, Elsewhere) and (kwargs.get("non_blocking") or args[2:3] == (True,))
            waited = isinstance(source, Elsewhere) != isinstance(found, Elsewhere) and not at_once
        else:
            waited = op in _WAITING and isinstance(args[0], Elsewhere)
        if waited:
            self.waits.append(str(op))
        return found


def _run(op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    if any(x.device == OTHER for x in tensors if not isinstance(x, Elsewhere)):
        raise NotImplementedError(f"{op}: PyTorch made a tensor there by itself, which has no values")
    asked = kwargs.get("device")
    if op is _aten.copy_.default:
        stays = isinstance(args[0], Elsewhere)
    else:
        stays = bool(there) if asked is None else torch.device(asked) == OTHER
    if there and op not in _CROSSING:
        indices = args[1] if op in _INDEXED else ()
        indexing = {id(x) for x in indices} if isinstance(args[0], Elsewhere) else set()
        if met := [x for x in tensors if not isinstance(x, Elsewhere) and x.dim() and id(x) not in indexing]:
            raise RuntimeError(f"{op}: a tensor of the host, {tuple(met[0].shape)}, meets those of another device")
    if asked is not None and stays:
        kwargs |= {"device": torch.device("cpu")}
    found = op(*tree_map(_on_host, args), **tree_map(_on_host, kwargs))
    if not stays:
        return found
    known = {id(x.host): x for x in there}  # what was changed in place is the tensor that it was
    return tree_map(lambda x: known[id(x)] if id(x) in known else Elsewhere(x) if isinstance(x, Tensor) else x, found)


def _on_host(x: Any) -> Any:
    return x.host if isinstance(x, Elsewhere) else x
