"""A sequence cut over ranks: outputs and gradients are those of one process."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from helpers import error

from torch_spe import distributed, functional

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"
pytestmark = pytest.mark.cpu_only
B, H, R, E = 2, 3, 6, 5
LENGTHS = {2: (70, 9), 4: (5, 40, 1, 33)}
DECAYS = {"[H]": (H,), "[H, R]": (H, R), "[B, N, H]": (B, None, H), "[B, N, H, R]": (B, None, H, R)}
CASES = {
    "causal": {"causal": True},
    "not causal": {},
    "numerators": {"causal": True, "normalize": False, "feature_map": "relu"},
    "RMS norm": {"causal": True, "normalize": False, "rms_norm": True},
    "padding": {"causal": True, "key_padding_mask": True},
    "padding, not causal": {"key_padding_mask": True},
    "denominators": {"causal": True, "denominator": 4},
    **{f"decay {name}": {"causal": True, "log_decay": shape} for name, shape in DECAYS.items()},
}


def make(case, length):
    """Tensors and other arguments of a whole sequence; the tensors want gradients."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    options = dict(CASES[case])
    tensors = {"q": draw(B, length, H, R), "k": draw(B, length, H, R), "v": draw(B, length, H, E)}
    if width := options.pop("denominator", None):
        tensors |= {f"denominator_{n}": draw(B, length, H, width).exp() for n in "qk"}
    if "log_decay" in options:
        shape = [length if size is None else size for size in options.pop("log_decay")]
        tensors["log_decay"] = -0.1 * draw(*shape).exp()
    if "key_padding_mask" in options:
        options["key_padding_mask"] = draw(B, length) > 0.5
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}, options


def piece(tensor, begin, end):
    return tensor[:, begin:end] if tensor.dim() > 2 or tensor.dtype == torch.bool else tensor


def compare_on_one_rank(rank, lengths, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(lengths)
    )
    length = sum(lengths)
    begin = distributed.sequence_start(lengths[rank])
    assert begin == sum(lengths[:rank])
    end = begin + lengths[rank]
    for case in CASES:
        tensors, options = make(case, length)
        expected = functional.linear_attention(**tensors, **options)
        grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).double()
        wanted = torch.autograd.grad(expected, list(tensors.values()), grad)
        own = {n: piece(t.detach(), begin, end).requires_grad_() for n, t in tensors.items()}
        options = {n: piece(o, begin, end) if torch.is_tensor(o) else o for n, o in options.items()}
        out = distributed.linear_attention(**own, **options)
        assert error(out, expected[:, begin:end]) < 1e-12, case
        got = torch.autograd.grad(out, list(own.values()), grad[:, begin:end])
        for name, a, b in zip(own, got, wanted, strict=True):
            if own[name].shape == tensors[name].shape:  # of all tokens: each rank has its part
                dist.all_reduce(a)
            else:
                b = piece(b, begin, end)
            assert error(a, b) < 1e-10, (case, name)
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", LENGTHS)
def test_pieces_are_the_whole(ranks, tmp_path):
    torch.multiprocessing.spawn(compare_on_one_rank, (LENGTHS[ranks], str(tmp_path)), nprocs=ranks)


def test_one_rank_and_errors(tmp_path):
    x = torch.randn(1, 4, 2, 3)
    with pytest.raises(RuntimeError, match=r"linear_attention: torch.distributed has no process"):
        distributed.linear_attention(x, x, x)
    with pytest.raises(RuntimeError, match=r"sequence_start: torch.distributed has no process"):
        distributed.sequence_start(4)
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        with pytest.raises(ValueError, match="log_decay must be None without causal"):
            distributed.linear_attention(x, x, x, log_decay=torch.full((2,), -0.1))
        with pytest.raises(ValueError, match="linear_attention: k must have size 3"):
            distributed.linear_attention(x, x[..., :2], x, causal=True)
        out = distributed.linear_attention(x, x, x, causal=True)
        assert torch.equal(out, functional.linear_attention(x, x, x, causal=True))
        names = {}
        exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)), names)
        x = torch.randn(2, 7, 8, 64)
        assert names["attend"](x, x, x).shape == x.shape
    finally:
        dist.destroy_process_group()
