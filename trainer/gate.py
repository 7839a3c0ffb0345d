"""Whether a candidate is better than the served draft, on held-out samples that neither learnt from."""

import statistics
from collections import defaultdict
from collections.abc import Sequence

from scipy.special import stdtrit

from sglang_specforge.contracts.control import Verdict
from trainer.evaluate import Simulated

Judged = list[tuple[str, Simulated]]  # of each sample, its slice and what it would have committed
_FEWEST = 4  # samples of which anything is said


def compare(candidate: Judged, served: Judged, confidence: float, most_slice_loss: float) -> Verdict:
    """Sample by sample, the same ones in the same order.

    The candidate passes where the lower ``confidence`` bound of its mean gain (one-sided paired t) is above zero, and
    no slice of four samples or more loses more than the share ``most_slice_loss`` of its acceptance length.
    """
    lengths = [
        (name, new.length, old.length)
        for (name, new), (_, old) in zip(candidate, served, strict=True)
        if new.length is not None and old.length is not None
    ]
    gains = [new - old for _, new, old in lengths]
    if len(gains) < _FEWEST:
        return Verdict(samples=len(gains), passed=False, why=f"{len(gains)} held-out samples are too few to judge by")
    gain = statistics.fmean(gains)
    t = float(stdtrit(len(gains) - 1, confidence))  # importing scipy.stats, for the same, takes a second
    low = gain - t * statistics.stdev(gains, gain) / len(gains) ** 0.5
    slices = _by_slice(lengths)
    worst = min(slices, key=slices.get, default=None)
    why = f"{gain:+.3f} tokens a verification, at least {low:+.3f}, on {len(gains)} held-out samples"
    if low <= 0:
        why = f"not clearly better: {why}"
    elif worst is not None and slices[worst] < -most_slice_loss:
        why = f"slice {worst!r} loses {-slices[worst]:.1%}; overall {why}"
    passed = low > 0 and (worst is None or slices[worst] >= -most_slice_loss)
    length = statistics.fmean(old for _, _, old in lengths)
    return Verdict(samples=len(gains), gain=gain, low=low, served=length, slices=slices, passed=passed, why=why)


def _by_slice(lengths: Sequence[tuple[str, float, float]]) -> dict[str, float]:
    """Relative gain of each slice with a name."""
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, new, old in lengths:
        if name:
            pairs[name].append((new, old))
    sums = {name: [sum(column) for column in zip(*own, strict=True)] for name, own in pairs.items()}
    return {name: new / old - 1 for name, (new, old) in sums.items() if len(pairs[name]) >= _FEWEST}
