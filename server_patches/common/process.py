"""Draft training in a scheduler process: made when SGLang has made its speculative worker.

What differs between SGLang's versions is handed in by the support of a version.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.runtime_context import get_parallel, get_schedule

from server_patches.common import images, nodes
from server_patches.common.consent import OPT_KEY, SLICE_KEY, asked
from server_patches.common.draft_weights import LiveDraft
from server_patches.common.drafting import Switch
from sglang_specforge.contracts import coding
from sglang_specforge.draft_bank import DraftBank
from sglang_specforge.export.admission import Admission
from sglang_specforge.export.entry import HostCopier
from sglang_specforge.export.exporter import Exporter
from sglang_specforge.export.ring import HostRing
from sglang_specforge.pull import Puller
from sglang_specforge.settings import Run

_LONGEST_SLICE = 64  # characters
_PASSES_HELD, _LEAST_RING_BYTES = 4, 256 << 20  # by a ring whose size nobody gave


@dataclass
class DraftTraining:
    """What draft training keeps in this process."""

    run: Run
    bank: DraftBank
    exporter: Exporter | None  # on one rank of each attention-TP group
    copier: HostCopier | None
    switch: Switch | None  # where drafting may be switched off


this: DraftTraining | None = None


def attach(
    worker: Any,
    replica: int,
    keep_last_hidden: Callable[[LogitsProcessor], None],
    install: Callable[[Any, Switch], None],
    keeps_embeds: bool = True,
) -> None:
    """After ``EAGLEWorkerV2.__init__``: before CUDA graphs are captured, so last hidden is among their outputs.

    ``replica`` is this process's place among those of ``--dp-size``; ``keep_last_hidden`` makes a logits processor of
    the target keep last hidden states; ``install`` makes the worker's depth the switch's. Without ``keeps_embeds``,
    what SGLang gives the draft of images is overwritten by then, or a row late.
    """
    global this
    run = Run.inherited()
    if run.nodes > 1:
        nodes.check_alike(run)
    model = worker.target_worker.model_runner.model
    processors = [m for m in model.modules() if isinstance(m, LogitsProcessor)]
    if not processors:
        raise RuntimeError(f"draft training: the target {type(model).__name__} has no LogitsProcessor to capture from")
    for processor in processors:
        keep_last_hidden(processor)

    exporter = copier = None
    if get_parallel().attn_tp_rank == 0:
        device = torch.device(worker.device)
        settings = run.settings
        ring = HostRing(_ring_bytes(run, worker.target_worker.model_runner.model_config), pinned=device.type == "cuda")
        max_bytes_s = settings.capture_max_mb_s and settings.capture_max_mb_s * (1 << 20)
        describe = partial(_Served, run=run, with_images=keeps_embeds)
        admission = Admission(ring, describe, settings.capture_sample, max_bytes_s)
        puller = Puller(settings.pull) if settings.pull else None
        exporter = Exporter(run.spans_endpoint, run.way_file, ring, admission, puller)
        copier = HostCopier(ring, device)
        exporter.start()
    bank = DraftBank(LiveDraft(worker, run.settings.bank_on, run.settings.bank_slots), run, replica)
    switch = None
    if run.settings.drafting != "always":
        switch = Switch(worker.speculative_num_steps)
        install(worker, switch)
    this = DraftTraining(run, bank, exporter, copier, switch)


def _ring_bytes(run: Run, target: Any) -> int:
    if run.settings.ring_mb is not None:
        return run.most_ring_bytes
    chunk = get_schedule().chunked_prefill_size or 0
    longest = chunk if chunk > 0 else target.context_len  # not positive: prompts are not cut
    row_bytes = coding.target_row_bytes(target.hidden_size, run.served_dtype, run.settings.capture_dtype)
    return min(max(_LEAST_RING_BYTES, _PASSES_HELD * longest * row_bytes), run.most_ring_bytes)


class _Served:
    """``export.admission.ServedRequest`` of SGLang's ``Req``."""

    __slots__ = ("_req", "alias", "cached_tokens", "is_counted", "prompt", "prompt_tokens", "refusal", "rid", "slice")

    def __init__(self, req: Any, run: Run, with_images: bool) -> None:
        said = asked(req)
        self.rid, self.alias, self._req = req.rid, run.alias(req.rid), req
        self.prompt_tokens, self.cached_tokens = len(req.origin_input_ids), req.cached_tokens
        self.prompt = images.prompt(req) if run.disaggregation == "decode" else ()
        label = said.get(SLICE_KEY) or ""
        self.slice = label[:_LONGEST_SLICE]
        self.is_counted, self.refusal = True, None
        if req.rid.startswith(HEALTH_CHECK_RID_PREFIX):
            self.is_counted, self.refusal = False, "health_check"
        elif req.lora_id is not None:
            self.refusal = "adapter"  # what an adapter computes is not the target's
        elif req.input_embeds is not None or (images.has_any(req) and not with_images):
            self.refusal = "not_text"  # the draft does not read there what follows the target's states
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
