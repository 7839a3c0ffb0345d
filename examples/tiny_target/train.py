"""Train the tiny target on text that every Python installation carries.

A Llama of 8 layers (3.6 M parameters) with its own byte-level BPE tokenizer and chat template, trained
on the standard library's sources and on the language reference in ``pydoc_data``. Run it from the
checkout; it writes ``model.safetensors``, the tokenizer, ``config.json`` and ``training.json`` (the loss
curve, the settings and the versions) beside itself::

    python examples/tiny_target/train.py
"""

import json
import math
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sglang_specforge.traffic import read_documents

HERE = Path(__file__).parent
BOS, EOS, UNK, USER, ASSISTANT = SPECIALS = ["<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        documents, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, unk_token=UNK, model_max_length=2048
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [USER, ASSISTANT]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def stream_examples(documents: list[str], rng: random.Random) -> Iterator[str]:
    """Endless examples: two in three are a chat turn (some lines, then what follows them), one is plain text."""
    weights = [len(d) for d in documents]
    while True:
        lines = rng.choices(documents, weights)[0].splitlines(keepends=True)
        start = rng.randrange(max(1, len(lines) - 12))
        asked, answered = rng.randint(1, 6), rng.randint(10, 60)
        head = "".join(lines[start : start + asked])
        tail = "".join(lines[start + asked : start + asked + answered])
        if rng.random() < 2 / 3:
            yield f"{BOS}{USER}{head}{ASSISTANT}{tail}{EOS}"
        else:
            yield f"{BOS}{head}{tail}"


def stream_batches(
    tokenizer: PreTrainedTokenizerFast, documents: list[str], rng: random.Random, batch: int, length: int
) -> Iterator[torch.Tensor]:
    """Examples packed end to end into ``[batch, length + 1]`` int64 token ids."""
    pool: list[int] = []
    examples = stream_examples(documents, rng)
    while True:
        while len(pool) < batch * (length + 1):
            for ids in tokenizer([next(examples) for _ in range(64)], add_special_tokens=False).input_ids:
                pool += ids
        ids = torch.tensor(pool[: batch * (length + 1)]).view(batch, length + 1)
        del pool[: batch * (length + 1)]
        yield ids


def loss_of(model: LlamaForCausalLM, ids_BL: torch.Tensor) -> torch.Tensor:
    logits_BLV = model(ids_BL[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), ids_BL[:, 1:].flatten())


def main(
    minutes: Annotated[float, typer.Option(help="Wall-clock time to train for.")] = 32.0,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Seed of weights, data order and held-out split.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder that receives the model.")] = HERE,
) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    documents = read_documents()
    rng.shuffle(documents)
    held_out, documents = documents[: len(documents) // 20], documents[len(documents) // 20 :]
    tokenizer = train_tokenizer(documents, vocab_size=1024)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=448, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
        tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = stream_batches(tokenizer, documents, rng, batch, length)
    held_out_batches = stream_batches(tokenizer, held_out, random.Random(seed), batch, length)
    probe = [next(held_out_batches) for _ in range(4)]

    @torch.no_grad()
    def held_out_loss() -> float:
        return sum(loss_of(model, ids_BL).item() for ids_BL in probe) / len(probe)

    curve, started, step = [], time.monotonic(), 0
    while (progress := (time.monotonic() - started) / (60 * minutes)) < 1:
        # Warm-up over the first fiftieth, then a cosine over the time that was given.
        scale = min(1.0, progress * 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        loss = loss_of(model, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            curve.append({"step": step, "loss": round(loss.item(), 4), "held_out_loss": round(held_out_loss(), 4)})
            print(f"{progress:6.1%} {curve[-1]}", flush=True)
        step += 1

    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    record = {
        "steps": step, "tokens": step * batch * length, "minutes": minutes, "batch": batch, "length": length,
        "lr": lr, "seed": seed, "parameters": model.num_parameters(), "held_out_loss": round(held_out_loss(), 4),
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "curve": curve,
    }  # fmt: skip
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
