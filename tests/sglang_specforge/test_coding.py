"""States in fewer bytes: what comes back, and that a row tells its size before it is made."""

import pytest
import torch

from sglang_specforge.contracts.coding import pack, row_bytes, unpack
from sglang_specforge.contracts.frames import Expected, WireError, decode
from sglang_specforge.contracts.spans import Captured, TensorLayout, encode_header

H, ROWS = 16, 5


def states(dtype, scale=1.0):
    g = torch.Generator().manual_seed(0)
    sizes_N1 = scale * 10.0 ** torch.arange(-2, ROWS - 2)[:, None]  # rows of very different magnitudes
    return (sizes_N1 * torch.randn(ROWS, 3 * H, generator=g)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("travel", "most"), [("served", 0.0), ("bfloat16", 2**-8), ("float8", 2**-4)])
def test_a_row_comes_back_as_near_as_its_coding_allows(dtype, travel, most):
    sent = states(dtype)
    rows = pack(sent, travel)
    assert rows.nbytes == ROWS * row_bytes(sent, travel)
    found = unpack(rows, dtype)
    assert found.dtype == dtype
    largest_N = sent.abs().amax(-1, keepdim=True).float()
    assert ((found - sent).abs().float() <= most * torch.maximum(sent.abs().float(), largest_N / 2**9) + 1e-30).all()


def test_a_row_of_nothing_stays_nothing():
    assert unpack(pack(torch.zeros(2, H), "float8")).equal(torch.zeros(2, H))


def captured(dtype, aux, last):
    layouts = [
        TensorLayout("aux_N3H", dtype, [ROWS, 3 * H]), TensorLayout("last_NH", dtype, [ROWS, H]),
        TensorLayout("tokens_N", "int64", [ROWS]),
    ]  # fmt: skip
    header = encode_header(Captured("s", 0, 0, [], layouts))
    return [memoryview(part) for part in (header, aux.numpy(), last.numpy(), torch.arange(ROWS).numpy())]


def test_only_the_coding_that_the_server_said_is_taken():
    aux, last = pack(states(torch.float32), "float8"), pack(states(torch.float32)[:, :H], "float8")
    frames = captured("float8", *(rows.flatten() for rows in (aux, last)))
    frames = [memoryview(bytes(frame)) for frame in frames]
    _, tensors = decode(frames, Expected(H, 100, "float8"))
    assert torch.equal(tensors["aux_N3H"], aux)
    assert torch.equal(tensors["last_NH"], last)
    with pytest.raises(WireError, match="in float8; this target has 16 in float32"):
        decode(frames, Expected(H, 100, "float32"))
    with pytest.raises(WireError, match="do not fit the header"):
        decode([frames[0], frames[1][:-4], *frames[2:]], Expected(H, 100, "float8"))
