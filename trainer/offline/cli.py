"""``sglang-specforge capture``; the command line finds it by its entry point."""

import shutil
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sglang_specforge.client import DEFAULT_URL, GeneratingKey, NotCaptured, Unanswered, Url, fail, run_of
from sglang_specforge.contracts.frames import Expected
from sglang_specforge.prepared import PreparedError, PreparedFile
from sglang_specforge.sockets import EndpointTaken
from sglang_specforge.target import TargetError, load_target_config
from trainer.offline.capture import Capture, Report
from trainer.offline.layout import DatasetError, Manifest
from trainer.offline.writer import DatasetWriter

console = Console()


def capture(
    data: Annotated[Path, typer.Option(help="File that prepare-data wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of the dataset; one that is there is gone on with.")],
    url: Url = DEFAULT_URL,
    api_key: GeneratingKey = None,
    admin_api_key: Annotated[
        str | None, typer.Option(envvar="SGLANG_ADMIN_API_KEY", help="Its --admin-api-key, where it has one.")
    ] = None,
    store: Annotated[
        Literal["served", "bfloat16", "float32", "float8"],
        typer.Option(help="How states are stored; float8 has a scale for each token."),
    ] = "served",
    shard_mb: Annotated[int, typer.Option(min=1, help="Size of a shard in MiB.")] = 512,
    concurrency: Annotated[int, typer.Option(min=1, help="Sequences under way at a time.")] = 8,
    estimate: Annotated[bool, typer.Option("--estimate", help="Print the bytes that it would take, and end.")] = False,
) -> None:
    """Store the states that a running server computes for prepared data, to train on with python -m trainer --data.

    The server has to run with --enable-draft-training --draft-training-trainer none, on this host.
    """
    try:
        control_key = admin_api_key or api_key
        run, sequences = run_of(url, control_key), PreparedFile(data)
        if run.disaggregation != "null":
            fail(f"{url} is a {run.disaggregation} server, which computes half of a sequence; give one that does both")
        if run.is_spread:
            fail(f"{url} computes requests on {run.nodes} nodes; give one that does on this one")
        target = load_target_config(Path(run.target_path))
        manifest = Manifest(
            target_fingerprint=run.target_fingerprint,
            target_path=run.target_path,
            served_dtype=run.served_dtype,
            hidden_size=target.hidden_size,
            stored=run.served_dtype if store == "served" else store,
        )
        if estimate:
            show_estimate(sequences, manifest, out)
            return
        writer = DatasetWriter(out, manifest, shard_mb << 20)
        expected = Expected(target.hidden_size, target.vocab_size, run.travel_dtype)
        report = _run(Capture(url, api_key, control_key, run, expected, writer, concurrency), sequences)
    except (PreparedError, DatasetError, TargetError, EndpointTaken, NotCaptured, Unanswered, OSError) as error:
        fail(str(error))
    console.print(
        f"stored {report.stored} sequences of {report.stored_tokens:,} tokens in {out}; {report.there_already} were "
        f"there already or twice in the data; {report.sent_again} were sent again"
    )
    if report.failed:
        fail("\n".join(f"{count} failed: {reason}" for reason, count in report.failed.items()), code=1)


def show_estimate(sequences: PreparedFile, manifest: Manifest, out: Path) -> None:
    tokens = images = 0
    for sequence in sequences:
        tokens, images = tokens + len(sequence.input_ids), images + len(sequence.images)
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    table = Table(show_header=False, title="capture, estimated")
    table.add_row("sequences", f"{len(sequences):,}")
    table.add_row("tokens", f"{tokens:,}" + (f", without those of {images:,} images" if images else ""))
    table.add_row("bytes a token", f"{manifest.row_bytes:,} ({manifest.stored}, hidden size {manifest.hidden_size})")
    table.add_row("in all", f"{tokens * manifest.row_bytes:,} bytes ({tokens * manifest.row_bytes / 1e9:.2f} GB)")
    table.add_row("free there", f"{shutil.disk_usage(existing).free / 1e9:.2f} GB")
    console.print(table)


def _run(work: Capture, sequences: PreparedFile) -> Report:
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("sequences", total=len(sequences))

        def show(report: Report) -> None:
            bar.update(task, completed=report.stored + report.there_already + report.failed.total())

        return work.run(sequences, show)
