"""Layers of a sequence that is cut over ranks: outputs and gradients are those of one process."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from helpers import error
from ranks import run_on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from torch_spe import (
    PositiveFeatures,
    SPEMultiheadAttention,
    SPETransformerDecoderLayer,
    SPETransformerEncoderLayer,
)
from torch_spe.distributed import SPESequenceParallel, agreement, exchange, linear_attention
from torch_spe.noise import draw_seed

pytestmark = pytest.mark.cpu_only
DIM, HEADS, LENGTH = 16, 2, 23
ENDS = {1: (23,), 2: (16, 23), 4: (3, 15, 15, 23)}  # of the ranks' tokens
INPUTS = {"encode": "inputs", "output_norm": None}
LAYERS = {
    "default": {},
    "inputs": INPUTS,
    "no norm": {"output_norm": None},
    "exact": {"position": "exact"},
    "exact, inputs": {"position": "exact", **INPUTS},
    "sine": {"position": "sine"},
    "sine, gaussian": {"position": "sine", "noise": "gaussian"},
    "sine, orthogonal": {"position": "sine", "noise": "orthogonal"},
    "paper": {"position": "paper"},
    "conv": {"position": "conv", "kernel_size": 9},
    "conv, polyphase": {"position": "conv", "kernel_size": 9, "noise_stride": 2},
    "conv, inputs": {"position": "conv", "kernel_size": 9, **INPUTS},
    "rotary": {"position": "rotary", "output_norm": None},
    "rotary, decay": {"position": "rotary", "decay": "learned"},
    "none": {"position": None, "feature_map": "relu"},
    "data": {"decay": "data"},
    "grouped": {"num_key_value_heads": 1, "head_dim": 6, "decay": "data"},
    "feature": {"decay": "feature", "output_norm": None},
    "gate": {"position": "exact", "decay": "learned", "decay_gate": False},
    "random map": {"position": "sine", "feature_map": lambda: PositiveFeatures(8, 12)},
}
NOISY = ["sine", "sine, gaussian", "sine, orthogonal", "paper", "conv", "conv, polyphase"]
# Arguments of a call, of all tokens; those in TOKENS are cut.
TOKENS = ("positions", "key_padding_mask")
CALLS = {
    "not causal": {},
    "causal": {"is_causal": True, "start": 5},
    "padding": {
        "is_causal": True, "key_padding_mask": (torch.arange(LENGTH) % 7 == 3).expand(2, -1)
    },
    "positions": {"positions": torch.arange(LENGTH) ** 2 // 8},
    "positions of each": {"positions": torch.arange(LENGTH) * torch.tensor([[1], [3]])},
    "starts": {"is_causal": True, "start": [3, -2]},
    "packed": {"cu_seqlens": torch.tensor([0, 2, 2, 17, 23])},
    "packed, causal": {"cu_seqlens": torch.tensor([0, 16, 23]), "is_causal": True, "start": 2},
}  # fmt: skip


def make(options, **more):
    torch.manual_seed(1)
    options = {name: value() if callable(value) else value for name, value in options.items()}
    layer = SPEMultiheadAttention(DIM, HEADS, batch_first=True, **options, **more).double()
    with torch.no_grad():  # lags of a piece must matter
        if layer.decay is not None:
            layer.decay.rate.add_(2.0)
            if layer.decay.kind == "data":
                layer.decay.weight.normal_()
    return layer


def parallel(module, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(module, mesh, SPESequenceParallel(**options))


def cut(value, name="positions"):
    if name not in TOKENS:
        return value
    ends = ENDS[dist.get_world_size()]
    begin = (0, *ends)[dist.get_rank()]
    return value[..., begin : ends[dist.get_rank()]]


def compare(layer, reference, call, name, before=lambda: None):
    """Outputs and all gradients of this rank against those of one process.

    What `before` does comes last before the call of the layer.
    """
    options = CALLS[call]
    batch = 1 if "cu_seqlens" in options else 2
    whole = torch.randn(batch, LENGTH, DIM, dtype=torch.float64).requires_grad_()
    grad = torch.randn(batch, LENGTH, DIM, dtype=torch.float64)
    expected, _ = reference(whole, whole, whole, **options)
    expected.backward(grad)
    x = cut(whole.detach().mT).mT.requires_grad_()
    before()
    out, _ = layer(x, x, x, **{n: cut(value, n) for n, value in options.items()})
    out.backward(cut(grad.mT).mT)
    assert error(out, cut(expected.mT).mT) < 1e-9, (name, call)
    assert error(x.grad, cut(whole.grad.mT).mT) < 1e-8, (name, call)
    wanted = dict(reference.named_parameters())
    for parameter_name, parameter in layer.named_parameters():
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(got)
        if wanted[parameter_name].grad is None:
            assert not got.any(), (name, call, parameter_name)
        else:
            assert error(got, wanted[parameter_name].grad) < 1e-7, (name, call, parameter_name)
    layer.zero_grad()
    reference.zero_grad()


def compare_layers(names, calls):
    for name in names:
        for call in calls:
            options = LAYERS[name]
            if "positions" in call and "conv" in name:
                continue
            reference = make(options).eval()
            layer = parallel(copy.deepcopy(reference))
            torch.manual_seed(2)
            compare(layer, reference, call, name)


def compare_mesh():
    """Data x sequence: noise is one along a sequence, and another in each row of the mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    layer = make(LAYERS["sine"]).train()
    parallelize_module(layer, mesh["sequence"], SPESequenceParallel(equal_lengths=True))
    generator = torch.Generator().manual_seed(3)
    whole, grad = torch.randn(2, 1, 8, DIM, dtype=torch.float64, generator=generator)
    row, column = mesh.get_coordinate()
    torch.manual_seed(dist.get_rank())
    own = slice(4 * column, 4 * column + 4)
    x = whole[:, own].clone().requires_grad_()
    out = layer(x, x, x, is_causal=True)[0]
    out.backward(grad[:, own])
    rows = []  # outputs and inputs of the whole sequence, with the noise of each row's first rank
    references = [make(LAYERS["sine"], resample="never").train() for _ in range(2)]
    for data, reference in enumerate(references):
        torch.manual_seed(2 * data)
        reference.seed = draw_seed(None, "cpu").item()
        y = whole.clone().requires_grad_()
        rows.append((reference(y, y, y, is_causal=True)[0], y))
        rows[-1][0].backward(grad)
    assert error(rows[0][0], rows[1][0]) > 1e-3
    assert error(out, rows[row][0][:, own]) < 1e-9
    assert error(x.grad, rows[row][1].grad[:, own]) < 1e-8
    for parameter, *of_rows in zip(*(m.parameters() for m in (layer, *references)), strict=True):
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            assert error(parameter.grad, sum(p.grad for p in of_rows)) < 1e-7


