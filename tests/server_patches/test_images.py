"""What stands for images in a prompt, in the stream."""

from types import SimpleNamespace

import torch

from server_patches.common import images

PAD = (1 << 62) + 1_000_000  # the most that SGLang makes up


def test_a_prompt_has_the_numbers_of_its_images_below_zero():
    inputs = SimpleNamespace(mrope_positions=None)
    shows = SimpleNamespace(origin_input_ids=[5, PAD, 999_999, PAD], multimodal_inputs=inputs)
    assert images.prompt(shows) == [5, -PAD, 999_999, -PAD]
    assert images.prompt(shows, 2) == [5, -PAD]
    found = images.stand_ins(shows, 1, 10, 20)  # it goes on after its prompt, as after a retraction
    assert (found.rows.tolist(), found.tokens.tolist()) == ([20, 22], [-PAD, -PAD])
    assert found.places.tolist() == [[1] * 3, [3] * 3]
    inputs.mrope_positions = torch.tensor([[0, 1, 2, 2], [0, 1, 2, 3], [0, 1, 2, 4]])
    assert images.stand_ins(shows, 1, 10, 20).places.tolist() == [[1, 1, 1], [2, 3, 4]]
