"""A comparison for people: as a table in the terminal, and as one HTML page with the curves."""

import base64
import html
import io
import math
from pathlib import Path

from rich.console import Group
from rich.table import Table

from sglang_specforge.ab.comparison import Difference, judge
from sglang_specforge.ab.report import Report

_HEADS = ("arm", "version", "acceptance length", "verifications", "tokens/s", "")
_PAIR_HEADS = ("compared", "acceptance length", "of fresh requests", "tokens/s", "blocks")


def render(report: Report) -> Group:
    """Tables of arms and of differences."""
    arms, pairs = Table(*_HEADS, title=_title(report)), Table(*_PAIR_HEADS)
    for row in _arm_rows(report):
        arms.add_row(*row)
    for row in _pair_rows(report):
        pairs.add_row(*row)
    return Group(arms, pairs)


def write_page(report: Report, file: Path) -> None:
    """One file that needs no other. Raises OSError."""
    body = "\n".join(
        [
            f"<h1>{html.escape(_title(report))}</h1>",
            _html_table(_HEADS, _arm_rows(report)),
            _html_table(_PAIR_HEADS, _pair_rows(report)),
            f'<img src="data:image/svg+xml;base64,{base64.b64encode(_curves(report)).decode()}" alt="curves">'
            if report.blocks
            else "",
            f"<p>Arms took turns in random order (seed {report.plan.seed}); bounds hold at every look at once, with "
            f"probability {1 - report.plan.alpha:g}. Served: "
            + "; ".join(html.escape(f"{_name(place)} = {arm.path}") for place, arm in enumerate(report.arms))
            + "</p>",
        ]
    )
    style = "body{font-family:sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:right}img{max-width:100%}"
    file.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>A/B {report.id}</title>'
        f"<style>{style}</style><body>{body}</body></html>\n",
        encoding="utf-8",
    )


def _title(report: Report) -> str:
    servers = f" of {len(report.servers)} servers" if report.servers else ""
    return f"A/B {report.id}{servers}: {report.state}" + (f", {report.why}" if report.why else "")


def _name(place: int) -> str:
    return chr(ord("a") + place)


def _arm_rows(report: Report) -> list[tuple[str, ...]]:
    return [
        (
            _name(place),
            str(arm.version),
            _number(arm.acceptance_length, 3),
            f"{arm.passes:,}",
            _number(arm.tokens_per_s, 1),
            "" if arm.out_after_blocks is None else f"out after {arm.out_after_blocks} blocks",
        )
        for place, arm in enumerate(report.arms)
    ]


def _pair_rows(report: Report) -> list[tuple[str, ...]]:
    return [
        (
            f"{_name(pair.second)} against {_name(pair.first)}",
            _percent(pair.acceptance_length),
            _percent(pair.acceptance_length_of_fresh_requests),
            _percent(pair.tokens_per_s),
            str(pair.acceptance_length.blocks),
        )
        for pair in report.judgement.pairs
    ]


def _curves(report: Report) -> bytes:
    """SVG: each arm's acceptance length by block, and what was known of the difference after each."""
    from matplotlib.figure import Figure  # here: it takes a second that no other command needs

    figure = Figure(figsize=(9, 7), layout="constrained")
    lengths, differences = figure.subplots(2, sharex=True)
    numbers = range(1, len(report.blocks) + 1)
    for place, arm in enumerate(report.arms):
        turns = [block[place] for block in report.blocks]
        curve = [math.nan if turn is None else turn.acceptance_length for turn in turns]
        lengths.plot(numbers, curve, marker=".", label=f"{_name(place)}: version {arm.version}")
    lengths.set(ylabel="tokens a verification", title="Acceptance length of each turn")
    lengths.legend()
    known = [judge(report.blocks[:n], len(report.arms), report.plan).pairs for n in numbers]
    for i, pair in enumerate(report.judgement.pairs):
        found = [pairs[i].acceptance_length for pairs in known]
        low, mean, high = ([_of(bound) for bound in column] for column in zip(*map(_bounds, found), strict=True))
        (line,) = differences.plot(numbers, mean, label=f"{_name(pair.second)} against {_name(pair.first)}")
        differences.fill_between(numbers, low, high, alpha=0.2, color=line.get_color())
    differences.axhline(0, color="grey", linewidth=0.8)
    differences.set(xlabel="block", ylabel="%", title="Difference of acceptance lengths, with always-valid bounds")
    differences.legend()
    svg = io.BytesIO()
    figure.savefig(svg, format="svg")
    return svg.getvalue()


def _bounds(found: Difference) -> tuple[float | None, ...]:
    return found.low, found.mean, found.high


def _of(bound: float | None) -> float:
    return math.nan if bound is None else 100 * bound


def _html_table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(heads, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(found: Difference) -> str:
    if found.mean is None:
        return "-"
    bounds = "not known yet" if found.low is None else f"{found.low:+.1%} to {found.high:+.1%}"
    return f"{found.mean:+.1%} ({bounds})"