def compare_in_training(names):
    """Noise: that of the seed that the first rank draws, whatever the others' generators hold."""
    for name in names:
        layer = parallel(make(LAYERS[name])).train()
        x = cut(torch.randn(2, DIM, LENGTH, dtype=torch.float64)).mT
        with torch.no_grad():
            torch.manual_seed(dist.get_rank())
            first = layer(x, x, x)[0]
            torch.manual_seed(dist.get_rank())
            again = layer(x, x, x)[0]
            assert torch.equal(again, first)
            other = layer(x, x, x)[0]
            assert x.shape[1] == 0 or error(other, first) > 1e-4
        reference = make(LAYERS[name], resample="never").train()
        torch.manual_seed(0)
        reference.seed = draw_seed(None, "cpu").item()
        if isinstance(reference.feature_map, PositiveFeatures):
            reference.feature_map.seed = reference.seed
            reference.feature_map.resample = "never"
            reference.feature_map.reset_parameters()
        for call in ("causal", "not causal"):
            torch.manual_seed(2)
            compare(layer, reference, call, name, lambda: torch.manual_seed(dist.get_rank()))


def compare_bfloat16(names):
    """Layers in bfloat16 are as near to float64 as those of one process."""
    for name in names:
        reference = make(LAYERS[name]).eval().bfloat16()
        layer, exact = parallel(copy.deepcopy(reference)), copy.deepcopy(reference).double()
        torch.manual_seed(2)
        whole, grad = torch.randn(2, 2, LENGTH, DIM).bfloat16()
        results = []
        for module in (exact, reference, layer):
            pieces = (whole, grad) if module is not layer else (cut(y.mT).mT for y in (whole, grad))
            x, g = (y.to(module.out_proj.weight.dtype) for y in pieces)
            x = x.detach().requires_grad_()
            out = module(x, x, x, is_causal=True)[0]
            out.backward(g)
            parts = [out, x.grad]
            if module is layer:
                for parameter in module.parameters():
                    if parameter.grad is not None:
                        dist.all_reduce(parameter.grad)
            else:
                parts = [cut(y.mT).mT for y in parts]
            results.append(parts + [p.grad for p in module.parameters() if p.grad is not None])
        for wanted, of_one, got in zip(*results, strict=True):
            assert error(got, wanted) < max(2 * error(of_one, wanted), 2**-7), name


