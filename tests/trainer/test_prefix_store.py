"""Prefixes that a server cached: what comes back, bit by bit, and what is forgotten first."""

import os
import random
import resource

import pytest
import torch

from sglang_specforge.contracts.control import TokenLedger
from sglang_specforge.contracts.spans import Captured, Finished, Span
from trainer.assemble import Assembler
from trainer.prefix_store import BLOCK, PrefixStore, block_bytes
from trainer.rows import Rows
from trainer.spill import Spill

H = 2
BLOCK_BYTES = block_bytes(H, torch.float32)


def rows_of(tokens_T):
    """What a target computes: every position's states depend on all tokens up to it. Below zero, it reads an image."""
    seen_T = (tokens_T * torch.arange(1, len(tokens_T) + 1)).cumsum(0).float()
    aux_T3H, last_TH = seen_T[:, None].repeat(1, 3 * H), seen_T[:, None].repeat(1, H) + 0.5
    shown_TH = last_TH[tokens_T < 0]
    return Rows(tokens_T, aux_T3H, last_TH, shown_TH + 0.25, shown_TH[:, :1].int().repeat(1, 3))


def tokens(length, seed, begins=(), least=0):
    g = torch.Generator().manual_seed(seed)
    after = torch.randint(least, 1000, (length - len(begins),), generator=g)
    return torch.cat([torch.as_tensor(begins, dtype=torch.int64), after])


def put(store, tokens_T, first=0):
    store.put(tokens_T, first, rows_of(tokens_T).pick(slice(first, None)))


def assert_equal(found, expected):
    for name, tensor in expected._asdict().items():
        assert torch.equal(getattr(found, name), tensor), name


def assert_restored(store, prefix_T, start):
    found = store.restore(prefix_T)
    if start == len(prefix_T):
        assert found is None
        return
    assert found.start == start
    assert_equal(found.rows, rows_of(prefix_T).pick(slice(start, None)))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 200])
def test_any_length_of_what_was_put_comes_back(length):
    store = PrefixStore("target", 1 << 20)
    put(store, tokens(200, 0))
    assert_restored(store, tokens(200, 0)[:length], 0)
    assert store.counts.restored_tokens == length
    assert store.counts.whole_prefixes == store.counts.prefixes == 1


def test_a_sequence_that_began_in_the_middle_of_a_block_is_joined_to_what_came_before():
    store, system = PrefixStore("target", 1 << 20), tokens(100, 0)
    put(store, tokens(150, 1, system))
    longer = tokens(300, 2, system)
    put(store, longer, first=100)  # the server had the first 100 cached
    assert_restored(store, longer[:290], 0)


def test_without_its_beginning_a_block_is_not_made_up_and_what_lies_after_a_hole_still_serves():
    store, sequence = PrefixStore("target", 1 << 20), tokens(300, 0)
    put(store, sequence, first=100)
    assert_restored(store, sequence, 128)
    assert (store.counts.missing_tokens, store.counts.whole_prefixes) == (128, 0)


def test_another_sequence_or_another_target_gets_nothing():
    store = PrefixStore("target", 1 << 20)
    put(store, tokens(100, 0))
    assert_restored(store, tokens(80, 1, tokens(64, 0)[:63]), 80)
    assert_restored(store, tokens(100, 3), 100)


def test_a_short_end_gives_way_to_a_longer_block():
    store, sequence = PrefixStore("target", 1 << 20), tokens(64, 0)
    put(store, sequence[:30])
    first = store.counts.stored_bytes
    put(store, sequence[:50], first=30)
    assert store.counts.stored_bytes == first * 50 / 30
    assert_restored(store, sequence[:20], 0)


def test_memory_is_bounded_and_the_ends_of_what_was_used_least_recently_go_first():
    store = PrefixStore("target", 0)
    put(store, tokens(640, 0))
    assert store.counts.stored_bytes == 0
    store = PrefixStore("target", 10 * (BLOCK_BYTES + 8 * BLOCK))
    put(store, tokens(320, 0))
    put(store, tokens(320, 1))
    assert_restored(store, tokens(320, 0), 0)
    put(store, tokens(128, 2))
    assert store.counts.evicted_blocks == 2
    assert_restored(store, tokens(320, 0), 0)
    assert_restored(store, tokens(320, 1)[:192], 0)  # its last two blocks are gone
    assert_restored(store, tokens(320, 1), 320)


