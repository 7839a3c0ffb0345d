"""One training step, ours against SpecForge 0.2.0's ``OnlineEagle3Model``: the same weights, the same data, in turns::

    python benchmarks/trainer_vs_specforge.py [--quick] [--device cuda] [--dtype bfloat16] [--no-compile] [--json FILE]

The peer pins other versions of torch and sglang, so it is no extra of ours: pip puts it, without dependencies, beside
the environment, into ``benchmarks/.peer``.

The peer runs its ``sdpa`` attention and its compact teacher (from hidden states, as ours). Its fused loss is a Triton
kernel; where that can't run (on a CPU), its own reference of it takes its place. The peer compiles that reference, its
norms and its rotation by itself, always; ours are compiled as with the trainer's ``--compile``. Either leaves out of
its loss the rows whose target token the draft vocabulary lacks: of a random target that is half of them, and none where
a shape is covered. A step is forward and backward of all steps of the training-time test. Peak memory is the process's
resident set, or the GPU's, above what it held before the step. A GPU computes larger shapes.
``bound`` is the speed that our step would have if all but its matrix products took no time; ``loss`` and ``gradient``
are the relative differences from the peer's.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import typer
from measuring import JsonFile, Quick, peak_bytes, save_record
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import ProfilerActivity, profile

from sglang_specforge.drafts import EAGLE3, expected_shapes
from sglang_specforge.training_settings import TrainingSettings
from trainer.eagle3 import Eagle3Draft
from trainer.fused import fuse
from trainer.loss import FrozenTarget, Goal, unroll
from trainer.rows import Rows
from trainer.sample import Sample, count_rows, fields_of, pack

PEER, PEER_WHEEL = Path(__file__).parent / ".peer", "specforge==0.2.0"
DECAY = 0.8
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"}


@dataclass(frozen=True)
class Shape:
    name: str
    H: int
    V: int
    D: int
    lengths: tuple[int, ...]
    prompt: float  # share of each sample that is prompt, and masked
    covered: bool = False  # the draft vocabulary has all that the target says, or else half of it
    steps: int = 7


SHAPES = (
    Shape("small, dense", 256, 4096, 2048, (256,) * 4, 0.0),
    Shape("dense", 512, 8192, 4096, (512,) * 2, 0.0),
    Shape("dense, covered", 512, 8192, 4096, (512,) * 2, 0.0, covered=True),
    Shape("ragged, 60% masked", 512, 8192, 4096, (512, 128, 256, 64, 384, 96), 0.6),
)
SHAPES_OF_A_GPU = (
    Shape("dense", 2048, 128256, 32000, (2048,) * 4, 0.0),
    Shape("dense, covered", 2048, 128256, 32000, (2048,) * 4, 0.0, covered=True),
    Shape("ragged, 60% masked", 2048, 128256, 32000, (4096, 1024, 2048, 512, 3072, 768), 0.6),
)


def make_config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": [EAGLE3.architecture],
        "hidden_size": shape.H, "vocab_size": shape.V, "draft_vocab_size": shape.D, "intermediate_size": 3 * shape.H,
        "num_attention_heads": shape.H // 64, "num_key_value_heads": shape.H // 128, "head_dim": 64,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "num_hidden_layers": 1, "hidden_act": "silu", "tie_word_embeddings": False, "pad_token_id": None,
    }  # fmt: skip


def make_weights(shape: Shape) -> dict[str, Tensor]:
    config = make_config(shape)
    D, V = config["draft_vocab_size"], config["vocab_size"]
    weights = {
        name: torch.ones(size) if len(size) == 1 else 0.02 * torch.randn(size)
        for name, size in expected_shapes(config).items()
    }
    ids_D = torch.randperm(V)[:D].sort().values
    return {
        **weights,
        "d2t": ids_D - torch.arange(D),
        "t2d": torch.zeros(V, dtype=torch.bool).index_fill(0, ids_D, True),
    }


def make_samples(shape: Shape) -> list[Sample]:
    return [
        Sample(
            f"r{i}",
            0,
            **fields_of(
                Rows.of_text(torch.randint(shape.V, (T,)), torch.randn(T, 3 * shape.H), torch.randn(T, shape.H))
            ),
            generated_T=torch.arange(T) + 1 >= int(shape.prompt * T),
            rejected_T=torch.full((T,), -1),
        )
        for i, T in enumerate(shape.lengths)
    ]


Step = Callable[[], tuple[float, Tensor]]  # the loss and a gradient to compare


def our_step(
    shape: Shape,
    weights: dict[str, Tensor],
    target: FrozenTarget,
    samples: list[Sample],
    keep_gradients: bool = False,
) -> Step:
    draft = Eagle3Draft(make_config(shape))
    draft.load_state_dict(weights)
    settings = TrainingSettings(ttt_steps=shape.steps, ttt_decay=DECAY, loss_on="generated" if shape.prompt else "all")

    def step() -> tuple[float, Tensor]:
        draft.zero_grad(set_to_none=not keep_gradients)
        rows_K = count_rows(samples, shape.steps, shape.prompt > 0)
        goal = Goal.of(settings, rows_K, [0.0] * shape.steps)
        loss = unroll(draft, target, pack(samples, torch.get_default_device()), goal).loss
        loss.backward()
        return loss.item(), draft.fc.weight.grad

    return step


def peer_step(shape: Shape, weights: dict[str, Tensor], target: FrozenTarget, samples: list[Sample]) -> Step:
    from specforge.algorithms.eagle3 import model as peer
    from specforge.core import loss as peer_loss
    from specforge.modeling.draft import LlamaForCausalLMEagle3

    if torch.get_default_device().type == "cpu":
        peer.LogSoftmaxLoss = type("EagerLoss", (), {"apply": staticmethod(peer_loss._compute_loss)})
    draft = LlamaForCausalLMEagle3(transformers.LlamaConfig(**make_config(shape)), attention_backend="sdpa")
    draft.load_state_dict({**weights, "embed_tokens.weight": target.embed_VH})
    draft.embed_tokens.weight.requires_grad_(False)
    model = peer.OnlineEagle3Model(draft, length=shape.steps, attention_backend="sdpa")

    def shifted(rows: Tensor) -> Tensor:
        return torch.cat([rows[1:], torch.zeros_like(rows[:1])])

    def step() -> tuple[float, Tensor]:
        model.zero_grad()
        T_B = torch.tensor(shape.lengths)
        row_BL = torch.arange(max(shape.lengths)).expand(len(samples), -1)
        prompt_B1 = torch.tensor([[int(shape.prompt * T)] for T in shape.lengths])
        mask_BL = (row_BL + 1 < T_B[:, None]) & (row_BL + 2 >= prompt_B1)
        losses, *_ = model(
            input_ids=pad_sequence([shifted(s.tokens_T) for s in samples], batch_first=True),
            attention_mask=(row_BL < T_B[:, None]),
            target=None,
            loss_mask=mask_BL[..., None].long(),
            hidden_states=pad_sequence([s.aux_T3H for s in samples], batch_first=True),
            target_hidden_for_compact=pad_sequence([shifted(s.last_TH) for s in samples], batch_first=True),
            target_head_weight=target.head_VH,
        )
        # The peer takes each step's mean over all rows; ours over those that count.
        counts = [int(mask_BL[:, k:].sum()) for k in range(shape.steps)]
        loss = sum(DECAY**k * mean * mask_BL.numel() / counts[k] for k, mean in enumerate(losses))
        loss.backward()
        return loss.item(), draft.fc.weight.grad

    return step


def make_steps(shape: Shape) -> dict[str, Step]:
    torch.manual_seed(0)
    weights, samples = make_weights(shape), make_samples(shape)
    target = FrozenTarget(torch.randn(shape.V, shape.H), 0.1 * torch.randn(shape.V, shape.H))
    if shape.covered:
        target.head_VH[~weights["t2d"]] *= 0.01
    return {
        make.__name__.removesuffix("_step"): make(shape, weights, target, samples) for make in (our_step, peer_step)
    }


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    torch.compiler.reset()  # a run is of one shape
    steps = make_steps(shape)
    (our_loss, our_grad), (peer_loss, peer_grad) = (step() for step in steps.values())  # also the warm-up
    seconds: dict[str, list[float]] = {who: [] for who in steps}
    for _ in range(rounds):
        for who, step in steps.items():
            _wait()
            started = time.perf_counter()
            step()
            _wait()
            seconds[who].append(time.perf_counter() - started)
    on_gpu = torch.get_default_device().type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiled:
        steps["our"]()
        _wait()
    products = [e for e in profiled.key_averages() if e.key in _PRODUCTS]
    products_s = sum(e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in products) / 1e6
    return {
        "shape": asdict(shape),
        "seconds": seconds,
        "products_s": products_s,
        "bound": statistics.median(seconds["peer"]) / products_s,
        "tokens_per_s": {who: sum(shape.lengths) / statistics.median(s) for who, s in seconds.items()},
        "speed_ratio": statistics.median(seconds["peer"]) / statistics.median(seconds["our"]),
        "loss_difference": abs(our_loss - peer_loss) / abs(peer_loss),
        "gradient_difference": float((our_grad - peer_grad).norm() / peer_grad.norm()),
    }


def measure_memory(shape: Shape, rounds: int) -> dict[str, Any]:
    """Apart from the clock: giving memory back to the system at once makes every step slower."""
    peaks: dict[str, list[int]] = {}
    for who, step in make_steps(shape).items():
        step()
        peaks[who] = [peak_bytes(step) for _ in range(rounds)]
    return {
        "peak_bytes": peaks,
        "memory_ratio": statistics.median(peaks["our"]) / statistics.median(peaks["peer"]),
    }


def _wait() -> None:
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


def show(samples: list[dict[str, Any]]) -> None:
    table = Table(title="one training step, ours and SpecForge 0.2.0")
    for column in ("shape", "ours tokens/s", "peer tokens/s", "speed", "bound", "memory", "loss", "gradient"):
        table.add_column(column)
    for s in samples:
        table.add_row(
            s["shape"]["name"], f"{s['tokens_per_s']['our']:.0f}", f"{s['tokens_per_s']['peer']:.0f}",
            f"x {s['speed_ratio']:.2f} ({_spread(s)})", f"x {s['bound']:.2f}", f"x {s['memory_ratio']:.2f}",
            f"{s['loss_difference']:.1e}", f"{s['gradient_difference']:.1e}",
        )  # fmt: skip
    Console(width=120).print(table)


def _spread(sample: dict[str, Any]) -> str:
    """Lowest and highest ratio of a round."""
    ratios = [peer / our for our, peer in zip(*sample["seconds"].values(), strict=True)]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def main(
    quick: Quick = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="Of weights and states; unset: float32 on a CPU, bfloat16 on a GPU."),
    ] = None,
    compiles: Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile our step's parts.")] = True,
    json_file: JsonFile = None,
) -> None:
    if not PEER.exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", PEER, PEER_WHEEL], check=True)
    sys.path.insert(0, str(PEER))
    torch.set_default_device(device)
    torch.set_default_dtype(getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16")))
    fuse(compiles)
    shapes = SHAPES if device == "cpu" else SHAPES_OF_A_GPU
    samples = [measure(shape, rounds=1 if quick else 7) for shape in shapes]
    for shape, sample in zip(shapes, samples, strict=True):
        sample |= measure_memory(shape, rounds=1 if quick else 3)
    show(samples)
    if json_file:
        ratios = {f"{s['shape']['name']}: {name}": s[f"{name}_ratio"] for s in samples for name in ("speed", "memory")}
        save_record(json_file, ratios, samples, specforge="0.2.0")


if __name__ == "__main__":
    typer.run(main)