def compare_grids():
    """Rows of a grid on each rank."""
    ends = {2: (3, 5), 4: (1, 2, 2, 5)}[dist.get_world_size()]
    begin, end = (0, *ends)[dist.get_rank()], ends[dist.get_rank()]
    for options in ({"position": "exact"}, {"position": "sine"},
                    {"position": "conv", "kernel_size": 3}):  # fmt: skip
        options["ndim"] = 2
        reference = make(options).eval()
        layer = parallel(copy.deepcopy(reference))
        torch.manual_seed(2)
        whole = torch.randn(2, 5, 4, DIM, dtype=torch.float64)
        x = whole[:, begin:end].clone().requires_grad_()
        whole.requires_grad_()
        expected, out = reference(whole, whole, whole)[0], layer(x, x, x)[0]
        expected.square().sum().backward()
        out.square().sum().backward()
        assert error(x.grad, whole.grad[:, begin:end]) < 1e-11
        for p, q in zip(layer.parameters(), reference.parameters(), strict=True):
            if q.grad is not None:
                dist.all_reduce(p.grad)
                assert error(p.grad, q.grad) < 1e-11
        flat = x.flatten(1, 2)
        with torch.no_grad():
            expected = expected[:, begin:end]
            assert error(out, expected) < 1e-12
            got = layer(flat, flat, flat, grid=(end - begin, 4))[0]
            assert error(got, expected.flatten(1, 2)) < 1e-12
            with pytest.raises(ValueError, match="positions or grid must be given"):
                layer(flat, flat, flat)


def gradients(model, x, use_reentrant):
    """Gradients of the parameters; each layer in a checkpoint, unless `use_reentrant` is None."""
    torch.manual_seed(dist.get_rank())
    model.zero_grad()
    y = x.detach().requires_grad_()
    for layer in model:
        if use_reentrant is None:
            y = layer(y, is_causal=True)
        else:
            y = checkpoint(layer, y, None, None, True, use_reentrant=use_reentrant)
    y.square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def compare_checkpointed():
    """A model: layers of both norm orders, in checkpoints, in each layout of the input."""
    for batch_first in (False, True):
        torch.manual_seed(1)
        model = torch.nn.ModuleList(
            SPETransformerEncoderLayer(
                DIM, HEADS, 32, 0.0, batch_first=batch_first, norm_first=norm_first, **options
            )
            for norm_first, options in ((False, {}), (True, {"position": "sine"}))
        ).double()
        whole = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
        x = cut(whole.mT).mT
        if not batch_first:
            x = x.transpose(0, 1)
        model = parallel(model)
        plain = gradients(model, x, None)
        for use_reentrant in (False, True):
            got = gradients(model, x, use_reentrant)
            for a, b in zip(got, plain, strict=True):
                assert torch.equal(a, b)


def compare_compiled(most_gathered=None):
    """As one graph, with the exchanges in it: an all-gather, or doubling as gloo has it."""
    if most_gathered is not None:
        exchange.most_gathered = lambda *_: most_gathered
    layer = parallel(make({}), equal_lengths=True)
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, DIM, dtype=torch.float64, requires_grad=True)
    results = []
    for call in (layer, fast):
        out = call(x, x, x, is_causal=True)[0]
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        results.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    for a, b in zip(*results, strict=True):
        assert error(a, b) < 1e-12


def check_errors():
    rank = dist.get_rank()
    x = torch.randn(1, 4, DIM)

    def layer(seed=0, **options):
        torch.manual_seed(1)
        attention = SPEMultiheadAttention(DIM, HEADS, batch_first=True, seed=seed)
        return parallel(attention, **options)

    with pytest.raises(RuntimeError, match=r"got other values of: seed; this is rank \d of 2"):
        layer(seed=rank)(x, x, x)
    other = layer()
    with torch.no_grad():
        other.out_proj.bias[rank] += 1.0
    with pytest.raises(RuntimeError, match=r"other values of: parameter out_proj\.bias; this"):
        other(x, x, x)
    model = SPETransformerEncoderLayer(DIM, HEADS, 32, batch_first=True)
    with torch.no_grad():  # a part of the module that is not attention's
        model.linear1.weight[rank] += 1.0
    parallel(model)
    for module in (model, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match=r"other values of: parameter linear1\.weight; this"):
            module(x)
    with pytest.raises(RuntimeError, match="other values of: is_causal; this"):
        layer()(x, x, x, is_causal=rank == 0)
    with pytest.raises(RuntimeError, match=r"other values of: mode \(train or eval\); this"):
        layer().train(rank == 0)(x, x, x)
    y = x.expand(1 + rank, -1, -1)
    with pytest.raises(RuntimeError, match=r"other values of: inputs \(batch, features, type\)"):
        layer()(y, y, y)
    y = x[:, : 3 + rank]
    with pytest.raises(RuntimeError, match="other values of: inputs"):
        layer(equal_lengths=True)(y, y, y)
    equal = layer(equal_lengths=True)
    assert torch.equal(equal(x, x, x)[0], layer()(x, x, x)[0])
    with pytest.raises(RuntimeError, match=r"SPESequenceParallel: torch\.jit\.trace is not supp"):
        torch.jit.trace(lambda x: equal(x, x, x)[0], x, check_trace=False)
    # Beside calls of the layer nothing is exchanged, also not after one that has failed.
    with pytest.raises(ValueError, match="key_padding_mask must have shape"):
        equal(x, x, x, x[0, :, 0] > 0)
    if rank == 0:
        assert equal.attention_weights(x).shape == (1, HEADS, 4, 4)
        assert equal.initial_state(1).position == 0
        with pytest.raises(ValueError, match="state must be None where a sequence is cut"):
            equal(x, x, x, state=equal.initial_state(1))
        with pytest.raises(ValueError, match="key must be as long as query on every rank"):
            equal(x, x[:, :2], x[:, :2])
        with pytest.raises(ValueError, match="module must not be parallel already"):
            SPESequenceParallel()._apply(equal, init_device_mesh("cpu", (2,)))
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(equal)


