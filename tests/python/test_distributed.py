"""A sequence cut over ranks: outputs and gradients are those of one process."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import error
from ranks import run_on_ranks

from torch_spe import distributed, functional
from torch_spe.distributed import bounds, exchange

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"
pytestmark = pytest.mark.cpu_only
B, H, R, E = 2, 3, 6, 5
LENGTHS = {2: (70, 9), 4: (5, 40, 0, 34), 5: (5, 40, 0, 30, 4)}
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
    **{f"decay {name}, both sides": {"log_decay": shape} for name, shape in DECAYS.items()},
    "decay, both sides, padding, denominators": {
        "log_decay": (H,), "key_padding_mask": True, "denominator": 9, "feature_map": "relu"
    },
    "decay, both sides, RMS norm": {"log_decay": (H, R), "normalize": False, "rms_norm": True},
    **{
        f"packed, {'' if causal else 'not '}causal, decay {decay}": {
            "causal": causal, "packed": True, **({} if decay is None else {"log_decay": decay})
        }
        for causal in (True, False) for decay in (None, (H,), (B, None, H, R))
    },
}  # fmt: skip
# Of packed sequences: within a rank, over several of them, at an end of one, and empty ones.
BOUNDS = (0, 0, 3, 60, 70, 70, 73, 79)


def make(case, length):
    """Tensors and other arguments of a whole sequence; the tensors want gradients."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    options = dict(CASES[case])
    packed = options.pop("packed", False)
    rows = 1 if packed else B
    tensors = {n: draw(rows, length, H, E if n == "v" else R) for n in "qkv"}
    if width := options.pop("denominator", None):
        tensors |= {f"denominator_{n}": draw(rows, length, H, width).exp() for n in "qk"}
    if "log_decay" in options:
        shape = [length if size is None else size for size in options.pop("log_decay")]
        shape[0] = rows if len(shape) > 2 else shape[0]
        tensors["log_decay"] = -0.1 * draw(*shape).exp()
    if "key_padding_mask" in options:
        options["key_padding_mask"] = draw(B, length) > 0.5
    if packed:
        options["cu_seqlens"] = torch.tensor(BOUNDS)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}, options


def piece(tensor, begin, end):
    return tensor[:, begin:end] if tensor.dim() > 2 or tensor.dtype == torch.bool else tensor


def compare_with_one_process(lengths, doubling, device="cpu"):
    exchange.most_gathered = lambda *_: 1 if doubling else 8
    rank, length = dist.get_rank(), sum(lengths)
    begin = distributed.sequence_start(lengths[rank])
    assert begin == sum(lengths[:rank])
    end = begin + lengths[rank]
    for case in CASES:
        tensors, options = make(case, length)
        tensors = {n: t.detach().to(device).requires_grad_() for n, t in tensors.items()}
        options = {n: o.to(device) if torch.is_tensor(o) else o for n, o in options.items()}
        expected = functional.linear_attention(**tensors, **options)
        grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
        grad = grad.to(expected)
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


def transform():
    """`torch.func.grad` works; what does not says so, on every rank."""
    torch.manual_seed(dist.get_rank())
    q, k, v = (torch.randn(1, 4, H, R).requires_grad_() for _ in "qkv")
    steps = -torch.rand(1, 4, H)
    for options in ({}, {"causal": True}, {"causal": True, "log_decay": steps}):

        def loss(q, k, v, options=options):
            return distributed.linear_attention(q, k, v, **options).square().sum()

        expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
        got = torch.func.grad(loss, (0, 1, 2))(q.detach(), k.detach(), v.detach())
        for a, b in zip(got, expected, strict=True):
            assert error(a, b) < 1e-6
        with pytest.raises(NotImplementedError, match=r"forward-mode derivatives \(jvp, jacfwd\)"):
            torch.func.jvp(loss, (q, k, v), (q, k, v))
        with pytest.raises(NotImplementedError, match="vmap and jacrev are not implemented where"):
            torch.func.vmap(loss)(*(x.detach().unsqueeze(0) for x in (q, k, v)))
    with pytest.raises(RuntimeError, match=r"linear_attention: torch\.jit\.trace is not supported"):
        torch.jit.trace(loss, (q, k, v), check_trace=False)
    with pytest.raises(RuntimeError, match=r"sequence_start: torch\.jit\.trace is not supported"):
        torch.jit.trace(lambda x: x + distributed.sequence_start(4), q, check_trace=False)
    with pytest.raises(
        TypeError, match=r"linear_attention: group must be a torch\.distributed\.Pro"
    ):
        distributed.linear_attention(q, k, v, group="x")
    other = dist.new_group([1])  # of rank 1: what rank 0 gets is no group
    if dist.get_rank() == 0:
        with pytest.raises(TypeError, match=r"group must be .* with this rank, or None"):
            distributed.sequence_start(4, other)


def test_transforms_and_groups(tmp_path):
    run_on_ranks(transform, 2, tmp_path)


@pytest.mark.parametrize(("ranks", "doubling"), [(2, False), (2, True), (4, False), (5, True)])
def test_pieces_are_the_whole(ranks, doubling, tmp_path):
    run_on_ranks(compare_with_one_process, ranks, tmp_path, LENGTHS[ranks], doubling)


def test_one_rank_and_errors(tmp_path):
    x = torch.randn(1, 4, 2, 3)
    with pytest.raises(RuntimeError, match=r"linear_attention: torch.distributed has no process"):
        distributed.linear_attention(x, x, x)
    with pytest.raises(RuntimeError, match=r"sequence_start: torch.distributed has no process"):
        distributed.sequence_start(4)
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        with pytest.raises(ValueError, match="must end behind the tokens of all ranks"):
            bounds.cut_bounds(torch.tensor([0, 3]), 2, 2)
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
