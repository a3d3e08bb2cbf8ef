"""Layers of every position kind compiled, exported, traced, and under transforms of torch.func."""

import copy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import error
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, linearize, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import torch_spe
from torch_spe import (
    LinearAttention,
    PositiveFeatures,
    SPEMultiheadAttention,
    SPETransformerDecoderLayer,
    SPETransformerEncoderLayer,
)

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
DIM, HEADS = 16, 2
KINDS = {
    "fading": {},
    "exact": {"position": "exact"},
    "sine": {"position": "sine"},
    "paper": {"position": "paper"},
    "conv": {"position": "conv", "kernel_size": 4},
    "rotary": {"position": "rotary", "frequencies": "learned"},
    "none": {"position": None},
    "data": {"decay": "data"},
    "feature": {"decay": "feature"},
}
for_every_kind = pytest.mark.parametrize("kind", KINDS)


def attention(kind, **options):
    return SPEMultiheadAttention(DIM, HEADS, batch_first=True, **KINDS[kind], **options)


class Everything(nn.Module):
    """A layer of each kind, and the encoder and decoder layers."""

    def __init__(self, random_map=True):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(attention(kind) for kind in KINDS)
        if random_map:
            self.layers.append(attention("sine", feature_map=PositiveFeatures(8, 12)))
        self.encoder = SPETransformerEncoderLayer(DIM, HEADS, 32, 0.0, batch_first=True)
        self.decoder = SPETransformerDecoderLayer(DIM, HEADS, 32, 0.0, batch_first=True)

    def forward(self, x, start=0):
        for layer in self.layers:
            x = x + layer(x, x, x, is_causal=True, start=start)[0]
        return self.decoder(self.encoder(x, start=start), x, tgt_is_causal=True)


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.long)])
def test_one_graph_for_all_lengths_and_starts(training):
    model = Everything().train(training)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    fast = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for length, start in ((20, 0), (9, 0), (33, 5), (7, 6), (8, -3)):
        x = torch.randn(2, length, DIM)
        out = fast(x, start)
        out.sum().backward()
        if not training:
            assert error(out, model(x, start)) < 1e-5
    assert counter.frame_count == 1  # with the eager backend; others count the backward pass too
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dynamic", [None, True])
def test_queries_and_keys_of_different_lengths(dynamic):
    layer = SPEMultiheadAttention(DIM, HEADS, batch_first=True).eval()
    torch._dynamo.reset()
    fast = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="eager")
    for queries, keys in ((7, 5), (5, 9), (6, 6)):
        x, y = torch.randn(2, queries, DIM), torch.randn(2, keys, DIM)
        assert error(fast(x, y, y)[0], layer(x, y, y)[0]) < 1e-5


def test_one_graph_for_all_starts_with_fractions():
    layer = SPETransformerEncoderLayer(DIM, HEADS, 32, 0.0, batch_first=True).eval()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    fast = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for length, start in ((20, 0.5), (9, -1.25), (7, 1e6 + 0.75)):
        x = torch.randn(2, length, DIM)
        assert error(fast(x, start=start), layer(x, start=start)) < 1e-5
    assert counter.frame_count == 1


def test_one_graph_for_all_steps_of_generation():
    layer = SPETransformerEncoderLayer(DIM, HEADS, 32, 0.0, batch_first=True).eval()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    fast = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    x = torch.randn(2, 8, DIM)
    with torch.no_grad():
        whole, state = layer(x, is_causal=True), layer.initial_state(2)
        for n in range(8):
            out, state = fast(x[:, n : n + 1], state=state)
            assert error(out[:, 0], whole[:, n]) < 1e-5
    # The first position is a number of its own to torch.compile.
    assert counter.frame_count <= 2


def test_exported_with_any_length_and_without_values():
    model = Everything(random_map=False).eval()
    x = torch.randn(2, 20, DIM)
    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(model, (x,), dynamic_shapes=({1: length},))
    for n in (20, 9):
        assert error(exported.module()(x[:, :n]), model(x[:, :n])) < 1e-5


