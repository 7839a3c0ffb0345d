"""Which requests are captured: whole ones, within the limits, by a draw that is fair and does not flap."""

import random
from dataclasses import dataclass
from typing import ClassVar

import pytest

from sglang_specforge.export.admission import Admission
from sglang_specforge.export.ring import HostRing


@dataclass
class Request:
    rid: str
    passes: int = 1
    ended: bool = False
    refusal: str | None = None
    is_counted: bool = True
    alias: str = ""

    def __post_init__(self):
        self.alias = self.rid

    def is_finished(self):
        return self.ended

    def is_aborted(self):
        return False

    def total_tokens(self):
        return 1


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def admission(clock, ring_bytes=1 << 20, **limits):
    made = Admission(HostRing(ring_bytes, pinned=False), lambda request: request, **limits, seed=0, clock=clock)
    made.closed = None
    return made


def pick(made, requests, nbytes):
    return [admitted.left_out is None for admitted in made.pick(requests, nbytes)]


def numbered(count, passes=1):
    return [Request(str(i), passes) for i in range(count)]


def serve(made, clock, seconds, running=16, passes=100, nbytes=1024, step_s=0.01, seed=0):
    """A server that is always busy: returns its requests, and the bytes captured in each second."""
    rng, requests, by_second = random.Random(seed), [], []

    def arrive():
        requests.append(Request(str(len(requests)), rng.randrange(1, 2 * passes)))
        return requests[-1]

    busy, begun_s = [arrive() for _ in range(running)], clock.now_s
    while clock.now_s < begun_s + seconds:
        clock.now_s += step_s
        picked = pick(made, busy, [nbytes] * running)
        second = int(clock.now_s - begun_s)
        by_second += [0] * (second + 1 - len(by_second))
        by_second[second] += nbytes * sum(picked)
        for request in busy:
            request.passes -= 1
            request.ended = request.passes == 0
        busy = [arrive() if request.ended else request for request in busy]
        made.take_ended()
    return requests, by_second


def test_everything_is_captured_without_limits(clock):
    made = admission(clock)
    requests, _ = serve(made, clock, 20)
    assert made.status()["requests"] == {
        "seen": len(requests),
        "captured": len(requests),
        "cut_short": 0,
        "left_out": {},
    }
    assert not made.cut


def test_a_sample_is_that_share_of_whole_requests(clock):
    made = admission(clock, sample=0.25)
    requests = numbered(4000)
    first = pick(made, requests, [8] * 4000)
    assert 0.23 < sum(first) / 4000 < 0.27
    assert pick(made, requests, [8] * 4000) == first  # the same ones, pass after pass
    assert made.status()["requests"]["left_out"] == {"sampled_out": 4000 - sum(first)}
    assert made.status()["requests"]["cut_short"] == 0


@pytest.mark.parametrize("times_over", [1.5, 4, 12])
def test_the_budget_is_kept_and_used_without_flapping(clock, times_over):
    demand = 64 * 1024 / 0.01
    budget = demand / times_over
    made = admission(clock, max_bytes_s=budget)
    _, by_second = serve(made, clock, 300, running=64)
    counts = made.status()["requests"]
    assert sum(by_second) <= 1.02 * budget * 300
    assert sum(by_second[10:]) >= 0.6 * budget * 290
    assert counts["seen"] == counts["captured"] + sum(counts["left_out"].values())
    assert set(counts["left_out"]) == {"over_budget"}
    assert counts["cut_short"] <= 0.25 * counts["captured"]
    assert len(made.cut) == counts["cut_short"]


def test_the_draw_does_not_care_when_a_request_came(clock):
    """Under one load above the budget, early and late requests are captured alike."""
    made = admission(clock, max_bytes_s=16 * 1024 / 0.01 / 4)
    shares = []
    for _ in range(4):
        before = made.status()["requests"]
        serve_more(made, clock)
        after = made.status()["requests"]
        shares.append((after["captured"] - before["captured"]) / (after["seen"] - before["seen"]))
    assert max(shares) - min(shares) < 0.1, shares


def serve_more(made, clock):
    serve(made, clock, 120, seed=int(clock.now_s))