def shard():
    """Parts of sharded parameters, which differ from rank to rank, are not compared."""
    options = {"batch_first": True, "position": None, "feature_map": "relu"}
    for use_orig_params in (None, False, True):
        torch.manual_seed(1)
        layers = [SPETransformerEncoderLayer(DIM, HEADS, 32, **options) for _ in range(2)]
        attention = layers[0].self_attn
        model = parallel(torch.nn.Sequential(*layers))
        for index, layer in enumerate(layers):
            if use_orig_params is None:
                fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
            else:
                model[index] = FullyShardedDataParallel(
                    layer, device_id=torch.device("cpu"), use_orig_params=use_orig_params
                )
        model(torch.randn(1, 4, DIM)).sum().backward()
        assert attention._ranks._agreed


def everything(ranks):
    if ranks == 2:
        compare_layers(LAYERS, ["not causal", "causal"])
        compare_layers(["default", "rotary, decay", "data", "sine"], list(CALLS)[2:])
        compare_layers(["conv"], ["padding", "packed, causal"])
        compare_in_training([*NOISY, "random map"])
        compare_bfloat16(["default", "sine"])
        compare_checkpointed()
        compare_compiled()
        compare_compiled(8)
        check_errors()
    else:
        compare_layers(["default", "sine", "data"], CALLS)
        compare_mesh()
    compare_grids()


@pytest.mark.parametrize("ranks", [2, 4])
def test_layers_of_several_ranks(ranks, tmp_path):
    run_on_ranks(everything, ranks, tmp_path, ranks)


def all_layers():
    compare_layers(LAYERS, ["not causal", "causal"])
    compare_in_training(NOISY)


@pytest.mark.long
def test_all_layers_of_four_ranks(tmp_path):
    run_on_ranks(all_layers, 4, tmp_path)


@pytest.mark.long
def test_compiled_on_four_ranks(tmp_path):
    run_on_ranks(compare_compiled, 4, tmp_path)


def test_hashes(monkeypatch):
    x = torch.arange(8).cfloat()
    expected = agreement.hash_tensor(x)
    assert expected != agreement.hash_tensor(x.flip(0))
    monkeypatch.setattr(agreement, "_CHUNK", 3)
    assert agreement.hash_tensor(x) == expected
    assert agreement.hash_tensor(x[:0]) == 0


def test_sharded_parameters(tmp_path):
    run_on_ranks(shard, 2, tmp_path)


def test_of_one_rank(tmp_path):
    with pytest.raises(RuntimeError, match=r"torch\.distributed has no process group"):
        SPESequenceParallel()._apply(make({}), None)
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        with pytest.raises(ValueError, match="module must be or contain a SPEMultiheadAttention"):
            parallel(torch.nn.Linear(2, 2))
        with pytest.raises(ValueError, match="must have no SPETransformerDecoderLayer"):
            parallel(SPETransformerDecoderLayer(DIM, HEADS))
        with pytest.raises(ValueError, match="module must be without add_bias_kv and add_zero"):
            parallel(make({}, add_zero_attn=True))
        with pytest.raises(ValueError, match="must have one dimension, that of the sequence"):
            SPESequenceParallel()._apply(make({}), init_device_mesh("cpu", (1, 1)))
        compare_layers(["default", "sine"], ["causal", "packed"])
        mesh = init_device_mesh("cpu", (1,))
        x = distribute_tensor(torch.randn(2, 6, DIM), mesh, [Shard(1)])
        layer = parallel(make({}))
        with pytest.raises(TypeError, match=r"query must be this rank's piece .* its to_local\(\)"):
            layer(x, x, x)
        q = distribute_tensor(torch.randn(2, 6, 2, 4), mesh, [Shard(1)])
        with pytest.raises(TypeError, match="linear_attention: q must be this rank's piece"):
            linear_attention(q, q, q)
    finally:
        dist.destroy_process_group()
