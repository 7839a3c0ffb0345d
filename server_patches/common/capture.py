"""Reading target states after each pass of a scheduler process, and noting what every verification accepted.

Shapes: B requests, N rows, M of them of no token, D drafted tokens a request, R rows a request (longest path through a
draft tree), H hidden, F facts of a request (``entry.Verified``).
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from server_patches.common import images, outputs, process
from sglang_specforge.contracts import coding
from sglang_specforge.export.admission import Admitted
from sglang_specforge.export.entry import Prefilled, Verified


def around_prefill(original: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND what a worker does with prompts, which replaces ``batch.input_ids`` by the draft's."""
    tokens_N = batch.input_ids
    result = original(worker, batch, *args, **kwargs)
    _guarded(_capture_prefill, batch, result, tokens_N)
    return result


def after_verify(result: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``EAGLEWorkerV2.verify``."""
    if batch.forward_mode.is_idle():  # under DP attention a rank steps with the others, and may have no request
        return
    if result.accept_index.shape[1] > 1:  # drafting is on
        outputs.note(batch.reqs, process.this.bank.active_version)
    _guarded(_capture_verify, batch, result)


def _guarded(capture: Callable[..., None], batch: Any, *args: Any) -> None:
    """On the exporting rank, capture; whatever goes wrong ends capture, not the server."""
    exporter = process.this.exporter
    if exporter is None or exporter.failure is not None or batch.forward_mode.is_idle():
        return
    try:
        with exporter.timed():
            capture(batch, *args)
    except Exception as error:
        exporter.fail(error)


def _capture_prefill(batch: Any, result: Any, tokens_N: torch.Tensor) -> None:
    process.this.exporter.pace.interrupt()
    logits = result.logits_output
    states = {"aux_N3H": logits.hidden_states, "last_NH": logits.last_hidden_states}
    row_bytes, stand_ins = _row_bytes(states), _stand_ins(batch)
    nbytes = [row_bytes * length for length in batch.extend_lens]
    for b, found in stand_ins.items():
        nbytes[b] += len(found.rows) * _row_bytes({"embeds_MH": logits.mm_input_embeds})
    admitted = _pick(batch, nbytes)
    for _, one in admitted:
        one.enter(process.this.bank.window)
    picked = [b for b, one in admitted if one.left_out is None]
    if not picked:
        return
    embeds = {}
    if captured := [found for b, found in stand_ins.items() if b in picked]:
        shown, said = (np.concatenate(of_all) for of_all in list(zip(*captured, strict=True))[:2])
        shown_M, said_M = (_at_once(torch.from_numpy(numbers), tokens_N.device) for numbers in (shown, said))
        tokens_N, embeds = tokens_N.index_copy(0, shown_M, said_M), {"embeds_MH": logits.mm_input_embeds[shown_M]}
    if len(picked) < len(batch.reqs):
        rows = torch.zeros(len(batch.reqs), dtype=torch.bool)
        rows[picked] = True
        rows = _at_once(rows.repeat_interleave(torch.tensor(batch.extend_lens)).nonzero().flatten(), tokens_N.device)
        states, tokens_N = {name: state[rows] for name, state in states.items()}, tokens_N[rows]
    prefilled = [
        _prefilled(batch.reqs[b], batch.prefix_lens[b], batch.extend_lens[b], stand_ins.get(b)) for b in picked
    ]
    requests = [one.request for _, one in admitted if one.left_out is None]
    _capture(requests, states | embeds, prompt_tokens_N=tokens_N, prefilled=prefilled)


def _stand_ins(batch: Any) -> dict[int, images.StandIns]:
    """Of the pass's requests that have some in it, by their places in the batch."""
    if not any(map(images.has_any, batch.reqs)):
        return {}
    first_rows = accumulate(batch.extend_lens, initial=0)
    passes = zip(batch.reqs, batch.prefix_lens, batch.extend_lens, first_rows, strict=False)
    found = {b: images.stand_ins(req, *where) for b, (req, *where) in enumerate(passes) if images.has_any(req)}
    return {b: one for b, one in found.items() if len(one.rows)}


def _capture_verify(batch: Any, result: Any) -> None:
    """Rows of the accepted paths, the same number for every request."""
    B, R = result.accept_index.shape
    seconds = process.this.exporter.pace.lap(R > 1, B)
    drafted_BD = batch.spec_info.draft_token.view(B, -1)
    D, chain = drafted_BD.shape[1], batch.spec_info.topk == 1
    aux_N3H, last_NH = result.logits_output.hidden_states, result.logits_output.last_hidden_states
    admitted = _pick(batch, [R * _row_bytes({"aux_N3H": aux_N3H, "last_NH": last_NH})] * B)
    counted = [b for b, one in admitted if one.request.is_counted]
    window = process.this.bank.window
    standings = [one.verify_in(window) for _, one in admitted if one.request.is_counted] if window else ()
    picked = [b for b, one in admitted if one.left_out is None]
    if not counted:
        return
    facts, states = [batch.seq_lens[:, None], result.accept_lens[:, None], drafted_BD], {}
    if picked:
        if not chain:
            # SGLang has moved a tree's accepted path to the front of the aux states, but not of the last hidden states.
            path_BR = result.accept_index.long()
            path_BR = torch.where(path_BR < 0, path_BR[:, :1], path_BR)  # beyond the accepted: rows of its own
            aux_N3H, last_NH = aux_N3H.view(B, D, -1)[:, :R].flatten(0, 1), last_NH[path_BR.view(-1)]
            facts.append(drafted_BD.view(-1)[path_BR])
        if len(picked) < B:
            rows = _at_once(torch.tensor(picked), aux_N3H.device)
            aux_N3H, last_NH = (t.view(B, R, -1)[rows].flatten(0, 1) for t in (aux_N3H, last_NH))
        states = {"aux_N3H": aux_N3H, "last_NH": last_NH}
    facts_BF = torch.cat(facts, 1) if picked or R > 1 else None
    requests = [one.request for _, one in admitted if one.left_out is None]
    served = [one.request for _, one in admitted if one.request.is_counted]
    slices, prompts = [request.slice for request in served], [request.prompt_tokens for request in served]
    verified = Verified(B, R, chain, facts_BF, picked, counted, slices, prompts, window, standings, seconds)
    _capture(requests, states, verified=verified)


def _at_once(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, without waiting for what it is computing, as a copy of memory that is not pinned does."""
    return (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)


def note_abort(rid: str) -> None:
    """The one way to end for requests that are not running."""
    if process.this is not None and process.this.exporter is not None:
        process.this.exporter.admission.abort(rid)


def _pick(batch: Any, nbytes: list[int]) -> list[tuple[int, Admitted]]:
    """The pass's requests but those that were finished before it, each with its place in the batch."""
    alive = [b for b, req in enumerate(batch.reqs) if not req.finished()]
    admitted = process.this.exporter.admission.pick([batch.reqs[b] for b in alive], [nbytes[b] for b in alive])
    return list(zip(alive, admitted, strict=True))


def _row_bytes(states: dict[str, torch.Tensor]) -> int:
    return sum(coding.row_bytes(state, process.this.run.settings.capture_dtype) for state in states.values())


def _capture(requests: list[Any], states: dict[str, torch.Tensor], **facts: Any) -> None:
    states = {name: coding.pack(state, process.this.run.settings.capture_dtype) for name, state in states.items()}
    process.this.exporter.capture(process.this.copier.copy(requests, process.this.bank.active_version, states, **facts))


def _prefilled(req: Any, start: int, length: int, shown: images.StandIns | None) -> Prefilled:
    prefix = images.prompt(req, start) if start == req.cached_tokens else ()
    return Prefilled(start, length, prefix, shown.places.tobytes() if shown else b"")
