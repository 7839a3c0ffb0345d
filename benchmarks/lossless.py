"""Whether answers depend on the draft: greedy answers of a server with draft training, its draft changing all the time,
against those of a server without speculation (the peer), token by token::

    python benchmarks/lossless.py [--target DIR] [--requests 40] [--quick] [--json FILE]

The same requests, one after another, so that no batch differs; served in float32, where a pass over several tokens
gives what as many passes over one give, up to rounding.
"""

import itertools
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from measuring import TINY_TARGET, JsonFile, Quick, Target, add_random_draft, save_record, start_capturing, start_plain

from sglang_specforge.client import ask
from sglang_specforge.server_process import ServerProcess
from sglang_specforge.traffic import stream_prompts

SERVING = ("--max-total-tokens", 16384, "--max-running-requests", 16)
TOKENS = 64


def answer(server: ServerProcess, prompt: str) -> list[int]:
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    body = {"text": prompt, "sampling_params": sampling}
    return ask("POST", server.url, "/generate", None, json=body, timeout=600).json()["output_ids"]


def main(
    target: Target = TINY_TARGET,
    requests: Annotated[int, typer.Option(min=1)] = 40,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    requests = min(requests, 6) if quick else requests
    prompts = list(itertools.islice(stream_prompts(seed=3), requests))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with start_plain(target, folder, *SERVING) as server:
            expected = [answer(server, prompt) for prompt in prompts]
        with start_capturing(target, folder, *SERVING, "--draft-gate", "off") as server:
            versions = [0, add_random_draft(server, target, folder, seed=1)]
            found = []
            for number, prompt in enumerate(prompts):
                body = {"version": versions[number % 2]}
                ask("POST", server.url, "/draft/activate", None, json=body, timeout=120)
                found.append(answer(server, prompt))
            swaps = server.status()["draft"]["swaps"]
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    print(f"{same} of {requests} greedy answers of {TOKENS} tokens are the same, through {swaps} swaps")
    if json_file:
        save_record(json_file, {"same answers": same / requests}, [{"swaps": swaps}])
    raise typer.Exit(same < requests)


if __name__ == "__main__":
    typer.run(main)