def test_a_full_ring_cuts_the_largest_draws_until_the_pass_fits_and_recovers(clock):
    made = admission(clock, ring_bytes=1024)
    held = made._ring.reserve(512)
    requests = numbered(16)
    picked = pick(made, requests, [64] * 16)
    assert sum(picked) == 8
    drawn = {one.request.rid: one.drawn for one in made._requests.values()}
    inside = [drawn[r.rid] for r, taken in zip(requests, picked, strict=True) if taken]
    outside = [drawn[r.rid] for r, taken in zip(requests, picked, strict=True) if not taken]
    assert max(inside) < min(outside)
    assert made.status()["requests"]["left_out"] == {"ring_full": 8}
    assert pick(made, requests, [64] * 16) == picked  # those that stay are whole, those that went stay away

    made._ring.release(held)
    clock.now_s += 60
    assert all(pick(made, [Request("later")], [64]))
    assert made.share == 1


def test_a_request_that_can_never_fit_takes_nothing_from_the_others(clock):
    made = admission(clock, ring_bytes=1024)
    assert pick(made, numbered(4), [64, 4096, 64, 64]) == [True, False, True, True]
    assert made.share == 1
    assert made.status()["requests"]["left_out"] == {"larger_than_ring": 1}


def test_who_is_refused_stays_out_and_health_checks_are_not_even_counted(clock):
    made = admission(clock)
    asked = [Request("a", refusal="opted_out"), Request("b", refusal="health_check", is_counted=False), Request("c")]
    assert pick(made, asked, [8] * 3) == [False, False, True]
    assert made.status()["requests"] == {"seen": 2, "captured": 1, "cut_short": 0, "left_out": {"opted_out": 1}}


def test_requests_are_captured_whole_or_not_at_all_when_the_reader_comes_and_goes(clock):
    made = admission(clock)
    made.closed = "nobody_listening"
    early, late = Request("early"), Request("late")
    assert pick(made, [early], [8]) == [False]
    made.closed = None
    assert pick(made, [early, late], [8, 8]) == [False, True]
    made.closed = "nobody_listening"
    assert pick(made, [early, late], [8, 8]) == [False, False]
    assert list(made.cut) == ["late-2"]
    made.closed = None
    assert pick(made, [early, late], [8, 8]) == [False, False]


def test_ends_are_told_once_and_nothing_is_remembered(clock):
    made = admission(clock)
    running, aborted, done = Request("running"), Request("aborted"), Request("done", ended=True)
    pick(made, [running, aborted, done], [8] * 3)
    made.abort("aborted")
    made.abort("unknown")
    assert {a.request.rid for a in made.take_ended()} == {"aborted", "done"}
    assert made.take_ended() == []
    assert [one.request.rid for one in made._requests.values()] == ["running"]


def test_an_id_that_is_given_again_at_once_is_another_request(clock):
    made = admission(clock)
    first, second = Request("chat"), Request("chat")
    pick(made, [first], [8])
    first.ended = True
    pick(made, [second], [8])
    assert [(one.request, one.has_ended) for one in made.pick([second], [8])] == [(second, False)]
    assert first.alias != second.alias
    assert [one.request for one in made.take_ended()] == [first]
    assert made.status()["requests"]["captured"] == 2


def test_a_reader_that_comes_in_the_middle_of_a_pass_changes_the_next_one(clock):
    class ClosedWhenFirstAsked(Admission):
        """Of the reasons, the next one each time that it is asked for; then it is open."""

        reasons: ClassVar[list[str]] = []
        closed = property(lambda self: self.reasons.pop() if self.reasons else None, lambda self, value: None)

    made = ClosedWhenFirstAsked(HostRing(1 << 20, pinned=False), lambda request: request, seed=0, clock=clock)
    (request,) = numbered(1)
    assert pick(made, [request], [100]) == [True]
    made.reasons.append("nobody_listening")
    assert pick(made, [request], [100]) == [False]
    assert made.status()["requests"]["left_out"] == {"nobody_listening": 1}
    assert list(made.cut) == ["0-1"]
    made.reasons.append("nobody_listening")
    late = Request("late")
    assert pick(made, [late], [100]) == [False]
    assert made.status()["requests"]["left_out"] == {"nobody_listening": 2}
