"""A tiny Qwen3-MoE of random weights with the tiny target's tokenizer, for expert-parallel runs::

python examples/tiny_target/make_moe.py OUT
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

HERE = Path(__file__).parent


def main(
    out: Annotated[Path, typer.Argument(help="Folder that receives the model.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer to go with it.")] = HERE,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
) -> None:
    torch.manual_seed(seed)
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    config = Qwen3MoeConfig(
        vocab_size=len(tokens), hidden_size=128, intermediate_size=256, moe_intermediate_size=64,
        num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8,
        num_experts_per_tok=2, norm_topk_prob=True, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    tokens.save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