@pytest.mark.parametrize("position", ["fading", "rotary", None])
def test_exported_with_any_number_of_packed_sequences(position):
    layer = SPETransformerEncoderLayer(DIM, HEADS, 32, 0.0, batch_first=True, position=position)
    layer.eval()
    # Two sequences or more: PyTorch takes a size of 1 for a constant.
    length, bounds = (torch.export.Dim(name, min=3, max=4096) for name in ("length", "bounds"))
    exported = torch.export.export(
        layer,
        (torch.randn(1, 9, DIM),),
        {"cu_seqlens": torch.tensor([0, 4, 6, 7, 9]), "is_causal": True},
        dynamic_shapes={"src": {1: length}, "cu_seqlens": {0: bounds}, "is_causal": None},
    ).module()
    for ends in ([0, 5, 12], [0, 2, 5, 6, 6, 7, 9]):
        x, keywords = torch.randn(1, ends[-1], DIM), {"cu_seqlens": torch.tensor(ends)}
        keywords["is_causal"] = True
        assert error(exported(x, **keywords), layer(x, **keywords)) < 1e-5


@pytest.mark.parametrize("start", [torch.tensor(3), torch.tensor(-1.5)])
def test_a_start_of_no_dimension(start):
    layer = SPETransformerEncoderLayer(DIM, HEADS, 32, 0.0, batch_first=True).eval()
    torch._dynamo.reset()
    fast = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for batch in (1, 3):
        x = torch.randn(batch, 6, DIM)
        assert error(fast(x, start=start), layer(x, start=start)) < 1e-5
        assert error(fast(x, start=start), layer(x, start=start.item())) < 1e-5


def test_without_noise_nothing_is_drawn_in_training():
    """A state, bounds and starts need a seed only where there is noise."""
    layer = SPETransformerEncoderLayer(DIM, HEADS, 32, 0.0, batch_first=True).train()
    x = torch.randn(2, 5, DIM)
    before = torch.get_rng_state()
    expected, _ = layer(x, state=layer.initial_state(2))
    layer(x, start=torch.tensor([0, 4]))
    layer(x[:1], cu_seqlens=torch.tensor([0, 2, 5]), is_causal=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch._dynamo.reset()
    call = torch.compile(
        lambda x: layer(x, state=layer.initial_state(2))[0], fullgraph=True, backend="eager"
    )
    assert error(call(x), expected) < 1e-5
    out = vmap(lambda x: layer(x[None], state=layer.initial_state(1))[0][0])(x)
    assert error(out, expected) < 1e-5
    noisy = SPEMultiheadAttention(DIM, HEADS, position="paper").train()
    before = torch.get_rng_state()
    noisy.initial_state(2)
    assert not torch.equal(torch.get_rng_state(), before)


def test_shapes_without_values():
    model, x = Everything(random_map=False).eval(), torch.randn(3, 7, DIM)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(x).shape == (3, 7, DIM)
        made = Everything()
        assert made(torch.empty(3, 7, DIM)).shape == (3, 7, DIM)
    with mode:
        made(torch.empty(2, 9, DIM)).sum().backward()


@for_every_kind
def test_transforms(kind):
    torch.manual_seed(1)
    models = [attention(kind).eval() for _ in range(3)]
    x = torch.randn(2, 6, DIM)
    parameters = {name: p.detach() for name, p in models[0].named_parameters()}

    def loss(parameters, x):
        return functional_call(models[0], parameters, (x, x, x), {"is_causal": True})[0].sum()

    got = grad(loss)(parameters, x)
    models[0](x, x, x, is_causal=True)[0].sum().backward()
    for name, parameter in models[0].named_parameters():
        assert error(got[name], parameter.grad) < 1e-5, name
    of_each = vmap(grad(loss), (None, 0))(parameters, x.unsqueeze(1))
    for name, both in of_each.items():
        assert error(both.sum(0), got[name]) < 1e-4, name
    stacked, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0])

    def call(parameters, buffers, x):
        return functional_call(base, (parameters, buffers), (x, x, x))[0]

    ensemble = vmap(call, (0, 0, None))(stacked, buffers, x)
    for out, model in zip(ensemble, models, strict=True):
        assert error(out, model(x, x, x)[0]) < 1e-5
    with pytest.raises(NotImplementedError, match=r"forward-mode derivatives .* not implemented"):
        jvp(lambda x: loss(parameters, x), (x,), (x,))
    with pytest.raises(NotImplementedError, match=r"forward-mode derivatives .* not implemented"):
        linearize(lambda x: models[0](x, x, x)[0], x)


