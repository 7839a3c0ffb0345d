"""Inside a scheduler process: reading target states after each pass, and swapping the draft between two steps.

Shapes: B requests, N rows, D drafted tokens a request, R rows a request (longest path through a draft tree), H hidden,
F = 2 + D.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.scheduler_components.internal_state import UpdateRejected, _UpdateHandler
from sglang.srt.runtime_context import get_parallel

from server_patches.v0_5_23 import drafting, outputs
from server_patches.v0_5_23.consent import OPT_KEY, SLICE_KEY, asked
from server_patches.v0_5_23.draft_weights import LiveDraft
from sglang_specforge.contracts import coding
from sglang_specforge.contracts.spans import Travel
from sglang_specforge.draft_bank import DraftBank
from sglang_specforge.drafting import Depth
from sglang_specforge.export.admission import Admission, Admitted
from sglang_specforge.export.entry import HostCopier, Prefilled, Verified
from sglang_specforge.export.exporter import Exporter
from sglang_specforge.export.ring import HostRing
from sglang_specforge.pull import Puller
from sglang_specforge.settings import Run

_LONGEST_SLICE = 64  # characters
_RESIDENT, _LOADING, _REFUSED = range(3)  # what a rank says of a version


@dataclass
class DraftTraining:
    """What draft training keeps in this scheduler process."""

    bank: DraftBank
    travel: Travel
    exporter: Exporter | None  # on one rank of each attention-TP group
    copier: HostCopier | None
    switch: drafting.Switch | None  # where drafting may be switched off


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
        settings = run.settings
        ring = HostRing(settings.ring_mb << 20, pinned=device.type == "cuda")
        max_bytes_s = settings.capture_max_mb_s and settings.capture_max_mb_s * (1 << 20)
        describe = partial(_Served, run=run)
        admission = Admission(ring, describe, settings.capture_sample, max_bytes_s)
        puller = Puller(settings.pull) if settings.pull else None
        exporter = Exporter(run.spans_endpoint, ring, admission, puller)
        copier = HostCopier(ring, device)
        exporter.start()
    bank = DraftBank(LiveDraft(worker.draft_worker), run)
    switch = drafting.install(worker) if run.settings.drafting != "always" else None
    _this = DraftTraining(bank, run.settings.capture_dtype, exporter, copier, switch)


def around_prefill(original: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``EAGLEWorkerV2._forward_prefill_batch``, which replaces ``batch.input_ids`` by the draft's."""
    tokens_N = batch.input_ids
    result = original(worker, batch, *args, **kwargs)
    _guarded(_capture_prefill, batch, result, tokens_N)
    return result


