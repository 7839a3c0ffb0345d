"""Which prompts with images are learnt from, and what their tokens are in the stream."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.models.gemma3_causal import Gemma3TextScaledWordEmbedding

from server_patches.common import images

PAD = (1 << 62) + 1_000_000  # the most that SGLang makes up


@pytest.mark.parametrize(
    ("embedding", "learnt"),
    [
        (torch.nn.Embedding(8, 4), True),
        (Gemma3TextScaledWordEmbedding(8, 4, 0, embed_scale=1.0), True),
        (Gemma3TextScaledWordEmbedding(8, 4, 0, embed_scale=2.0), False),
    ],
)
def test_they_are_where_the_draft_reads_tokens_beside_images_as_it_reads_others(embedding, learnt):
    assert images.are_learnt_from(torch.nn.Sequential(embedding, torch.nn.Linear(4, 4))) == learnt


def test_a_prompt_has_the_numbers_of_its_images_below_zero():
    shows = SimpleNamespace(origin_input_ids=[5, PAD, 999_999, PAD], multimodal_inputs=object())
    assert images.prompt(shows) == [5, -PAD, 999_999, -PAD]
    assert images.prompt(shows, 2) == [5, -PAD]
    found = images.stand_ins(shows, 1, 10, 20)  # it goes on after its prompt, as after a retraction
    assert (found.rows.tolist(), found.tokens.tolist()) == ([20, 22], [-PAD, -PAD])