def test_vmap_over_positions_and_masks():
    layer = SPEMultiheadAttention(DIM, HEADS, batch_first=True)
    x = torch.randn(3, 2, 6, DIM)
    positions = torch.rand(3, 6).cumsum(1)
    padding = torch.zeros(3, 2, 6).masked_fill(torch.rand(3, 2, 6) > 0.7, -torch.inf)

    def call(x, positions, padding):
        return layer(x, x, x, padding, positions=positions)[0]

    entries = zip(x, positions, padding, strict=True)
    expected = torch.stack([call(*entry) for entry in entries])
    assert error(vmap(call)(x, positions, padding), expected) < 1e-5


def test_vmap_over_bounds_and_starts():
    layer = SPEMultiheadAttention(DIM, HEADS, batch_first=True).eval()
    x = torch.randn(3, 1, 8, DIM)
    bounds = torch.tensor([[0, 3, 8], [0, 0, 8], [0, 7, 8]])

    def call(x, bounds):
        return layer(x, x, x, is_causal=True, cu_seqlens=bounds)[0]

    expected = torch.stack([call(*entry) for entry in zip(x, bounds, strict=True)])
    assert error(vmap(call)(x, bounds), expected) < 1e-5
    wrong = bounds.clone()
    wrong[1, 1] = 9
    with pytest.raises((ValueError, RuntimeError), match="cu_seqlens"):
        vmap(call)(x, wrong)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 8"):
        grad(lambda x: call(x, wrong[1]).sum())(x[1])
    with pytest.raises(TypeError, match="start must be a number, got a tensor that vmap maps over"):
        vmap(lambda x, start: layer(x, x, x, start=start)[0])(x, torch.arange(3))


@for_every_kind
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx(kind, pre_dispatch):
    layer = attention(kind).eval()
    x, y = torch.randn(2, 2, 6, DIM)

    def attend(x):
        return layer(x, x, x)[0]

    def call(parameters, x):
        return functional_call(layer, parameters, (x, x, x))[0]

    parameters = dict(layer.named_parameters())
    of_layer = make_fx(attend, pre_dispatch=pre_dispatch)(x)
    of_values = make_fx(call, pre_dispatch=pre_dispatch)(parameters, x)
    assert torch.equal(of_layer(y), attend(y))
    with torch.no_grad():
        changed = {name: p + 0.1 for name, p in parameters.items()}
        assert torch.equal(of_values(changed, y), call(changed, y))


@for_every_kind
@pytest.mark.parametrize("training", [False, True])
def test_traced_for_any_shape(kind, training):
    layer = SPETransformerEncoderLayer(DIM, HEADS, 32, 0.0, batch_first=True, **KINDS[kind])
    layer.train(training)
    noisy = training and kind in ("sine", "paper", "conv")
    with torch.no_grad():
        traced = torch.jit.trace(layer, torch.randn(2, 6, DIM), check_trace=not noisy)
        x = torch.randn(3, 9, DIM)
        torch.manual_seed(1)
        out = traced(x)
        torch.manual_seed(1)
        assert error(out, layer(x)) < 1e-6


