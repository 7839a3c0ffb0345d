"""Storing what a running server computes for prepared sequences.

Each sequence is sent as a prompt, and its states come over the stream that a trainer would read. A sequence whose
states do not all arrive is sent again.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

import httpx
import torch
import torch.nn.functional as F

from sglang_specforge.client import connection, failure, wait_until_captured
from sglang_specforge.contracts.control import TokenLedger
from sglang_specforge.contracts.frames import Expected
from sglang_specforge.contracts.spans import alias_in
from sglang_specforge.images import as_sent
from sglang_specforge.prepared import Prepared
from sglang_specforge.settings import Run
from trainer.assemble import Assembler
from trainer.inbox import Inbox
from trainer.offline.writer import DatasetWriter
from trainer.sample import Sample

_POLL_S = 0.1
_ARRIVES_WITHIN_S = 10.0  # states of an answered request
_TRIES = 3
_TIMEOUT_S = 600.0
_LONGEST = 1 << 24
_IMAGES_NEED = (
    "; images need a target that reads them (of Gemma 3 and Llama 4, SGLang does with --enable-multimodal alone), and "
    "SGLang 0.5.21 or newer"
)


@dataclass
class Report:
    stored: int = 0
    stored_tokens: int = 0
    there_already: int = 0
    sent_again: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # by reason


@dataclass
class _Sent:
    sequence: Prepared
    tries: int
    answer: Future
    answered_s: float | None = None


class Capture:
    """Keeps ``concurrency`` sequences under way at a server, and writes what comes back."""

    def __init__(
        self,
        url: str,
        api_key: str | None,
        control_key: str | None,
        run: Run,
        expected: Expected,
        writer: DatasetWriter,
        concurrency: int,
    ) -> None:
        self.report = Report()
        self._url, self._control_key = url, control_key
        self._writer, self._concurrency = writer, concurrency
        ledger = TokenLedger()
        self._alias = run.alias
        assembler = Assembler(ledger, _LONGEST, dtype=getattr(torch, run.served_dtype))
        self._inbox = Inbox(run.spans_endpoint, assembler, ledger, expected)
        self._client = httpx.Client(base_url=url, timeout=_TIMEOUT_S, **connection(api_key))
        self._under_way: dict[str, _Sent] = {}  # by the request's alias
        self._again: list[_Sent] = []

    def run(self, sequences: Iterable[Prepared], on_change: Callable[[Report], Any]) -> Report:
        """All of them but those stored already; what was written stays, however this ends.

        Raises:
            NotCaptured: the server's capture is paused, or has failed.
        """
        wanted = self._wanted(sequences)
        try:
            wait_until_captured(self._url, self._control_key)
            with ThreadPoolExecutor(self._concurrency) as pool:
                while self._send_more(pool, wanted) or self._under_way:
                    for sample in self._inbox.receive(_POLL_S):
                        self._store(sample)
                    self._look_after_answers()
                    on_change(self.report)
        finally:
            self._writer.flush()
            self._inbox.close()
            self._client.close()
        return self.report

    def _wanted(self, sequences: Iterable[Prepared]) -> Iterator[Prepared]:
        seen: set[str] = set()
        for sequence in sequences:
            if sequence.id in seen or sequence.id in self._writer.stored_ids:
                self.report.there_already += 1
            else:
                seen.add(sequence.id)
                yield sequence

    def _send_more(self, pool: ThreadPoolExecutor, wanted: Iterator[Prepared]) -> bool:
        """Fill up what is under way; returns whether anything was sent."""
        sent = False
        while len(self._under_way) < self._concurrency:
            if self._again:
                last = self._again.pop()
                sequence, tries = last.sequence, last.tries + 1
            elif (sequence := next(wanted, None)) is not None:
                tries = 1
            else:
                break
            rid = f"{sequence.id[:32]}-{tries}"
            self._under_way[self._alias(rid)] = _Sent(sequence, tries, pool.submit(self._ask, rid, sequence))
            sent = True
        return sent

    def _ask(self, rid: str, sequence: Prepared) -> None:
        # A key of its own keeps the prefix cache out: every position is computed, so every position is captured.
        body = {
            "rid": rid, "input_ids": sequence.input_ids, "image_data": as_sent(sequence.images) or None,
            "extra_key": rid, "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        }  # fmt: skip
        self._client.post("/generate", json=body).raise_for_status()

    def _store(self, sample: Sample) -> None:
        alias = alias_in(sample.rid)
        sent = self._under_way.get(alias)
        if sent is None:
            return  # another client's request
        sequence = sent.sequence
        if sequence.images and not sample.start and not len(sample.embeds_MH):
            self._retry(alias, "the server read none of its images" + _IMAGES_NEED, tries=1)
            return
        mask = None if sample.start else mask_of(sequence, sample.tokens_T.tolist())
        if mask is None:
            self._retry(alias, "its states came incomplete, or of other tokens")
            return
        generated_T = F.pad(torch.tensor(mask[1:]), (0, 1))
        self._writer.add(sequence.id, sample.rows, generated_T, slice=sequence.slice)
        self.report.stored += 1
        self.report.stored_tokens += len(sample)
        del self._under_way[alias]

    def _look_after_answers(self) -> None:
        now_s = time.monotonic()
        for alias, sent in list(self._under_way.items()):
            if not sent.answer.done():
                continue
            if error := sent.answer.exception():
                refused = isinstance(error, httpx.HTTPStatusError) and error.response.is_client_error
                self._retry(alias, failure(error), tries=1 if refused else _TRIES)
            elif sent.answered_s is None:
                sent.answered_s = now_s
            elif now_s - sent.answered_s > _ARRIVES_WITHIN_S:
                self._retry(alias, "its states did not arrive" + (_IMAGES_NEED if sent.sequence.images else ""))

    def _retry(self, alias: str, reason: str, tries: int = _TRIES) -> None:
        sent = self._under_way.pop(alias)
        if sent.tries < tries:
            self.report.sent_again += 1
            self._again.append(sent)
        else:
            self.report.failed[reason] += 1


def mask_of(sequence: Prepared, captured: list[int]) -> list[bool] | None:
    """The loss mask on the tokens that were captured; None where they are others than the sequence's.

    Of one that shows images, the target read no tokens there, or some that its processor put around them; and SGLang
    has some processors make tokens of its text anew, so that an answer's may be others: they are learnt all the same.
    """
    ids, mask = sequence.input_ids, sequence.loss_mask
    if not sequence.images:
        return mask if ids == captured else None
    found = [False] * len(captured)
    for kind, *at in SequenceMatcher(None, ids, captured, autojunk=False).get_opcodes():
        own, theirs = slice(*at[:2]), slice(*at[2:])
        if kind == "equal":
            found[theirs] = mask[own]
        elif any(mask[own]):
            if not all(mask[own]) or min(captured[theirs], default=-1) < 0:
                return None
            found[theirs] = [True] * len(captured[theirs])
    return found
