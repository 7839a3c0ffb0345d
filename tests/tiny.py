"""Small random targets, drafts and samples that the unit tests share."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sglang_specforge.new_draft import init_draft
from sglang_specforge.settings import DraftTrainingSettings, Run
from sglang_specforge.target import fingerprint_target
from sglang_specforge.training_settings import Speculation
from trainer.sample import Sample

VOCAB, HIDDEN = 48, 16


def make_target(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_run(folder: Path, target: Path, draft_vocab_size: int = 32, **settings) -> Run:
    draft = init_draft(str(target), folder / "draft", draft_vocab_size=draft_vocab_size, dtype="float32")
    return Run(
        settings=DraftTrainingSettings(run_dir=folder / "run", **settings),
        target_path=str(target),
        target_fingerprint=fingerprint_target(target),
        draft_path=str(draft),
        served_dtype="float32",
        speculation=Speculation(3),
        spans_endpoint=f"ipc://{folder}/spans",
        control_endpoint=f"ipc://{folder}/control",
    )


def make_sample(tokens: int, prompt_tokens: int = 4, seed: int = 0, **fields) -> Sample:
    g = torch.Generator().manual_seed(seed)
    values = {
        "rid": f"r{seed}",
        "start": 0,
        "tokens_T": torch.randint(0, VOCAB, (tokens,), generator=g),
        "aux_T3H": torch.randn(tokens, 3 * HIDDEN, generator=g),
        "last_TH": torch.randn(tokens, HIDDEN, generator=g),
        "embeds_MH": torch.empty(0, HIDDEN),
        "places_M3": torch.empty(0, 3, dtype=torch.int32),
        "rejected_T": torch.full((tokens,), -1),
        "draft_version": 0,
        "proposals": [],
    }
    values |= fields
    values.setdefault("generated_T", values["start"] + 1 + torch.arange(tokens) >= prompt_tokens)
    return Sample(**values)
