"""Uses that break such layers elsewhere, and are right here: padding, strides, chunks, threads."""

import concurrent.futures
import copy
import itertools
import math

import pytest
import torch
from helpers import error, here, no_default_device
from torch import nn

from torch_spe import (
    PositiveFeatures,
    SineSPE,
    SPEMultiheadAttention,
    SPETransformerEncoderLayer,
    functional,
)

POSITIONS = ["sine", "paper", "conv", "rotary", None]
for_every_position = pytest.mark.parametrize("position", POSITIONS)
cpu_only = pytest.mark.cpu_only


def make(position, **options):
    torch.manual_seed(0)
    return SPEMultiheadAttention(16, 2, batch_first=True, position=position, **options)


# What stands in padding.


@pytest.mark.usefixtures("device")
@for_every_position
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("options", [{}, {"output_norm": None}, {"encode": "inputs"}], ids=str)
def test_padded_inputs_do_not_reach_outputs(position, causal, value, options):
    layer = make(position, **options).eval()
    x = here(torch.randn(2, 20, 16, device="cpu"))
    padding = torch.zeros(2, 20, dtype=torch.bool)
    padding[0, 12:] = True
    padding[1, 5:] = True
    bad = x.masked_fill(padding.unsqueeze(-1), value)
    out, expected = (
        layer(y, y, y, key_padding_mask=padding, is_causal=causal)[0] for y in (bad, x)
    )
    assert torch.equal(out[~padding], expected[~padding])


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_padded_keys_of_the_operator(dtype, causal, value):
    q, k, v = (here(torch.randn(2, 150, 2, 8, device="cpu")).to(dtype) for _ in "qkv")
    padding = torch.zeros(2, 150, dtype=torch.bool)
    padding[:, 70:] = True
    padding[1, :3] = True
    expected = functional.linear_attention(q, k, v, causal=causal, key_padding_mask=padding)
    fill = padding[:, :, None, None]
    out = functional.linear_attention(
        q, k.masked_fill(fill, value), v.masked_fill(fill, value), causal=causal,
        key_padding_mask=padding,
    )  # fmt: skip
    assert torch.equal(out, expected)


@cpu_only
def test_padded_inputs_do_reach_gradients():
    # docs/pytorch.md says so; in nn.MultiheadAttention as well.
    layer, x = make("sine"), torch.randn(1, 4, 16)
    x[:, 2:] = math.nan
    padding = torch.tensor([[False, False, True, True]])
    layer(x, x, x, key_padding_mask=padding)[0][:, :2].sum().backward()
    assert not layer.in_proj_weight.grad.isfinite().all()


# Strides.


def operators(x, freqs, weight):
    """Every operator on data [B, N, H, D]."""
    pairs = weight[..., :2, :]
    return {
        "sine_filter": lambda x: functional.sine_filter(x, freqs, weight),
        "phasor_filter": lambda x: functional.phasor_filter(x, freqs, pairs.mT.contiguous()),
        "sine_features": lambda x: functional.sine_features(x, freqs, freqs),
        "sine_attention": lambda x: functional.sine_attention(
            x, x, x, freqs, freqs, normalize=False
        ),
        "rotary": lambda x: functional.rotary(x, freqs[..., 0][:, ::2]),
        "conv_filter": lambda x: functional.conv_filter(x, freqs, seed=1, num_realizations=4),
        "linear_attention": lambda x: functional.linear_attention(x, x, x),
        "linear_attention, causal": lambda x: functional.linear_attention(x, x, x, causal=True),
    }


STRIDED = operators(None, torch.rand(2, 4, 2) / 2, torch.randn(2, 4, 4, 2))


@cpu_only
@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("dim", range(4))
def test_strides_beyond_32_bits(name, dim):
    # Only what is written becomes memory: the rest of the storage is never touched.
    shape = [2, 3, 2, 4]
    stride = 2**31 // (shape[dim] - 1) + 5
    strides = [24, 8, 4, 1]
    strides[dim] = stride
    storage = torch.empty((shape[dim] - 1) * stride + 64, dtype=torch.half)
    dense = torch.randn(shape).half()
    x = storage.as_strided(shape, strides)
    x.copy_(dense)
    assert x.storage_offset() + (shape[dim] - 1) * stride > 2**31
    function = STRIDED[name]
    assert torch.equal(function(x), function(dense))
    for y in (x, dense):
        y.requires_grad_()
        y.grad_of = torch.autograd.grad(function(y).float().square().sum(), y)[0]
    assert torch.equal(x.grad_of, dense.grad_of)


@cpu_only
@pytest.mark.parametrize("name", STRIDED)
def test_expanded_inputs_and_huge_strides_of_single_rows(name):
    dense = torch.randn(1, 1, 2, 4)
    huge = dense.as_strided((1, 1, 2, 4), (2**62, 2**40, 4, 1))
    assert torch.equal(STRIDED[name](huge), STRIDED[name](dense))
    wide = dense.expand(3, 5, 2, 4)
    assert torch.equal(STRIDED[name](wide), STRIDED[name](wide.contiguous()))


