"""Inside a scheduler process: reading target states after each pass, and swapping the draft between two steps.

Shapes: B requests, N rows, R rows a request (longest path through a draft tree), H hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.scheduler_components.internal_state import UpdateRejected, _UpdateHandler
from sglang.srt.runtime_context import get_parallel

from server_patches.v0_5_23.draft_weights import LiveDraft
from sglang_specforge.draft_bank import DraftBank
from sglang_specforge.export.entry import CapturedRequest, HostCopier, VerifyMeta
from sglang_specforge.export.exporter import Exporter
from sglang_specforge.settings import Run

OPT_KEY, SLICE_KEY = "draft_training", "draft_slice"  # of a request's custom_params
_LONGEST_SLICE = 64  # characters


@dataclass
class DraftTraining:
    """What draft training keeps in this scheduler process."""

    bank: DraftBank
    exporter: Exporter | None  # on one rank of each attention-TP group
    copier: HostCopier | None


_this: DraftTraining | None = None


def attach(result: None, worker: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``EAGLEWorkerV2.__init__``: before CUDA graphs are captured, so last hidden is among their outputs."""
    global _this
    run = Run.inherited()
    model = worker.target_worker.model_runner.model
    processors = [m for m in model.modules() if isinstance(m, LogitsProcessor)]
    if not processors:
        raise RuntimeError(f"draft training: the target {type(model).__name__} has no LogitsProcessor to capture from")
    for processor in processors:
        processor.keep_last_hidden_states = True

    exporter = copier = None
    if get_parallel().attn_tp_rank == 0:
        device = torch.device(worker.device)
        exporter = Exporter(run.spans_endpoint, run.settings.ring_mb << 20, pinned=device.type == "cuda")
        copier = HostCopier(exporter.ring, device)
        exporter.start()
    bank = DraftBank(LiveDraft(worker.draft_worker), run)
    _this = DraftTraining(bank, exporter, copier)


