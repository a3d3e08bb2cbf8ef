"""Every module can be drawn again; its state is what the state dict and the seed give."""

import copy

import pytest
import torch
from helpers import randn
from torch import nn

import torch_spe
from torch_spe import (
    ConvSPE,
    LinearAttention,
    Position,
    PositiveFeatures,
    RotaryPositions,
    SineSPE,
    SPEFilter,
    SPEMultiheadAttention,
    SPESoftmaxFilter,
    SPETransformerDecoderLayer,
    SPETransformerEncoderLayer,
)
from torch_spe.initialization import reset_modules

pytestmark = pytest.mark.usefixtures("device", "one_thread")


class Learned(Position):
    """A position that holds another module and has no reset_parameters of its own."""

    def __init__(self, num_heads, in_features):
        super().__init__()
        self.num_heads, self.in_features = num_heads, in_features
        self.inner = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))

    def draw(self, *args, **keywords):
        return torch_spe.positions.none.NoEncoder()


def attention(**options):
    return SPEMultiheadAttention(16, 2, batch_first=True, **options)


def attend(layer):
    x = randn(2, 9, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float32)
    if isinstance(layer, SPEMultiheadAttention):
        y = x[..., : layer.kdim]
        return layer(x, y, y)[0]
    return layer(x)


def features(layer):
    x = randn(2, 9, 2, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float32)
    if isinstance(layer, LinearAttention):
        return layer(x, x, x)
    if isinstance(layer, PositiveFeatures):
        return layer(x)
    if isinstance(layer, SPEFilter):
        code = SineSPE(2, 8, 4)
        with torch.no_grad():
            for parameter in code.parameters():
                parameter.fill_(0.5)
        return torch.cat(layer(x, x, code((1, 9), seed=1), seed=2))
    if isinstance(layer, RotaryPositions):
        return layer(x)
    if isinstance(layer, torch_spe.Decay):
        return layer(x[..., 0, :])
    return torch.cat([*layer((1, 9), seed=1).materialize()])


# Every class with parameters or buffers, and whatever a layer is made of.
MODULES = {
    "PositiveFeatures": (lambda: PositiveFeatures(8, 12, seed=4), features),
    "PositiveFeatures, iid": (lambda: PositiveFeatures(8, 12, orthogonal=False), features),
    "PositiveFeatures, float64": (lambda: PositiveFeatures(8, dtype=torch.float64), features),
    "LinearAttention": (lambda: LinearAttention(PositiveFeatures(8, 12)), features),
    "SineSPE": (lambda: SineSPE(2, 8, 4, 3), features),
    "SineSPE, spread": (lambda: SineSPE(2, 8, 4, init="spread"), features),
    "SineSPE, phase": (lambda: SineSPE(2, 8, 4, noise="phase", bandwidth=True), features),
    "SineSPE, exact": (lambda: SineSPE(2, 8, noise="exact"), features),
    "ConvSPE": (lambda: ConvSPE(1, 2, 8, 4, 3), features),
    "ConvSPE, delta": (lambda: ConvSPE(1, 2, 8, 4, 3, init="delta"), features),
    "RotaryPositions": (lambda: RotaryPositions(2, 8), features),
    "RotaryPositions, learned": (lambda: RotaryPositions(2, 8, frequencies="learned"), features),
    "RotaryPositions, random": (lambda: RotaryPositions(2, 8, frequencies="random"), features),
    **{
        f"Decay, {kind}": (
            lambda kind=kind: torch_spe.Decay(2, kind, in_features=8, embed_dim=8), features
        )
        for kind in ("learned", "fixed", "feature", "data")
    },
    "SPEFilter": (lambda: SPEFilter(code_shape=(2, 8)), features),
    "SPESoftmaxFilter": (lambda: SPESoftmaxFilter(code_shape=(2, 8)), features),
    **{
        f"attention, {position}": (lambda position=position: attention(position=position), attend)
        for position in ("sine", "paper", "conv", "rotary", None, Learned)
    },
    "attention, random features": (
        lambda: attention(position="rotary", feature_map=PositiveFeatures(8, 12)),
        attend,
    ),
    "attention, kdim": (lambda: attention(kdim=8, vdim=8), attend),
    "attention, no bias": (lambda: attention(bias=False), attend),
    **{
        f"attention, decay {kind}": (
            lambda kind=kind: attention(position="exact", decay=kind), attend
        )
        for kind in ("learned", "fixed", "feature", "data")
    },
    "layer": (lambda: SPETransformerEncoderLayer(16, 2, 24, batch_first=True), attend),
    "decoder layer": (
        lambda: SPETransformerDecoderLayer(16, 2, 24, batch_first=True),
        lambda layer: layer(*2 * [torch.ones(2, 5, 16)]),
    ),
    "layer, random features": (
        lambda: SPETransformerEncoderLayer(
            16, 2, 24, batch_first=True, position="conv", kernel_size=3,
            feature_map=PositiveFeatures(12, 12), num_realizations=12, encode="inputs",
        ),
        attend,
    ),
}  # fmt: skip
for_modules = pytest.mark.parametrize("name", MODULES)


def make(name, seed=0):
    torch.manual_seed(seed)
    return MODULES[name][0]().eval()


def on_meta(name):
    with torch.device("meta"):
        return MODULES[name][0]().eval()


