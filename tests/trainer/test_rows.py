"""Captured rows: where text and images are, as a target that turns by three positions has them."""

import torch
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from trainer.rows import positions_on_axes

IMAGE, START = 91, 90


def wanted_positions(tokens, grids):
    """As transformers has them [3, N]; of each image, which two patches each way make a token of."""
    config = Qwen2_5_VLConfig(image_token_id=IMAGE, vision_start_token_id=START, video_token_id=92)
    ids, types = torch.tensor([tokens]), torch.tensor([[int(token == IMAGE) for token in tokens]])
    model = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)
    model.config = config
    found, _ = model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=torch.tensor(grids))
    return found[:, 0]


def test_positions_after_an_image_are_those_of_the_target():
    grids = [[1, 4, 8], [1, 8, 4]]
    tokens = [1, 2, START, *[IMAGE] * 8, 3, 4, 5, START, *[IMAGE] * 8, *range(6, 16)]
    wanted_N3 = wanted_positions(tokens, grids).T
    tokens_N = torch.tensor(tokens)
    tokens_N[tokens_N == IMAGE] = -7
    places_M3 = wanted_N3[tokens_N < 0].int()
    assert torch.equal(positions_on_axes(tokens_N, places_M3, 0), wanted_N3)
    for begin in range(1, 22):  # without its beginning, all else is where it was
        rest_N = tokens_N[begin:]
        places_of_rest = places_M3[len(places_M3) - int((rest_N < 0).sum()) :]
        assert torch.equal(positions_on_axes(rest_N, places_of_rest, begin), wanted_N3[begin:]), begin


def test_text_alone_is_where_it_begins():
    none = torch.empty(0, 3, dtype=torch.int32)
    assert positions_on_axes(torch.tensor([4, 5]), none, 7).tolist() == [[7] * 3, [8] * 3]
