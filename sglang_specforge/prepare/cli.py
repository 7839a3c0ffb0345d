"""``sglang-specforge prepare-data``."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sglang_specforge.client import GeneratingKey, fail, or_fail
from sglang_specforge.new_draft import coverage
from sglang_specforge.prepare.conversations import (
    Conversation,
    Layout,
    Row,
    Skipped,
    parsed,
    read_rows,
    to_conversation,
)
from sglang_specforge.prepare.illustrations import illustrate
from sglang_specforge.prepare.regenerate import Regenerator
from sglang_specforge.prepare.tokens import ChatTokens, Encoded, LossOn
from sglang_specforge.prepared import SCHEMA, Prepared

console = Console()
_ROWS_WRITTEN_AT_ONCE = 256


def prepare_data(
    sources: Annotated[
        list[str], typer.Argument(help="Files (.jsonl, .json, .parquet, .txt) or Hugging Face datasets.")
    ],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    tokenizer: Annotated[str, typer.Option(help="Folder or Hugging Face name of the target, for its tokenizer.")],
    layout: Annotated[Layout, typer.Option(help="Of the rows; auto looks at their columns.")] = "auto",
    split: Annotated[str, typer.Option(help="Of a Hugging Face dataset.")] = "train",
    loss_on: Annotated[LossOn, typer.Option(help="Assistants' turns that are learnt.")] = "all",
    chat_template_kwargs: Annotated[
        str,
        typer.Option(
            help="Settings of the chat template, as in requests, for instance '{\"enable_thinking\": false}'."
        ),
    ] = "{}",
    min_tokens: Annotated[int, typer.Option(min=2, help="Shorter sequences are skipped.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longer sequences are skipped.")] = 4096,
    limit: Annotated[int | None, typer.Option(min=1, help="Sequences to write at most.")] = None,
    regenerate: Annotated[
        str | None, typer.Option(help="Address of a server whose answers replace the data's.")
    ] = None,
    api_key: GeneratingKey = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that is asked for.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="Of these answers; 0 is greedy.")] = 0.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Conversations under way at the server at a time.")] = 8,
    draft_vocab_size: Annotated[int, typer.Option(min=8, help="Draft vocabulary to show the coverage of.")] = 32_000,
) -> None:
    """Turn conversations into token ids and loss masks, for sglang-specforge capture.

    A stopped run with --regenerate asks for no answer twice: they are kept beside the output until it is whole.
    """
    if min_tokens > max_tokens:
        fail(f"--min-tokens {min_tokens} is more than --max-tokens {max_tokens}: no sequence could be written")
    chat = ChatTokens(_load_tokenizer(tokenizer), loss_on, _parse_settings(chat_template_kwargs))
    kept = out.with_name(out.name + ".answers.jsonl")
    with or_fail():
        regenerator = Regenerator(regenerate, api_key, kept, max_new_tokens, temperature) if regenerate else None
    work = Preparation(chat, layout, (min_tokens, max_tokens), regenerator)
    try:
        rows = (row for source in sources for row in read_rows(source, split))
        _write(out, work.sequences(rows, limit, concurrency if regenerate else 1))
    except (OSError, ValueError, httpx.HTTPError) as error:
        why = f"{regenerate} does not answer ({error})" if isinstance(error, httpx.TransportError) else str(error)
        fail(why + (f"; what was answered is kept in {kept}" if regenerate else ""))
    if regenerator is not None:
        regenerator.close()
        kept.unlink()
    console.print(work.report())
    console.print(coverage(work.counts_V, draft_vocab_size))


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        fail(f"there is no tokenizer in {name!r} ({error}); give the target's folder, or its Hugging Face name")


def _parse_settings(text: str) -> dict[str, Any]:
    try:
        return parsed(text, dict, "it")
    except Skipped as error:
        fail(f'--chat-template-kwargs {text!r}: {error}; give an object, as {{"enable_thinking": false}}')


class Preparation:
    """Rows in, sequences out, in the same order; what is skipped is counted by reason."""

    def __init__(
        self, chat: ChatTokens, layout: Layout, bounds: tuple[int, int], regenerator: Regenerator | None
    ) -> None:
        self._chat, self._layout, self._bounds, self._regenerator = chat, layout, bounds, regenerator
        self.skipped: Counter[str] = Counter()
        self.counts_V = torch.zeros(chat.vocab_size, dtype=torch.int64)
        self._seen: set[str] = set()
        self._written = self._tokens = self._learnt = self._rows = 0

    def sequences(self, rows: Iterable[Row | Skipped], limit: int | None, workers: int) -> Iterator[Prepared]:
        for row in _in_order(self._make, rows, workers):
            kept = [made for made in row if self._keep(made)]
            self._rows += bool(kept)
            for made in kept:
                self._count(made)
                yield made
                if self._written == limit:
                    return
        if not self._written:
            why = ", ".join(f"{count:,} rows {reason}" for reason, count in self.skipped.most_common())
            raise ValueError(f"no sequence is left to write: {why or 'there were no rows'}")

    def report(self) -> Table:
        table = Table(show_header=False, title="prepared")
        rows = f", of {self._rows:,} rows" if self._rows != self._written else ""
        table.add_row("sequences", f"{self._written:,}{rows}")
        table.add_row("tokens", f"{self._tokens:,}, {self._learnt:,} of them learnt")
        if self._regenerator is not None:
            table.add_row("answers kept from before", f"{self._regenerator.kept_before:,}")
        for reason, count in self.skipped.most_common():
            table.add_row("skipped", f"{count:,}: {reason}")
        return table

    def _keep(self, made: Prepared | Skipped) -> bool:
        if isinstance(made, Skipped):
            self.skipped[str(made)] += 1
        elif made.id in self._seen:
            self.skipped["the same as another"] += 1
        else:
            self._seen.add(made.id)
            return True
        return False

    def _make(self, row: Row | Skipped) -> list[Prepared | Skipped]:
        if isinstance(row, Skipped):
            return [row]
        try:
            return [self._checked(found, row.slice) for found in self._encode(row)]
        except Skipped as reason:
            return [reason]

    def _checked(self, found: Encoded | Skipped, slice_name: str) -> Prepared | Skipped:
        shortest, longest = self._bounds
        if isinstance(found, Skipped):
            return found
        if len(found.ids) < shortest:
            return Skipped(f"shorter than {shortest} tokens")
        if len(found.ids) > longest:
            return Skipped(f"longer than {longest} tokens")
        return Prepared.of(*found, slice_name) if any(found.mask) else Skipped("nothing to learn")

    def _encode(self, row: Row) -> list[Encoded | Skipped]:
        conversation = to_conversation(row.columns, self._layout)
        if isinstance(conversation, str):
            return [self._chat.encode_text(conversation)]
        conversation = illustrate(conversation, row.columns, row.folder)
        if self._regenerator is None or not conversation.turns:
            return self._chat.encode(conversation)
        return self._regenerated(conversation)

    def _regenerated(self, conversation: Conversation) -> list[Encoded | Skipped]:
        """Each assistant's turn anew, in order, until one can't be: those before it are kept.

        Turns that call tools stay as they are, for what the tools said answers them.
        """
        messages = [dict(message) for message in conversation.messages]
        conversation, given, ended = conversation._replace(messages=messages), [], []
        try:
            for turn in conversation.turns:
                if "tool_calls" in messages[turn]:
                    given.append(self._chat.turn(conversation, turn))
                    continue
                before = conversation.until(turn)
                prompt = self._chat.prompt(before)
                if len(prompt) >= self._bounds[1]:
                    raise Skipped(f"longer than {self._bounds[1]} tokens")
                answer = self._regenerator.answer(prompt, before.images)
                given.append(Encoded.answer(prompt, answer, before.images))
                if turn != conversation.turns[-1]:
                    messages[turn] = {"role": "assistant", "content": self._chat.text(answer)}
        except Skipped as reason:
            ended = [reason]
        return [*self._chat.joined(given), *ended]

    def _count(self, made: Prepared) -> None:
        self._written, self._tokens = self._written + 1, self._tokens + len(made.input_ids)
        self._learnt += made.count_into(self.counts_V)


def _in_order(make: Any, rows: Iterable[Row], workers: int) -> Iterator[Any]:
    """``map`` over threads that never reads further ahead than they can work."""
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future] = deque()
        try:
            for row in rows:
                ahead.append(pool.submit(make, row))
                if len(ahead) >= 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _write(out: Path, sequences: Iterable[Prepared]) -> None:
    """The file appears when it is whole."""
    part = out.with_name(out.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with (
            pq.ParquetWriter(part, SCHEMA) as writer,
            Progress(*columns, console=console, disable=not console.is_terminal) as bar,
        ):
            task = bar.add_task("sequences", total=None)
            rows: list[dict[str, Any]] = []
            for sequence in sequences:
                rows.append(sequence._asdict())
                bar.advance(task)
                if len(rows) == _ROWS_WRITTEN_AT_ONCE:
                    writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
                    rows.clear()
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
        part.chmod(0o600)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