def test_what_memory_has_no_room_for_comes_back_from_the_disk(tmp_path):
    store = PrefixStore("target", 10 * (BLOCK_BYTES + 8 * BLOCK), Spill(tmp_path, 20 * BLOCK_BYTES, BLOCK_BYTES))
    for seed in range(5):
        put(store, tokens(380, seed))
    assert (store.counts.stored_bytes // BLOCK_BYTES, store.counts.spilled_bytes) == (11, 20 * BLOCK_BYTES)
    assert store.counts.evicted_blocks == 0
    assert list(tmp_path.iterdir()) == []  # nobody finds it by name, and a killed process leaves nothing
    for seed in range(5):
        assert_restored(store, tokens(380, seed), 0)
    put(store, tokens(128, 5))
    assert store.counts.evicted_blocks == 2
    assert_restored(store, tokens(380, 0)[:256], 0)  # its last two blocks were the first to go
    assert_restored(store, tokens(380, 0), 380)
    longer = tokens(500, 6, tokens(330, 1))
    put(store, longer, first=330)  # goes on from a block on disk
    assert_restored(store, longer, 0)


def test_bfloat16_comes_back_from_the_disk_bit_by_bit(tmp_path):
    store = PrefixStore("target", 1, Spill(tmp_path, 1 << 20, block_bytes(H, torch.bfloat16)))
    rows = Rows.of_text(tokens(100, 0), torch.randn(100, 3 * H).bfloat16(), torch.randn(100, H).bfloat16())
    store.put(rows.tokens_N, 0, rows)
    found = store.restore(rows.tokens_N)
    assert store.counts.stored_bytes == 0
    assert_equal(found.rows, rows)


def test_a_block_that_is_larger_than_a_slot_leaves_for_good(tmp_path):
    store = PrefixStore("target", 1, Spill(tmp_path, 1 << 20, BLOCK_BYTES))
    put(store, tokens(2 * BLOCK, 0, tokens(BLOCK, 1), least=-900))
    assert (store.counts.spilled_bytes, store.counts.evicted_blocks) == (BLOCK_BYTES, 1)
    assert store.counts.unspilled_blocks == 0


@pytest.fixture
def full_disk():
    """Files of this process may not grow past ten blocks, until the test says so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * BLOCK_BYTES, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_the_blocks_that_it_does_not_take_and_is_said_once(tmp_path, full_disk, caplog):
    store = PrefixStore("target", BLOCK_BYTES + 8 * BLOCK, Spill(tmp_path, 1 << 20, BLOCK_BYTES))
    put(store, tokens(20 * BLOCK, 0))
    assert store.counts.spilled_bytes == 10 * BLOCK_BYTES
    assert store.counts.unspilled_blocks == store.counts.evicted_blocks == 9
    assert len(caplog.records) == 1
    assert "cannot be spilled" in caplog.text
    full_disk()
    put(store, tokens(5 * BLOCK, 1))
    assert store.counts.unspilled_blocks == 9
    assert_restored(store, tokens(5 * BLOCK, 1), 0)


def test_a_block_that_the_disk_does_not_give_back_is_a_hole(tmp_path):
    spill = Spill(tmp_path, 1 << 20, BLOCK_BYTES)
    store = PrefixStore("target", BLOCK_BYTES + 8 * BLOCK, spill)
    put(store, tokens(4 * BLOCK, 0))
    os.ftruncate(spill._file.fileno(), 2 * BLOCK_BYTES)  # of three: the ends of what is used went out first
    assert_restored(store, tokens(4 * BLOCK, 0), 2 * BLOCK)
    assert store.counts.unspilled_blocks == 1
    put(store, tokens(4 * BLOCK, 0))
    assert_restored(store, tokens(4 * BLOCK, 0), 0)


@pytest.mark.parametrize("least", [0, -300], ids=["text", "images"])
@pytest.mark.parametrize("spilled_bytes", [0, 40_000])
def test_any_traffic_with_any_cache_is_restored_bit_by_bit_or_left_out(tmp_path, spilled_bytes, least):
    slot_bytes = block_bytes(H, torch.float32, with_embeds=least < 0)
    spill = Spill(tmp_path, spilled_bytes, slot_bytes) if spilled_bytes else None
    rng, store = random.Random(0), PrefixStore("target", 60_000, spill)
    known = [tokens(300, 0)]
    put(store, known[0])
    for seed in range(1, 400):
        parent = rng.choice(known[-60:])
        cached = rng.randrange(1, len(parent) + 1)
        sequence = tokens(cached + rng.randrange(1, 100), seed, parent[:cached], least)
        found = store.restore(sequence[:cached])
        if found is not None:
            assert_equal(found.rows, rows_of(sequence[:cached]).pick(slice(found.start, None)))
        put(store, sequence, first=cached)
        known.append(sequence)
    counts = store.counts
    assert 0 < counts.stored_bytes <= 60_000
    assert (0 < counts.spilled_bytes <= spilled_bytes) if spill else not counts.spilled_bytes
    assert counts.evicted_blocks > 0
    assert 50 < counts.whole_prefixes < counts.prefixes == 399


def serve(assembler, rid, sequence, cached, prompt, total=None):
    """One request: its first pass, one verification for the rest, its end."""
    rows, prefix = rows_of(sequence), sequence[:cached].numpy().tobytes()

    def send(start, end, **more):
        span = Span(rid, start, end - start, 0, prompt, cached, **more)
        assert assembler.add(Captured("s", 0, 0, [span], []), rows.pick(slice(start, end))._asdict()) == []

    send(cached, prompt, prefix=prefix)
    yield
    send(prompt, len(sequence), proposed=1)
    yield
    yield assembler.add(Finished("s", 0, rid, total or len(sequence) + 1, False), {})


@pytest.mark.parametrize("least", [0, -300], ids=["text", "images"])
def test_a_sample_is_completed_by_a_request_that_has_not_ended_yet(least):
    ledger = TokenLedger()
    assembler = Assembler(ledger, 1000, PrefixStore("target", 1 << 20))
    system = tokens(100, 0, least=least)
    first, second = tokens(150, 1, system), tokens(200, 2, system)
    open_request, other = serve(assembler, "a", first, 0, 130), serve(assembler, "b", second, 100, 150)
    next(open_request)
    *_, [sample] = other
    assert (sample.start, sample.restored, sample.captured) == (0, 100, 100)
    assert_equal(sample.rows, rows_of(second))
    assert sample.generated_T.nonzero().flatten().tolist() == list(range(149, 200))
    assert sample.rejected_T.tolist() == [-1] * 200
    assert ledger.dropped == {}


def test_context_that_does_not_fit_is_left_out_before_what_was_captured():
    assembler = Assembler(TokenLedger(), 120, PrefixStore("target", 1 << 20))
    system = tokens(100, 0)
    [*_] = serve(assembler, "a", tokens(110, 1, system), 0, 105)
    second = tokens(180, 2, system)
    *_, [sample] = serve(assembler, "b", second, 100, 150)
    assert (sample.start, len(sample), sample.captured) == (60, 120, 80)
    assert_equal(sample.rows, rows_of(second).pick(slice(60, None)))


def test_a_prompt_that_another_server_computed_is_joined_to_its_answer():
    prefixes, ledgers = PrefixStore("target", 1 << 20), (TokenLedger(), TokenLedger())
    prefill, decode = Assembler(ledgers[0], 500, prefixes, prompts_only=True), Assembler(ledgers[1], 500, prefixes)
    sequence = tokens(150, 1)

    def send(assembler, start, end, **more):
        rows = rows_of(sequence).pick(slice(start, end))._asdict()
        assembler.add(Captured("s", 0, 0, [Span("a", start, end - start, 0, 100, 0, **more)], []), rows)

    send(prefill, 0, 100)
    send(decode, 100, 150, proposed=1, prefix=sequence[:100].numpy().tobytes())
    assert prefill.add(Finished("s", 0, "a", 101, False), {}) == []
    assert ledgers[0].dropped == {"kept_as_prefix": 100}
    [sample] = decode.add(Finished("s", 0, "a", 151, False), {})
    assert (sample.start, sample.restored, sample.captured) == (0, 100, 50)
    assert_equal(sample.rows, rows_of(sequence))
    assert sample.generated_T.nonzero().flatten().tolist() == list(range(99, 150))  # its first row is the prompt's last
    assert ledgers[1].dropped == {}


def test_what_is_not_known_is_counted_and_the_sample_is_trained_on_from_where_it_is():
    prefixes = PrefixStore("target", 1 << 20)
    *_, [sample] = serve(Assembler(TokenLedger(), 500, prefixes), "a", tokens(150, 1), 100, 130)
    assert (sample.start, sample.restored, len(sample)) == (100, 0, 50)
    assert (prefixes.counts.prefixes, prefixes.counts.missing_tokens) == (1, 100)
