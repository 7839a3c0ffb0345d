"""Spans into samples: order, repeats, holes, ends, and an account of every token."""

import pytest
import torch

from sglang_specforge.contracts.control import TokenLedger
from sglang_specforge.contracts.spans import Captured, Finished, Span
from trainer.assemble import Assembler
from trainer.prefix_store import BLOCK, PrefixStore

STREAM = "s"


def rows(start, length, tag=0):
    position = torch.arange(start, start + length)
    return {
        "aux_N3H": (position[:, None] * 10 + tag + torch.zeros(1, 6)).float(),
        "last_NH": (position[:, None] + torch.zeros(1, 2)).float(),
        "tokens_N": position + 100,
    }


def capture(assembler, start, length, *, rid="a", prompt=4, version=0, tag=0, proposed=-1):
    span = Span(rid, start, length, 0, prompt, 0, proposed)
    assert assembler.add(Captured(STREAM, 0, version, [span], []), rows(start, length, tag)) == []
    return length


def finish(assembler, total, rid="a"):
    return assembler.add(Finished(STREAM, 0, rid, total, False), {})


def make(max_tokens=100):
    ledger = TokenLedger()
    return Assembler(ledger, max_tokens), ledger


def test_chunks_and_verify_passes_become_one_sample():
    assembler, ledger = make()
    captured = capture(assembler, 0, 3) + capture(assembler, 3, 1) + capture(assembler, 4, 2, proposed=7)
    assert assembler.open_tokens == captured
    (sample,) = finish(assembler, 6)
    assert sample.tokens_T.tolist() == [100, 101, 102, 103, 104, 105]
    assert sample.aux_T3H[:, 0].tolist() == [0, 10, 20, 30, 40, 50]
    assert (sample.start, sample.draft_version) == (0, 0)
    # The token after row 5 was never produced.
    assert sample.generated_T.nonzero().flatten().tolist() == [3, 4]
    assert sample.proposals == [(4, 7)]
    assert assembler.open_tokens == 0
    assert ledger.dropped == {}


def test_what_was_proposed_after_a_step_without_drafting_is_not_compared():
    assembler, _ = make()
    capture(assembler, 0, 4)
    for start, proposed in ((4, 7), (5, -1), (6, 8)):  # the draft's keys of position 5 may be missing in the server
        capture(assembler, start, 1, proposed=proposed)
    (sample,) = finish(assembler, 7)
    assert sample.proposals == [(4, 7)]


def test_the_newest_capture_of_a_position_wins():
    assembler, ledger = make()
    captured = capture(assembler, 0, 4) + capture(assembler, 4, 3) + capture(assembler, 2, 4, tag=1)
    (sample,) = finish(assembler, 7)
    assert sample.aux_T3H[:, 0].tolist() == [0, 10, 21, 31, 41, 51, 60]
    assert ledger.dropped == {"repeated": 4}
    assert captured == len(sample) + 4


def test_positions_beyond_the_end_are_no_part_of_it():
    assembler, ledger = make()
    capture(assembler, 0, 4)
    capture(assembler, 4, 4)
    (sample,) = finish(assembler, 6)
    assert len(sample) == 6
    assert ledger.dropped == {"past_finish": 2}
    capture(assembler, 8, 3)  # a pass that was already running when the request ended
    assert ledger.dropped == {"past_finish": 5}
    assert assembler.open_tokens == 0


def test_a_request_that_was_cut_short_is_dropped_whole():
    assembler, ledger = make()
    capture(assembler, 0, 4)
    assert assembler.add(Finished(STREAM, 0, "a", 0, False, cut_short=True), {}) == []
    assert ledger.dropped == {"cut_short": 4}
    assert assembler.open_tokens == 0


def test_a_hole_ends_the_sample():
    assembler, ledger = make()
    capture(assembler, 0, 4)
    capture(assembler, 6, 3)
    (sample,) = finish(assembler, 9)
    assert len(sample) == 4
    assert ledger.dropped == {"gap": 3}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["aux_N3H", "last_NH"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_that_are_not_finite_are_a_hole_and_stay_out_of_the_prefix_store(name, value, dtype):
    ledger, prefixes = TokenLedger(), PrefixStore("t", 1 << 20)
    assembler = Assembler(ledger, 1000, prefixes)
    length, prompt = 2 * BLOCK, 3 * BLOCK
    for start in (0, length, 2 * length):
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in rows(start, length).items()}
        if start == length:
            tensors[name][7, 1] = value
        assembler.add(Captured(STREAM, 0, 0, [Span("a", start, length, 0, prompt, 0, -1)], []), tensors)
    (sample,) = finish(assembler, 3 * length)
    assert (sample.start, len(sample)) == (0, length)
    assert ledger.dropped == {"not_finite": length, "gap": length}
    found = prefixes.restore(torch.arange(100, 100 + prompt))
    assert found is None or (found.rows.are_finite() and found.start + len(found.rows.tokens_N) <= length)
    assert sample.rows.are_finite()