# Parts of sequences.


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("sizes", [(0, 1, 2, 0, 3), (1, 1, 1, 1, 1, 1), (2, 0, 0, 4)], ids=str)
@pytest.mark.parametrize("kind", ["sine", "rotary", "none"])
def test_a_sequence_in_chunks(sizes, kind):
    q, k, v = here(torch.randn(3, 2, 6, 2, 4, dtype=torch.float64, device="cpu")).unbind()
    freqs = here(torch.rand(2, 4, 2, dtype=torch.float64, device="cpu")) / 2
    weight = here(torch.randn(2, 4, 4, 6, dtype=torch.float64, device="cpu"))

    def encode(x, start):
        if kind == "sine":
            return functional.sine_filter(x, freqs, weight, start=start).exp()
        return functional.rotary(x, freqs[:, ::2, 0], start=start).exp() if kind == "rotary" else x

    attend = functional.linear_attention
    expected, whole = attend(encode(q, 0), encode(k, 0), v, causal=True, return_state=True)
    state, parts, start = None, [], 0
    for size in sizes:
        part = slice(start, start + size)
        out, state = attend(
            encode(q[:, part], start), encode(k[:, part], start), v[:, part], causal=True,
            initial_state=state, return_state=True,
        )  # fmt: skip
        parts.append(out)
        start += size
    assert error(torch.cat(parts, 1), expected) < 1e-13
    for got, want in zip(state, whole, strict=True):
        assert error(got, want) < 1e-13


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "bounds", [(0, 0, 5, 5, 5, 9, 9), (0, 9), (0, 0, 0, 9), (0, 9, 9, 9), (0, 1, 3, 3, 9)], ids=str
)
def test_packed_sequences_some_of_them_empty(bounds, causal):
    q, k, v = here(torch.randn(3, 1, 9, 2, 4, dtype=torch.float64, device="cpu")).unbind()
    attend = functional.linear_attention
    out, (s, z) = attend(q, k, v, causal=causal, cu_seqlens=torch.tensor(bounds), return_state=True)
    for i, (first, last) in enumerate(itertools.pairwise(bounds)):
        part = slice(first, last)
        expected, state = attend(
            q[:, part], k[:, part], v[:, part], causal=causal, return_state=True
        )
        assert error(out[:, part], expected) < 1e-13
        assert torch.equal(s[i], state[0][0])
        assert torch.equal(z[i], state[1][0])


# Copies, threads, processes.


@cpu_only
@for_every_position
@pytest.mark.parametrize("training", [False, True])
def test_a_copy_after_a_forward_pass(position, training):
    layer, x = make(position).train(training), torch.randn(2, 7, 16)
    layer(x, x, x)[0].sum().backward()
    layer(x, x, x)
    copied = copy.deepcopy(layer)
    outs = []
    for module in (layer, copied):
        torch.manual_seed(1)
        outs.append(module(x, x, x)[0])
    assert torch.equal(*outs)
    assert not {id(p) for p in layer.parameters()} & {id(p) for p in copied.parameters()}


@cpu_only
def test_a_copy_of_a_layer_with_a_random_map():
    layer, x = make("sine", feature_map=PositiveFeatures(8, 8)).eval(), torch.randn(2, 7, 16)
    expected = layer(x, x, x)[0]
    assert torch.equal(copy.deepcopy(layer)(x, x, x)[0], expected)


@cpu_only
@for_every_position
def test_one_layer_in_eight_threads(position):
    layer = make(position).eval()
    inputs = torch.randn(8, 2, 33, 16)

    def run(x):
        torch.set_num_threads(1)
        results = []
        for _ in range(5):
            out = layer(x, x, x, is_causal=True)[0]
            grads = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
            results.append([out.detach(), *grads])
        return results

    threads = torch.get_num_threads()
    try:
        expected = [run(x)[0] for x in inputs]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for results, wanted in zip(pool.map(run, inputs), expected, strict=True):
                for result in results:
                    assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))
    finally:
        torch.set_num_threads(threads)


def shared_layers():
    torch.manual_seed(0)
    spe = SineSPE(2, 8, 16, 2, noise="phase", bandwidth=True)
    options = {"dropout": 0.0, "batch_first": True, "position": spe}
    layers = [SPETransformerEncoderLayer(16, 2, 8, **options) for _ in range(3)]
    return nn.Sequential(*layers).double()


def train_on_one_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", rank=rank, world_size=2, init_method=f"file://{folder}/store"
    )
    layers = shared_layers()
    model = nn.parallel.DistributedDataParallel(layers)
    for step in range(2):
        layers.zero_grad()
        torch.manual_seed(10 * step + rank)
        model(torch.randn(2, 7, 16, dtype=torch.float64)).square().mean().backward()
    torch.save([p.grad for p in layers.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.long
@cpu_only
def test_distributed_data_parallel_with_shared_positions(tmp_path):
    with no_default_device():
        torch.multiprocessing.spawn(train_on_one_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{i}.pt") for i in (0, 1))
    layers = shared_layers()
    for rank in (0, 1):
        torch.manual_seed(10 + rank)
        x = torch.randn(2, 7, 16, dtype=torch.float64)
        (layers(x).square().mean() / 2).backward()
    for a, b, parameter in zip(first, second, layers.parameters(), strict=True):
        assert torch.equal(a, b)
        assert error(a, parameter.grad) < 1e-12