def around_prefill(original: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``EAGLEWorkerV2._forward_prefill_batch``, which replaces ``batch.input_ids`` by the draft's."""
    tokens_N = batch.input_ids
    result = original(worker, batch, *args, **kwargs)
    _guarded(_capture_prefill, batch, result, tokens_N)
    return result


def after_verify(result: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``EAGLEWorkerV2.verify``."""
    _guarded(_capture_verify, batch, result)


def _guarded(capture: Callable[..., None], batch: Any, *args: Any) -> None:
    """On the exporting rank, capture; whatever goes wrong ends capture, not the server."""
    exporter = _this.exporter
    if exporter is None or exporter.failure is not None or batch.forward_mode.is_idle():
        return
    try:
        capture(batch, *args)
    except Exception as error:
        exporter.fail(error)


def _capture_prefill(batch: Any, result: Any, tokens_N: torch.Tensor) -> None:
    spans = list(zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True))
    captured = [_is_captured(req) for req in batch.reqs]
    states = result.logits_output.hidden_states, result.logits_output.last_hidden_states, tokens_N
    if not all(captured):
        lengths = torch.tensor(batch.extend_lens)
        rows = torch.tensor(captured).repeat_interleave(lengths).nonzero().flatten().to(tokens_N.device)
        states = tuple(state[rows] for state in states)
    spans = list(compress(spans, captured))
    _capture([_describe(*span) for span in spans], *states)
    for req, *_ in spans:
        _this.exporter.watch(_Watched(req))


def _capture_verify(batch: Any, result: Any) -> None:
    """Rows of the accepted paths, the same number for every request."""
    requests = [b for b, req in enumerate(batch.reqs) if _is_captured(req)]
    picked_B = slice(None)  # a view; picking out copies
    if len(requests) < len(batch.reqs):
        picked_B = torch.tensor(requests, dtype=torch.int64, device=result.accept_lens.device)
    all_drafted_BN = batch.spec_info.draft_token.view(len(batch.reqs), -1)
    path_BR = result.accept_index.long().clamp(min=0)[picked_B]
    drafted_BN = all_drafted_BN[picked_B]
    R = path_BR.shape[1]
    # SGLang has moved a tree's accepted path to the front of the aux states, but not of the last hidden states.
    aux_BR3H = result.logits_output.hidden_states.view(*all_drafted_BN.shape, -1)[picked_B, :R]
    last_NH = result.logits_output.last_hidden_states[path_BR.view(-1)]
    tokens_N = all_drafted_BN.reshape(-1)[path_BR.view(-1)]
    nothing_B = torch.full_like(drafted_BN[:, 0], -1)
    proposed_B = drafted_BN[:, 1] if drafted_BN.shape[1] > 1 else nothing_B
    # In a chain, the draft after the accepted ones is the refused one; a tree may have refused several.
    refused_BN = torch.cat([drafted_BN, nothing_B[:, None]], 1) if drafted_BN.shape[1] == R else nothing_B[:, None]
    accepted_B = result.accept_lens[picked_B].long()
    last_B1 = accepted_B[:, None].clamp(max=refused_BN.shape[1] - 1)
    facts = (batch.seq_lens[picked_B].long(), accepted_B, proposed_B.long(), refused_BN.gather(1, last_B1)[:, 0].long())
    meta = VerifyMeta(R, torch.stack(facts))
    _capture([_describe(batch.reqs[b]) for b in requests], aux_BR3H.flatten(0, 1), last_NH, tokens_N, meta)


def after_abort(result: None, scheduler: Any, abort_req: Any, req: Any) -> None:
    """AFTER ``Scheduler.send_abort_output``: the one way to end for requests that are not running."""
    if _this is not None and _this.exporter is not None:
        _this.exporter.watch(_Watched(req, ended=True))


def add_handlers(handlers: dict[str, Any], controller: Any) -> dict[str, Any]:
    """AFTER ``_update_handlers``: numbers that reach every TP rank in the same scheduler iteration."""
    if _this is None:
        return handlers
    return handlers | {
        "draft_training_stage": _UpdateHandler(
            lambda key, value: None, lambda key, value: _this.bank.stage(int(value))
        ),
        "draft_training_activate": _UpdateHandler(
            _validate_activation, lambda key, value: _this.bank.activate(int(value))
        ),
    }


def add_state(result: None, controller: Any, state: dict[str, Any]) -> None:
    """AFTER ``_add_speculative``: this rank's share of ``GET /draft/status``."""
    if _this is not None:
        export = _this.exporter.counters() if _this.exporter else None
        state["draft_training"] = {"bank": _this.bank.status(), "export": export}


def _validate_activation(key: str, value: Any) -> None:
    """All TP ranks swap or none: a rank that is not ready holds the others back, for this attempt."""
    ready = torch.tensor(int(_this.bank.is_staged(int(value))))
    torch.distributed.all_reduce(ready, torch.distributed.ReduceOp.MIN, group=get_parallel().tp_group.cpu_group)
    if not ready:
        raise UpdateRejected(f"draft version {int(value)} is not staged on every rank")


def _capture(
    requests: list[CapturedRequest],
    aux_N3H: torch.Tensor,
    last_NH: torch.Tensor,
    tokens_N: torch.Tensor,
    verify: VerifyMeta | None = None,
) -> None:
    if not requests:
        return
    states = {"aux_N3H": aux_N3H, "last_NH": last_NH}
    _this.exporter.capture(_this.copier.copy(requests, _this.bank.active_version, states, tokens_N, verify))


def _is_captured(req: Any) -> bool:
    """No health check, not finished before the pass, of the target itself, and its user wants it."""
    adapted = req.lora_id is not None  # what an adapter computes is not the target's
    left_out = req.rid.startswith(HEALTH_CHECK_RID_PREFIX) or _asked(req).get(OPT_KEY) is False
    return not (req.finished() or adapted or left_out)


def _describe(req: Any, start: int = 0, length: int = 0) -> CapturedRequest:
    return CapturedRequest(
        rid=req.rid,
        prompt_tokens=len(req.origin_input_ids),
        cached_tokens=req.cached_tokens,
        start=start,
        length=length,
        prefix=req.origin_input_ids[:start] if length and start == req.cached_tokens else (),
        slice=str(_asked(req).get(SLICE_KEY, ""))[:_LONGEST_SLICE],
    )


def _asked(req: Any) -> dict[str, Any]:
    """What the request says of draft training, among its ``custom_params``."""
    return req.sampling_params.custom_params or {}


class _Watched:
    """``export.exporter.WatchedRequest`` on SGLang's ``Req``; read from the exporter thread."""

    def __init__(self, req: Any, ended: bool = False) -> None:
        self.rid, self._req, self._ended = req.rid, req, ended

    def is_finished(self) -> bool:
        return self._ended or self._req.finished()

    def is_aborted(self) -> bool:
        return self._ended or isinstance(self._req.finished_reason, FINISH_ABORT)

    def total_tokens(self) -> int:
        return len(self._req.origin_input_ids) + len(self._req.output_ids_through_stop)