def test_answers_that_are_not_finite_end_the_sample_row_by_row():
    assembler, ledger = make()
    capture(assembler, 0, 4)
    spoilt = rows(4, 4)
    spoilt["last_NH"][2, 1] = torch.nan
    for start, tensors in ((4, spoilt), (8, rows(8, 2))):
        length = len(tensors["tokens_N"])
        assembler.add(Captured(STREAM, 0, 0, [Span("a", start, length, 0, 4, 0, 7)], []), tensors)
    (sample,) = finish(assembler, 10)
    assert sample.tokens_T.tolist() == list(range(100, 106))
    assert sample.proposals == [(4, 7)]
    assert ledger.dropped == {"not_finite": 1, "gap": 3}
    capture(assembler, 0, 1, rid="b", prompt=1)
    assembler.add(Captured(STREAM, 0, 0, [Span("b", 1, 4, 0, 1, 0, 7)], []), spoilt)
    assert len(finish(assembler, 5, rid="b")[0]) == 3
    spoilt["aux_N3H"][0, 0] = torch.inf
    assembler.add(Captured(STREAM, 0, 0, [Span("c", 4, 4, 0, 4, 4, 7)], []), spoilt)
    assert finish(assembler, 8, rid="c") == []
    assert ledger.dropped == {"not_finite": 4, "gap": 6}


def test_samples_keep_what_came_when_its_memory_is_used_again():
    """That of the message, the exporter's; and that of the request, which the next one's rows are gathered in."""
    assembler, _ = make(max_tokens=1000)
    samples = []
    for rid in "abc":
        for start in range(0, 200, 5):
            tensors = rows(start, 5, tag=ord(rid))
            assembler.add(Captured(STREAM, 0, 0, [Span(rid, start, 5, 0, 4, 0, -1)], []), tensors)
            for tensor in tensors.values():
                tensor.fill_(-1)
        samples += finish(assembler, 200, rid=rid)
    for rid, sample in zip("abc", samples, strict=True):
        wanted = rows(0, 200, tag=ord(rid))
        assert torch.equal(sample.aux_T3H, wanted["aux_N3H"]), rid
        assert torch.equal(sample.last_TH, wanted["last_NH"])
        assert torch.equal(sample.tokens_T, wanted["tokens_N"])


def test_what_was_overwritten_while_it_was_read_is_no_part_of_a_sample():
    assembler, ledger = make()
    capture(assembler, 0, 4)
    overwritten = Captured(STREAM, 0, 0, [Span("a", 4, 3, 0, 4, 0), Span("b", 0, 3, 0, 4, 0)], [])
    assert assembler.add(overwritten, rows(4, 6, tag=5), lambda: False) == []
    capture(assembler, 4, 2)
    (sample,) = finish(assembler, 6)
    assert sample.aux_T3H[:, 0].tolist() == [0, 10, 20, 30, 40, 50]
    assert ledger.dropped == {"overwritten": 6}
    assert finish(assembler, 3, rid="b") == []
    assert assembler.open_tokens == 0


def test_a_cached_prefix_is_where_the_sample_starts():
    assembler, _ = make()
    capture(assembler, 16, 4, prompt=20)
    (sample,) = finish(assembler, 20)
    assert sample.start == 16
    assert sample.tokens_T.tolist() == [116, 117, 118, 119]


def test_long_and_short_requests_are_counted():
    assembler, ledger = make(max_tokens=5)
    capture(assembler, 0, 8)
    (sample,) = finish(assembler, 8)
    assert len(sample) == 5
    assert ledger.dropped == {"too_long": 3}
    capture(assembler, 0, 1, rid="b")
    assert finish(assembler, 1, rid="b") == []
    assert ledger.dropped == {"too_long": 3, "too_short": 1}


def test_requests_do_not_mix_and_versions_are_told_apart():
    assembler, _ = make()
    capture(assembler, 0, 4, rid="a", version=1)
    capture(assembler, 0, 4, rid="b", version=1)
    capture(assembler, 4, 2, rid="a", version=2)
    (b,) = finish(assembler, 4, rid="b")
    (a,) = finish(assembler, 6, rid="a")
    assert (b.rid, b.draft_version) == ("b", 1)
    assert (a.rid, a.draft_version) == ("a", None)


def test_a_request_whose_end_was_lost_is_given_up():
    ledger = TokenLedger()
    assembler = Assembler(ledger, 100, abandoned_after_s=0)
    capture(assembler, 0, 4)
    assembler.expire()
    assert ledger.dropped == {"abandoned": 4}
    assert assembler.open_tokens == 0


def test_the_end_of_an_unknown_request_is_nothing():
    assembler, ledger = make()
    assert finish(assembler, 4, rid="never seen") == []
    assert ledger.dropped == {}
