"""``GET /draft/status`` as a table for a terminal."""

from collections import Counter
from typing import Any

from rich.table import Table


def render(status: dict[str, Any]) -> Table:
    """One row a fact, the same wherever a status is shown."""
    table = Table(show_header=False, title="draft training")
    for name, value in _rows(status):
        table.add_row(name, value)
    return table


def _rows(status: dict[str, Any]) -> list[tuple[str, str]]:
    draft, trainer, tokens = status["draft"], status["trainer"], status["tokens"]
    by_version, by_slice = status["acceptance_by_version"], status["acceptance_by_slice"]
    by_prompt = status["acceptance_by_prompt_tokens"]
    dropped = {reason: count for reason, count in tokens["dropped"].items() if count}
    rows = [
        ("draft version", f"{draft['active_version']} active, {draft['swaps']} swaps"),
        ("  gate", f"{draft['gate']}{', held by ' + draft['held_by'] if draft['held_by'] else ''}"),
        ("  drafting", _drafting(draft["drafting"])),
        ("acceptance length", f"{_number(status['acceptance']['length'])} overall"),
        ("  by version", "  ".join(f"{v}: {n['length']:.2f}" for v, n in list(by_version.items())[-8:]) or "-"),
        ("  of slices", "  ".join(f"{name}: {n['length']:.2f}" for name, n in by_slice.items()) or "-"),
        ("  by prompt", "  ".join(f"<= {n}: {found['length']:.2f}" for n, found in by_prompt.items()) or "-"),
        ("  drift", _moves(draft["drift"]["moved"])),
        ("requests captured", _requests(status["export"])),
        ("  carried by", ", ".join(sorted({_transport(export) for export in status["export"]}))),
        ("tokens captured", f"{tokens['captured']:,}"),
        ("  trained", f"{tokens['trained']:,}"),
        ("  held out", f"{tokens['held_out']:,}"),
        ("  buffered", f"{tokens['buffered']:,}"),
        ("  in flight", f"{tokens['in_flight']:,}"),
        ("  dropped", ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "0"),
        ("trainer", f"{trainer['state']}, step {trainer['step']}, loss {_number(trainer['loss'])}{_rare(trainer)}"),
        ("  held-out acceptance", _number(trainer["held_out_acceptance_length"])),
        (
            "  trains on",
            f"{trainer['staleness']['buffered_samples']:,} samples, of the last step {_age(trainer['staleness'])}",
        ),
        ("  cached prefixes", _prefixes(trainer["prefixes"])),
        ("  draft vocabulary", _vocabulary(trainer["vocabulary"])),
        ("  parity", f"{trainer['parity']['agreed']}/{trainer['parity']['compared']}"),
    ]
    if process := trainer["process"]:
        last_exit = process["last_exit"] or "none"
        where = f"{process['pid'] or 'down'} on {process['device']}"
        rows.append(("  process", f"{where}, {process['restarts']} restarts, last exit: {last_exit}"))
    for version, why in {**draft["refused"], **draft["failed_swaps"]}.items():
        rows.append((f"version {version} stays out", why))
    rows += [("exporter stopped", export["failure"]) for export in status["export"] if export["failure"]]
    return rows


def _drafting(found: dict[str, Any]) -> str:
    said = found["depth"] if found["depth"] == "on" else f"off ({found['depth']})"
    if found["gain"] is None:
        return f"{said}, {found['mode']}"
    return f"{said}, {found['mode']}; at last {found['gain']:.2f} x, break-even {found['break_even_length']:.2f}"


def _moves(moved: dict[str, dict[str, Any]]) -> str:
    return "; ".join(map(_move, moved, moved.values())) or "none"


def _move(name: str, move: dict[str, Any]) -> str:
    before, now = _number(move["before"]), _number(move["now"])
    return f"{name or 'all traffic'} fell {move['since_s']:.0f} s ago, {before} before, {now} now"


def _requests(exports: list[dict[str, Any]]) -> str:
    """Of all exporters: how many requests, and why the others are not among them."""
    left_out: Counter[str] = Counter()
    for export in exports:
        left_out.update(export["requests"]["left_out"])
    captured, seen = (sum(export["requests"][key] for export in exports) for key in ("captured", "seen"))
    closed = {export["closed"] for export in exports} - {None}
    return "; ".join(
        [
            f"{captured:,} of {seen:,}",
            *(f"{count:,} {reason}" for reason, count in left_out.items()),
            *(f"now: {reason}" for reason in closed),
        ]
    )


def _transport(export: dict[str, Any]) -> str:
    why = export["why_not_shared"]
    return export["transport"] + (f" ({why})" if why else "")


def _age(staleness: dict[str, float]) -> str:
    return f"{staleness['mean_age_s']:.0f} s old, {staleness['oldest_age_s']:.0f} s at most"


def _vocabulary(found: dict[str, Any]) -> str:
    if found["coverage"] is None:
        return "-"
    anew = f"; chosen anew {found['chosen']} times" if found["chosen"] else ""
    return f"{found['tokens']:,} tokens hold {found['coverage']:.1%} of {found['counted']:,} trained on{anew}"


def _rare(trainer: dict[str, Any]) -> str:
    counts = {
        "steps changed nothing (gradients not finite)": trainer["skipped_steps"],
        "times gone on from the draft in service": trainer["taken_up"],
    }
    return "".join(f", {count:,} {what}" for what, count in counts.items() if count)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _prefixes(counts: dict[str, int]) -> str:
    failed = counts["unspilled_blocks"]
    return (
        f"{counts['whole_prefixes']:,} of {counts['prefixes']:,} completed, {counts['missing_tokens']:,} tokens "
        f"missing, {counts['stored_bytes'] >> 20:,} MiB kept, {counts['spilled_bytes'] >> 20:,} MiB on disk"
        + (f", {failed:,} blocks that it did not take" if failed else "")
    )