def after_verify(result: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``EAGLEWorkerV2.verify``."""
    if result.accept_index.shape[1] > 1:  # drafting is on
        outputs.note(batch.reqs, _this.bank.active_version)
    _guarded(_capture_verify, batch, result)


def _guarded(capture: Callable[..., None], batch: Any, *args: Any) -> None:
    """On the exporting rank, capture; whatever goes wrong ends capture, not the server."""
    exporter = _this.exporter
    if exporter is None or exporter.failure is not None or batch.forward_mode.is_idle():
        return
    try:
        with exporter.timed():
            capture(batch, *args)
    except Exception as error:
        exporter.fail(error)


def _capture_prefill(batch: Any, result: Any, tokens_N: torch.Tensor) -> None:
    _this.exporter.pace.interrupt()
    logits = result.logits_output
    states = {"aux_N3H": logits.hidden_states, "last_NH": logits.last_hidden_states}
    row_bytes = _row_bytes(states)
    admitted = _pick(batch, [row_bytes * length for length in batch.extend_lens])
    for _, one in admitted:
        one.enter(_this.bank.window)
    picked = [b for b, one in admitted if one.left_out is None]
    if not picked:
        return
    if len(picked) < len(batch.reqs):
        rows = torch.zeros(len(batch.reqs), dtype=torch.bool)
        rows[picked] = True
        rows = rows.repeat_interleave(torch.tensor(batch.extend_lens)).nonzero().flatten().to(tokens_N.device)
        states, tokens_N = {name: state[rows] for name, state in states.items()}, tokens_N[rows]
    prefilled = [_prefilled(batch.reqs[b], batch.prefix_lens[b], batch.extend_lens[b]) for b in picked]
    _capture([one.request for _, one in admitted if one.left_out is None], states, tokens_N, prefilled=prefilled)


def _capture_verify(batch: Any, result: Any) -> None:
    """Rows of the accepted paths, the same number for every request."""
    B, R = result.accept_index.shape
    seconds = _this.exporter.pace.lap(R > 1, B)
    drafted_BD = batch.spec_info.draft_token.view(B, -1)
    D, chain = drafted_BD.shape[1], batch.spec_info.topk == 1
    aux_N3H, last_NH = result.logits_output.hidden_states, result.logits_output.last_hidden_states
    admitted = _pick(batch, [R * _row_bytes({"aux_N3H": aux_N3H, "last_NH": last_NH})] * B)
    counted = [b for b, one in admitted if one.request.is_counted]
    window = _this.bank.window
    standings = [one.verify_in(window) for _, one in admitted if one.request.is_counted] if window else ()
    picked = [b for b, one in admitted if one.left_out is None]
    if not counted:
        return
    facts_BF = torch.cat([batch.seq_lens[:, None], result.accept_lens[:, None], drafted_BD], 1)
    states, tokens_N = {}, drafted_BD
    if picked:
        tokens_N = drafted_BD.view(-1)
        if not chain:
            # SGLang has moved a tree's accepted path to the front of the aux states, but not of the last hidden states.
            path_BR = result.accept_index.long()
            path_N = torch.where(path_BR < 0, path_BR[:, :1], path_BR).view(-1)  # beyond the accepted: rows of its own
            aux_N3H = aux_N3H.view(B, D, -1)[:, :R].flatten(0, 1)
            last_NH, tokens_N = last_NH[path_N], tokens_N[path_N]
        if len(picked) < B:
            rows = torch.tensor(picked, device=tokens_N.device)
            aux_N3H, last_NH, tokens_N = (t.view(B, R, -1)[rows].flatten(0, 1) for t in (aux_N3H, last_NH, tokens_N))
        states, tokens_N = {"aux_N3H": aux_N3H, "last_NH": last_NH}, tokens_N.view(-1)
    requests = [one.request for _, one in admitted if one.left_out is None]
    served = [one.request for _, one in admitted if one.request.is_counted]
    slices, prompts = [request.slice for request in served], [request.prompt_tokens for request in served]
    verified = Verified(R, chain, facts_BF, picked, counted, slices, prompts, window, standings, seconds)
    _capture(requests, states, tokens_N, verified=verified)


def after_abort(result: None, scheduler: Any, abort_req: Any, req: Any) -> None:
    """AFTER ``Scheduler.send_abort_output``: the one way to end for requests that are not running."""
    if _this is not None and _this.exporter is not None:
        _this.exporter.admission.abort(req.rid)


def add_handlers(handlers: dict[str, Any], controller: Any) -> dict[str, Any]:
    """AFTER ``_update_handlers``: numbers that reach every TP rank in the same scheduler iteration."""
    if _this is None:
        return handlers
    return handlers | {
        "draft_training_evict": _handler(_this.bank.evict),
        "draft_training_load": _handler(_this.bank.load),
        "draft_training_prepare": _handler(lambda version: None, _agree_on),
        "draft_training_activate": _handler(
            lambda version: _this.bank.activate(version, controller.scheduler.forward_ct), _agree_on
        ),
        "draft_training_window": _handler(_set_window),
        "draft_training_drafting": _handler(_set_drafting),
        "draft_training_capture": _handler(_set_capturing),
        "draft_training_reader": _handler(_set_reader),
    }


def add_state(result: None, controller: Any, state: dict[str, Any]) -> None:
    """AFTER ``_add_speculative``: this rank's share of ``GET /draft/status``."""
    if _this is not None:
        export = _this.exporter.counters() if _this.exporter else None
        state["draft_training"] = {"bank": _this.bank.status(), "export": export}


def _handler(apply: Callable[[int], None], validate: Callable[[int], None] = lambda value: None) -> _UpdateHandler:
    return _UpdateHandler(lambda key, value: validate(int(value)), lambda key, value: apply(int(value)))


def _agree_on(version: int) -> None:
    """All ranks of the TP group have the version, or none may activate it now. Raises UpdateRejected."""
    bank, parallel = _this.bank, get_parallel()
    state = _RESIDENT if bank.is_resident(version) else _REFUSED if bank.refuses(version) else _LOADING
    states = [torch.empty(1, dtype=torch.int64) for _ in range(parallel.tp_size)]
    torch.distributed.all_gather(states, torch.tensor([state]), group=parallel.tp_group.cpu_group)
    refusing = [rank for rank, state in enumerate(states) if state == _REFUSED]
    if refusing and not bank.refuses(version):
        bank.refuse(version, f"tensor-parallel rank {refusing[0]} cannot load it; the server's log says why")
    if not all(state == _RESIDENT for state in states):
        raise UpdateRejected(f"draft version {version} is not resident on every rank")


def _set_window(window: int) -> None:
    _this.bank.window = window


def _set_drafting(depth: int) -> None:
    if _this.switch is not None:
        _this.switch.set(Depth(depth))


def _set_capturing(enabled: int) -> None:
    if _this.exporter is not None:
        _this.exporter.paused = not enabled


def _set_reader(lease: int) -> None:
    if _this.exporter is not None:
        _this.exporter.reader = lease


def _pick(batch: Any, nbytes: list[int]) -> list[tuple[int, Admitted]]:
    """The pass's requests but those that were finished before it, each with its place in the batch."""
    alive = [b for b, req in enumerate(batch.reqs) if not req.finished()]
    admitted = _this.exporter.admission.pick([batch.reqs[b] for b in alive], [nbytes[b] for b in alive])
    return list(zip(alive, admitted, strict=True))


def _row_bytes(states: dict[str, torch.Tensor]) -> int:
    return sum(coding.row_bytes(state, _this.travel) for state in states.values())


def _capture(requests: list[Any], states: dict[str, torch.Tensor], tokens_N: torch.Tensor, **facts: Any) -> None:
    states = {name: coding.pack(state, _this.travel) for name, state in states.items()}
    _this.exporter.capture(_this.copier.copy(requests, _this.bank.active_version, states, tokens_N, **facts))


def _prefilled(req: Any, start: int, length: int) -> Prefilled:
    return Prefilled(start, length, req.origin_input_ids[:start] if start == req.cached_tokens else ())


class _Served:
    """``export.admission.ServedRequest`` of SGLang's ``Req``."""

    __slots__ = ("_req", "alias", "cached_tokens", "is_counted", "prompt", "prompt_tokens", "refusal", "rid", "slice")

    def __init__(self, req: Any, run: Run) -> None:
        said = asked(req)
        self.rid, self.alias, self._req = req.rid, run.alias(req.rid), req
        self.prompt_tokens, self.cached_tokens = len(req.origin_input_ids), req.cached_tokens
        self.prompt = req.origin_input_ids if run.disaggregation == "decode" else ()
        label = str(said.get(SLICE_KEY, ""))
        self.slice = label[:_LONGEST_SLICE]
        self.is_counted, self.refusal = True, None
        if req.rid.startswith(HEALTH_CHECK_RID_PREFIX):
            self.is_counted, self.refusal = False, "health_check"
        elif req.lora_id is not None:
            self.refusal = "adapter"  # what an adapter computes is not the target's
        elif said.get(OPT_KEY) is False:
            self.refusal = "opted_out"
        elif label in run.settings.capture_deny:
            self.refusal = "denied"
        elif run.settings.capture_opt_in and said.get(OPT_KEY) is not True:
            self.refusal = "not_opted_in"

    def is_finished(self) -> bool:
        return self._req.finished()

    def is_aborted(self) -> bool:
        return isinstance(self._req.finished_reason, FINISH_ABORT)

    def total_tokens(self) -> int:
        return len(self._req.origin_input_ids) + len(self._req.output_ids_through_stop)
