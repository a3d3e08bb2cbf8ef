"""Half precision: parameters of positions stay float32, whatever converts the model."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import by_turns, error
from test_positions import page  # noqa: F401
from torch import nn

import torch_spe
from torch_spe import ConvSPE, Position, RotaryPositions, SineSPE, SPEFilter, SPEMultiheadAttention
from torch_spe.precision import Float32Module, float32_parameters

PAGE = Path(__file__).resolve().parents[2] / "docs" / "precision.md"
HALVES = [torch.bfloat16, torch.float16]
KINDS = {
    "sine": {"position": "sine"},
    "gaussian": {"position": "sine", "noise": "gaussian"},
    "orthogonal": {"position": "sine", "noise": "orthogonal"},
    "exact": {"position": "sine", "noise": "exact"},
    "paper": {"position": "paper"},
    "conv": {"position": "conv"},
    "rotary": {"position": "rotary"},
    "rotary learned": {"position": "rotary", "frequencies": "learned"},
    "rotary random": {"position": "rotary", "frequencies": "random"},
    "user": {"position": "user"},
}
for_every_kind = pytest.mark.parametrize("kind", KINDS)
CONVERSIONS = {
    "to": lambda m: m.to(torch.bfloat16),
    "to with a device": lambda m: m.to("cpu", torch.float16),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "type": lambda m: m.type(torch.float16),
    "deepcopy": lambda m: copy.deepcopy(m).half(),
}


def make(kind, page, width=16, **more):  # noqa: F811
    options = {**KINDS[kind], **more}
    if options["position"] == "user":
        options["position"] = page["LearnedRotation"]
    return SPEMultiheadAttention(width, 2, batch_first=True, **options)


def kept(layer):
    """Tensors of positions, gate and decay by name."""
    return {
        name: tensor
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]
        if name.startswith(("position", "filter", "decay"))
    }


def rest(layer):
    return {n: p for n, p in layer.named_parameters() if n not in kept(layer)}


def assert_kept(layer, half, before=None):
    for name, tensor in kept(layer).items():
        assert tensor.dtype == torch.float32, name
        assert before is None or torch.equal(tensor.flatten(), before[name].flatten()), name
    assert {p.dtype for p in rest(layer).values()} == {half}


@pytest.fixture
def default_bfloat16():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@for_every_kind
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversions(kind, conversion, page):  # noqa: F811
    layer = make(kind, page)
    before = {name: tensor.detach().clone() for name, tensor in kept(layer).items()}
    layer = CONVERSIONS[conversion](layer)
    assert_kept(layer, rest(layer)["out_proj.weight"].dtype, before)
    assert {t.dtype for t in layer.double().state_dict().values()} == {torch.float64}
    assert_kept(layer.half(), torch.float16, before)


@for_every_kind
def test_constructor_and_default_type(kind, page, default_bfloat16):  # noqa: F811
    for layer in (make(kind, page), make(kind, page, dtype=torch.float16)):
        assert_kept(layer, layer.out_proj.weight.dtype)
        x = torch.randn(2, 5, 16, dtype=layer.out_proj.weight.dtype)
        assert layer(x, x, x)[0].dtype == x.dtype


@pytest.mark.parametrize("module", [SineSPE, ConvSPE, RotaryPositions])
def test_modules_alone(module):
    for name, tensor in module(2, 2, dtype=torch.half).state_dict().items():
        assert tensor.dtype == torch.float32, name
    assert SPEFilter(code_shape=(2, 2), dtype=torch.half).gate.dtype == torch.float32
    assert SPEFilter(code_shape=(2, 2), dtype=torch.double).half().gate.dtype == torch.float32


@for_every_kind
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_in_half_precision(kind, assign, page):  # noqa: F811
    source, layer = make(kind, page), make(kind, page).bfloat16()
    state = {name: tensor.bfloat16() for name, tensor in source.state_dict().items()}
    layer.load_state_dict(state, assign=assign)
    assert_kept(layer, torch.bfloat16, {name: tensor.float() for name, tensor in state.items()})
    layer.load_state_dict({n: t.float() for n, t in source.state_dict().items()}, assign=False)
    assert_kept(layer, torch.bfloat16, kept(source))


@for_every_kind
def test_meta_device_and_from_pretrained(kind, page, default_bfloat16):  # noqa: F811
    # What from_pretrained(torch_dtype=...) does: the default type, the meta device, and assigning.
    with torch.device("meta"):
        layer = make(kind, page)
    assert_kept(layer, torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    source = make(kind, page)
    state = {name: t.to(layer.state_dict()[name].dtype) for name, t in source.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert_kept(layer, torch.bfloat16, kept(source))
    assert_kept(layer.to_empty(device="meta"), torch.bfloat16)
    assert_kept(layer.to_empty(device="cpu"), torch.bfloat16)


class Learned(Position):
    """A module that holds another one, and knows nothing of types."""

    def __init__(self, num_heads, in_features):
        super().__init__()
        self.num_heads, self.in_features = num_heads, in_features
        self.inner = nn.Linear(2, 3)

    def draw(self, *args, **keywords):
        return torch_spe.positions.none.NoEncoder()


def test_submodules_of_a_position(default_bfloat16):
    layer = SPEMultiheadAttention(16, 2, position=Learned)
    assert_kept(layer, torch.bfloat16)
    state = {name: tensor.bfloat16() for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert_kept(layer, torch.bfloat16)
    assert_kept(layer.half(), torch.float16)
    assert float32_parameters(layer) == set(layer.position.parameters())


def test_parameters_stay_the_same_objects():
    layer = SPEMultiheadAttention(16, 2)
    before = dict(layer.named_parameters())
    layer.bfloat16()
    assert all(parameter is before[name] for name, parameter in layer.named_parameters())


def errors(layer, x):
    """Mean errors of the first and the last 500 outputs beside the same layer in float64."""
    exact = copy.deepcopy(layer).double()
    gap = layer(x, x, x, is_causal=True)[0].double()
    x = x.double()
    expected = exact(x, x, x, is_causal=True)[0]
    gap = (gap - expected).abs().mean(dim=(0, 2))
    return torch.stack((gap[:500].mean(), gap[-500:].mean(), expected.abs().mean()))


@pytest.mark.parametrize(("kind", "dtype"), by_turns(KINDS, HALVES))
@torch.no_grad()
def test_late_positions_are_as_exact_as_early_ones(kind, dtype, page):  # noqa: F811
    fixed = KINDS[kind]["position"] in ("user", "rotary") or kind == "exact"
    total = 0
    for seed in range(3):
        torch.manual_seed(seed)
        layer = make(kind, page, 32, **({} if fixed else {"num_realizations": 32})).eval().to(dtype)
        total = total + errors(layer, torch.randn(1, 20_000, 32).to(dtype))
    first, last, scale = total.tolist()
    assert last <= 1.2 * first, (first, last, scale)


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_of_frequencies_at_long_sequences(dtype):
    # Sums over 10^5 positions with the factor 2 pi n are beyond float16.
    torch.manual_seed(0)
    layer = SPEMultiheadAttention(
        8, 2, batch_first=True, position="sine", num_realizations=4
    ).eval()
    # With the same phases: in float64 they are others, see above.
    exact = copy.deepcopy(layer)
    x = torch.randn(1, 100_000, 8)
    exact(x, x, x, is_causal=True)[0].square().mean().backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    with torch.autocast("cpu", dtype):
        out = layer(x, x, x, is_causal=True)[0]
    scaler.scale(1e3 * out.float().square().mean()).backward()
    scaler.unscale_(optimizer)
    for name, parameter in kept(exact).items():
        got = kept(layer)[name].grad
        assert got.dtype == torch.float32
        assert got.isfinite().all(), name
        assert error(got / 1e3, parameter.grad) < 0.05, (name, error(got / 1e3, parameter.grad))
    # Scaled as they are, they would not fit into float16.
    assert 1e3 * 2**8 * kept(exact)["position.freqs"].grad.abs().max() > torch.finfo(torch.half).max


def test_a_warning_for_what_is_narrow_nonetheless(monkeypatch):
    monkeypatch.setattr(torch_spe.precision, "_WARNED", set())
    layer = SPEMultiheadAttention(16, 2, position="rotary", batch_first=True)
    layer.position._buffers["freqs"] = layer.position.freqs.bfloat16()
    x = torch.randn(2, 5, 16)
    with pytest.warns(UserWarning, match="RotaryPositions: freqs is torch.bfloat16.*precision.md"):
        layer(x, x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x, x, x)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    yield
    dist.destroy_process_group()


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", ["sine", "conv", "rotary learned"])
def test_the_recipe_for_fsdp(kind, one_process, page):  # noqa: F811
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this PyTorch has no FSDP2")
    names = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)), names)
    layer = make(kind, page)
    before = {name: tensor.detach().clone() for name, tensor in kept(layer).items()}
    names["shard"](layer, torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    x = torch.randn(2, 7, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        out = layer(x, x, x, is_causal=True)[0]
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    for name, tensor in kept(layer).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])
        assert tensor.grad.dtype == torch.float32


@pytest.mark.cpu_only
def test_distributed_data_parallel(one_process):
    layer = SPEMultiheadAttention(16, 2, batch_first=True).bfloat16()
    wrapped = nn.parallel.DistributedDataParallel(layer)
    x = torch.randn(2, 7, 16, dtype=torch.bfloat16)
    wrapped(x, x, x)[0].float().square().sum().backward()
    assert_kept(layer, torch.bfloat16)
    assert layer.position.freqs.grad.dtype == torch.float32


def test_the_page_names_what_there_is():
    assert issubclass(Position, Float32Module)
    for name in ("freqs", "offsets", "gains", "bandwidths", "query_kernel", "key_kernel"):
        assert f"`{name}`" in PAGE.read_text()