@pytest.mark.parametrize(
    "module",
    [attention("none"), SPETransformerEncoderLayer(DIM, HEADS), LinearAttention(),
     nn.Sequential(SPETransformerDecoderLayer(DIM, HEADS)), PositiveFeatures(8)],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_scripting_is_refused(module):
    with pytest.raises(
        TypeError, match=r"torch\.jit\.script cannot compile it: use torch\.compile"
    ):
        torch.jit.script(module)


def test_scripted_functions_call_operators():
    def attend(q, k, v):
        return torch.ops.torch_spe.linear_attention(q, k, v, causal=True)[0]

    q, k, v = torch.randn(3, 1, 5, HEADS, 8)
    expected = torch_spe.functional.linear_attention(q, k, v, causal=True)
    assert torch.equal(torch.jit.script(attend)(q, k, v), expected)


@pytest.mark.parametrize("kind", ["fading", "paper"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(kind, use_reentrant):
    layer = SPETransformerEncoderLayer(DIM, HEADS, 32, 0.1, batch_first=True, **KINDS[kind])
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        x = torch.randn(2, 6, DIM, requires_grad=True)
        if checkpointed:
            call = torch.utils.checkpoint.checkpoint
            out = call(layer, x, None, None, True, use_reentrant=use_reentrant)
        else:
            out = layer(x, is_causal=True)
        gradients.append(torch.autograd.grad(out.sum(), x)[0] if not use_reentrant else None)
        if use_reentrant:
            out.sum().backward()
            gradients[-1] = x.grad
    assert torch.equal(*gradients)


def test_no_operator_has_an_argument_that_packages_get_wrong():
    """AOTInductor passes the number of a type on as another type's."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("torch_spe::")]
    assert len(schemas) > 10
    for schema in schemas:
        assert "ScalarType" not in str(schema), schema


@pytest.mark.long
def test_packages_of_aotinductor(tmp_path):
    """From Python, and from a C++ program that links the library."""
    model = Everything(random_map=False).eval()
    x = torch.randn(2, 20, DIM)
    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(model, (x,), dynamic_shapes=({1: length},))
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=f"{tmp_path}/model.pt2",
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
    )  # fmt: skip
    fast = torch._inductor.aoti_load_package(package)
    for n in (20, 9, 33):
        x = torch.linspace(-1, 1, 2 * n * DIM).view(2, n, DIM)
        with torch.no_grad():
            out = fast(x)
            assert error(out, model(x)) < 1e-5
    compiler = shutil.which("c++")
    assert compiler is not None, "no C++ compiler"
    from torch.utils.cpp_extension import include_paths

    library, of_torch = ROOT / "python/torch_spe", Path(torch.__file__).parent / "lib"
    linked = ["torch_spe", "torch", "torch_cpu", "c10"]
    if (of_torch / "libc10_cuda.so").exists():  # which the library needs if it has CUDA kernels
        linked.append("c10_cuda")
    program = tmp_path / "run_package"
    subprocess.run(
        [compiler, "-std=c++20", str(ROOT / "examples/cpp/run_package.cpp"), "-o", str(program),
         *(f"-isystem{path}" for path in include_paths()), f"-I{ROOT / 'csrc/include'}",
         *(f"-L{path}" for path in (library, of_torch)), "-Wl,--no-as-needed",
         *(f"-Wl,-rpath,{path}" for path in (library, of_torch)),
         *(f"-l{name}" for name in linked)],
        check=True,
    )  # fmt: skip
    printed = subprocess.run(
        [str(program), package, "2", "33", str(DIM)], check=True, capture_output=True, text=True
    ).stdout
    assert f"output [2, 33, {DIM}]" in printed
    assert float(printed.split("mean square ")[1]) == pytest.approx(
        out.square().mean().item(), rel=1e-4
    )
