"""A randomly initialised Llama to serve, made on the spot: ``python benchmarks/gpu/make_target.py SIZE FOLDER``.

Its tokenizer is the tiny target's, and it seldom generates what that one lacks. Its embeddings are large beside what
its layers add (whose outputs are scaled down by depth, as GPT-2's), so that a token depends most on the one before.
Both so that a draft can learn from little text.
"""

import math
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig

TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny_target"
TOKENIZED = 1024
SIZES = {  # hidden, intermediate, layers, heads, key heads, vocabulary
    "10m": (256, 768, 8, 4, 2, 8192),  # to rehearse with
    "100m": (768, 2048, 12, 12, 4, 8192),  # for a CPU, with passes as long as a GPU's
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}


def make(size: str, folder: Path, device: str = "cpu") -> None:
    """Writes a checkpoint in bfloat16."""
    hidden, intermediate, layers, heads, key_heads, vocabulary = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, max_position_embeddings=8192, bos_token_id=0,
        eos_token_id=1, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.nn.init.normal_(model.get_input_embeddings().weight)
        model.lm_head.weight[TOKENIZED:] /= 10
        for layer in model.model.layers:
            for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
                output.weight /= math.sqrt(2 * layers)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, folder / name)


def main(size: Annotated[str, typer.Argument(help=" or ".join(SIZES))], folder: Path, device: str = "cpu") -> None:
    if size not in SIZES:
        raise typer.BadParameter(f"{size} is not accepted; give {' or '.join(SIZES)}")
    make(size, folder, device)


if __name__ == "__main__":
    typer.run(main)