def tensors(module):
    """All state, of the state dict or not."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def assert_same(got, expected):
    got, expected = tensors(got), tensors(expected)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@torch.no_grad()
def spoil(module):
    """What to_empty leaves, at its worst."""
    for tensor in tensors(module).values():
        tensor.fill_(1e34)


@for_modules
def test_reset_parameters_draws_what_the_constructor_draws(name):
    expected, got = make(name), make(name, 1)
    spoil(got)
    torch.manual_seed(0)
    reset_modules(got)
    assert_same(got, expected)
    for parameter in got.parameters():
        assert parameter.requires_grad
        assert parameter.grad_fn is None


def reset_every_module(module):
    """What programs do: a layer's own comes before those of what it holds."""
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()


@for_modules
def test_reset_parameters_of_every_module_in_turn(name):
    expected, got = make(name), make(name, 1)
    spoil(got)
    reset_every_module(got)
    got = tensors(got)
    for key, wanted in tensors(expected).items():
        if wanted.min() == wanted.max():  # zeros and ones
            assert torch.equal(got[key], wanted), key
        elif wanted.numel() < 64:
            assert got[key].abs().max() < 100, key
        else:
            assert got[key].std().item() == pytest.approx(wanted.std().item(), rel=0.3), key


@for_modules
@torch.no_grad()
def test_meta_to_empty_and_a_checkpoint(name):
    good, bad = make(name), on_meta(name)
    bad.to_empty(device=torch.get_default_device())
    # What was in memory, of the tensors that a checkpoint fills.
    for tensor in bad.state_dict().values():
        tensor.fill_(1e34)
    bad.load_state_dict(good.state_dict())
    assert_same(bad, good)
    assert torch.equal(MODULES[name][1](bad), MODULES[name][1](good))


@for_modules
@torch.no_grad()
def test_meta_and_a_checkpoint_that_is_assigned(name):
    good, bad = make(name), on_meta(name)
    bad.load_state_dict(good.state_dict(), assign=True)
    assert torch.equal(MODULES[name][1](bad), MODULES[name][1](good))
    assert_same(bad, good)


@for_modules
@pytest.mark.parametrize("through_meta", [False, True])
@torch.no_grad()
def test_what_fsdp1_does_before_it_shards(name, through_meta):
    """to_empty of every module for itself, then reset_parameters of those with tensors."""
    module = on_meta(name) if through_meta else make(name)
    expected = make(name)
    for part in module.modules():
        own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if own:
            part.to_empty(device=torch.get_default_device(), recurse=False)
            part.reset_parameters()
    for tensor in tensors(module).values():
        assert not tensor.is_meta
        assert tensor.abs().max() < 100
    # Drawn from the generator, or always the same.
    for part, like in zip(module.modules(), expected.modules(), strict=True):
        if isinstance(part, PositiveFeatures):
            assert torch.equal(part.weight, like.weight)
    assert MODULES[name][1](module).isfinite().all()


@for_modules
@torch.no_grad()
def test_to_empty_leaves_what_no_checkpoint_holds(name):
    module, expected = make(name), make(name)
    module.to_empty(device=torch.get_default_device())
    saved = module.state_dict().keys()
    for key, tensor in tensors(expected).items():
        if key not in saved:
            assert torch.equal(tensors(module)[key], tensor)


@for_modules
def test_no_tensor_hides_in_an_attribute(name):
    """Only parameters and buffers move with a module, and are loaded."""

    def held(value):
        if isinstance(value, torch.Tensor):
            return [value]
        if isinstance(value, dict):
            return [t for v in value.values() for t in held(v)]
        if isinstance(value, list | tuple | set):
            return [t for v in value for t in held(v)]
        return []

    module = make(name)
    MODULES[name][1](module)
    for part in module.modules():
        plain = {k: v for k, v in vars(part).items() if k not in ("_parameters", "_buffers")}
        assert held(plain) == []


def test_rows_through_conversions():
    phi = PositiveFeatures(8, 12)
    rows = phi.weight.clone()
    assert torch.equal(copy.deepcopy(phi).double().weight, rows.double())
    assert torch.equal(copy.deepcopy(phi).half().weight, rows.half())
    assert torch.equal(copy.deepcopy(phi).bfloat16().weight, rows.bfloat16())
    assert torch.equal(copy.deepcopy(phi).float().weight, rows)
    moved = copy.deepcopy(phi).to("meta")
    assert moved.weight.is_meta
    assert torch.equal(moved.to_empty(device=rows.device).weight, rows)
    assert phi.state_dict() == {}
    if rows.device.type == "cpu":
        assert phi.share_memory().weight.is_shared()
        assert torch.equal(phi.weight, rows)


def test_every_module_of_the_package_is_here():
    def subclasses(kind):
        return {kind} | {s for k in kind.__subclasses__() for s in subclasses(k)}

    # Models and exporters, if they are imported, have no parameters but those of modules.
    apart = ("torch_spe.hf", "torch_spe.models", "torch_spe.onnx")
    ours = {k for k in subclasses(nn.Module) if k.__module__.startswith("torch_spe")}
    ours = {k for k in ours if not k.__module__.startswith(apart)}
    abstract = {
        Position, torch_spe.precision.Float32Module, torch_spe.positions.spe.SPE,
        torch_spe.flat_parameters.FlatParameterModule, torch_spe.attention.layers._Layer,
        torch_spe.attention.projections.HeadProjections, torch_spe.initialization.EagerModule,
    }  # fmt: skip
    seen = {type(part) for name in MODULES for part in make(name).modules()}
    stateless = {torch_spe.positions.NoPositions}
    assert ours - abstract - stateless <= seen
    for kind in ours - abstract - stateless - {LinearAttention}:
        assert callable(kind.reset_parameters)
