"""The unrolled draft against a plain re-enactment of what a server does with it, row by row."""

import pytest
import torch

from sglang_specforge.checkpoint import load_config
from sglang_specforge.drafts import expected_shapes
from tests.tiny import HIDDEN, make_run, make_sample, make_target
from tests.trainer.linear_draft import LinearDraft
from trainer.eagle3 import Eagle3Draft
from trainer.layers import rotate
from trainer.learner import load_draft
from trainer.roots import Roots, Run

CPU = torch.device("cpu")


def serve_chain(draft, embed_LH, aux_L3H, row, steps, first_position):
    """Logits of a chain drafted after ``row``: keys of the verified prefix, then the chain's own."""
    layer, attention = draft.midlayer, draft.midlayer.self_attn
    groups = attention.q_proj.out_features // attention.k_proj.out_features
    keys, values, logits = [], [], []

    def advance(embed_H, hidden_H, position):
        x = torch.cat([layer.input_layernorm(embed_H), layer.hidden_norm(hidden_H)])
        cos, sin = draft._rotary(x[None], torch.tensor([position]))
        q, k, v = (p(x).view(1, -1, 1, attention.P) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = rotate(q[0], cos, sin)[:, 0], rotate(k[0], cos, sin)[:, 0]
        keys.append(k.repeat_interleave(groups, 0))
        values.append(v[0, :, 0].repeat_interleave(groups, 0))
        scores = torch.stack([(q * key).sum(-1) for key in keys], -1) * attention.P**-0.5
        mixed = torch.einsum("hs,shp->hp", scores.softmax(-1), torch.stack(values))
        hidden_H = hidden_H + attention.o_proj(mixed.flatten())
        return hidden_H + layer.mlp(layer.post_attention_layernorm(hidden_H))

    for t in range(row + 1):
        hidden_H = advance(embed_LH[t], draft.fc(aux_L3H[t]), first_position + t)
    logits.append(draft.lm_head(draft.norm(hidden_H)))
    for k in range(1, steps):
        hidden_H = advance(embed_LH[row + k], hidden_H, first_position + row + k)
        logits.append(draft.lm_head(draft.norm(hidden_H)))
    return logits


def chain_logits(steps):
    return lambda begun: [begun.draft.lm_head(hidden) for hidden in begun.unroll(steps)]


@pytest.mark.parametrize("first_position", [0, 5])
def test_each_row_sees_what_a_served_chain_sees(tmp_path, first_position):
    run = make_run(tmp_path, make_target(tmp_path / "target"))
    draft = load_draft(run, run.version_path(0))
    sample, steps, T = make_sample(9), 4, 9
    embed_TH = torch.randn(T, HIDDEN)
    next_embed_TH = torch.nn.functional.pad(embed_TH, (0, 0, 0, 1))[1:]
    with torch.no_grad():
        positions = first_position + torch.arange(T)
        everywhere = Roots.everywhere([(0, T)], CPU)
        unrolled = draft(embed_TH, sample.aux_T3H, positions, everywhere, chain_logits(steps))
        for row in range(T - steps):
            served = serve_chain(draft, next_embed_TH, sample.aux_T3H, row, steps, first_position)
            for k in range(steps):
                torch.testing.assert_close(unrolled[k][row], served[k], atol=1e-5, rtol=1e-4)


def test_samples_in_a_pack_do_not_see_each_other(tmp_path):
    run = make_run(tmp_path, make_target(tmp_path / "target"))
    draft = load_draft(run, run.version_path(0))
    lengths, steps = [6, 3, 8], 2
    embeds, auxes = ([torch.randn(n, width) for n in lengths] for width in (HIDDEN, 3 * HIDDEN))
    positions = [torch.arange(n) + 7 * i for i, n in enumerate(lengths)]
    with torch.no_grad():
        given, samples = map(torch.cat, (embeds, auxes, positions)), [(0, 6), (6, 9), (9, 17)]
        packed = draft(*given, Roots.everywhere(samples, CPU), chain_logits(steps))
        for first, n, *inputs in zip([0, 6, 9], lengths, embeds, auxes, positions, strict=True):
            alone = draft(*inputs, Roots.everywhere([(0, n)], CPU), chain_logits(steps))
            for k in range(steps):
                rows = n - 1 - k  # the rows after these have no teacher, and read beyond the sample
                torch.testing.assert_close(packed[k][first : first + rows], alone[k][:rows])


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", [Eagle3Draft, LinearDraft])
def test_chains_of_some_rows_are_those_of_all_with_their_gradients(tmp_path, kind, again):
    run, steps = make_run(tmp_path, make_target(tmp_path / "target")), 3
    draft = kind(load_config(run.version_path(0)))
    draft.checkpoints_activations = again
    some = Roots([Run(0, 2, 5), Run(7, 7, 8), Run(7, 10, 12)], 13, CPU)
    given = torch.randn(13, HIDDEN), torch.randn(13, 3 * HIDDEN), torch.arange(13)

    def logits_and_gradients(roots, pick):
        found = torch.stack([pick(logits) for logits in draft(*given, roots, chain_logits(steps))])
        return [found, *torch.autograd.grad(found.square().sum(), [*draft.parameters()])]

    everywhere = logits_and_gradients(Roots.everywhere([(0, 7), (7, 13)], CPU), some.pick)
    for found, wanted in zip(logits_and_gradients(some, lambda x: x), everywhere, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_the_layout_is_the_checkpoints(tmp_path):
    run = make_run(tmp_path, make_target(tmp_path / "target"))
    config = load_config(run.version_path(0))
    names = set(load_draft(run, run.version_path(0)).state_dict())
    assert names == set(expected_shapes(config))
