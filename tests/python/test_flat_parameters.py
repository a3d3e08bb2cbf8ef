"""Generic initialization leaves positions and gates alone; names, shapes and checkpoints stay."""

import copy
import inspect
import json
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict
from helpers import DATA
from test_positions import KINDS, layer_of
from torch import nn
from torch.nn.utils import parametrize

import torch_spe
from torch_spe import (
    ConvSPE,
    Decay,
    LinearAttention,
    PositiveFeatures,
    RotaryPositions,
    SineSPE,
    SPEFilter,
    SPEMultiheadAttention,
    SPESoftmaxFilter,
    SPETransformerDecoderLayer,
    SPETransformerEncoderLayer,
    parameter_groups,
)
from torch_spe.flat_parameters import FlatParameterModule

pytestmark = pytest.mark.cpu_only
PAGE = Path(__file__).resolve().parents[2] / "docs" / "positions.md"
MODULES = {
    "SineSPE": lambda: SineSPE(4, 16, num_sines=3),
    "SineSPE, one sine": lambda: SineSPE(1, 1),
    "SineSPE, phase": lambda: SineSPE(4, 16, num_sines=3, noise="phase", bandwidth=True),
    "SineSPE, orthogonal": lambda: SineSPE(4, 16, num_sines=3, noise="orthogonal", init="spread"),
    "SineSPE, exact": lambda: SineSPE(4, 16, num_sines=3, noise="exact"),
    "SineSPE, grid": lambda: SineSPE(4, 16, num_sines=3, ndim=2, init="spread"),
    "ConvSPE": lambda: ConvSPE(1, 4, 16, kernel_size=9),
    "ConvSPE, delta": lambda: ConvSPE(1, 4, 16, kernel_size=9, init="delta"),
    "ConvSPE, grid": lambda: ConvSPE(2, 4, 16, kernel_size=(3, 5)),
    "RotaryPositions": lambda: RotaryPositions(4, 16),
    "RotaryPositions, learned": lambda: RotaryPositions(4, 16, frequencies="learned"),
    "RotaryPositions, random": lambda: RotaryPositions(4, 16, frequencies="random"),
    "SPEFilter": lambda: SPEFilter(code_shape=(4, 16)),
    "SPEFilter, no gate": lambda: SPEFilter(gated=False),
    "SPESoftmaxFilter": lambda: SPESoftmaxFilter(code_shape=(4, 16), init="spread"),
    "PositiveFeatures": lambda: PositiveFeatures(4, 8),
    "Decay": lambda: Decay(4),
    "Decay, fixed": lambda: Decay(4, "fixed"),
    "Decay, feature": lambda: Decay(4, "feature", in_features=16),
    "Decay, data": lambda: Decay(4, "data", embed_dim=64),
    "LinearAttention": lambda: LinearAttention(),
    **{f"SPEMultiheadAttention, {p}": lambda p=p: SPEMultiheadAttention(64, 4, position=p)
       for p in ("sine", "paper", "conv", "rotary", None)},
    "SPEMultiheadAttention, learned": lambda: SPEMultiheadAttention(
        64, 4, position="rotary", frequencies="learned"),
    "SPETransformerDecoderLayer": lambda: SPETransformerDecoderLayer(64, 4, 128),
    "SPETransformerEncoderLayer": lambda: SPETransformerEncoderLayer(64, 4, 128),
}  # fmt: skip
FLAT = {
    n: m
    for n, m in MODULES.items()
    if re.match("SineSPE|ConvSPE|Rot.*learned|.*n, learned|SPE.*Filter$|Decay, data", n)
}


def initialize(model):
    """The loop of ``nn.Transformer`` and of many programs."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def huggingface(model):
    def init(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0.0, 0.02)

    model.apply(init)


def kernels(module):
    """Exact kernels of every position and filter in a module, by name."""
    found = {}
    for name, part in module.named_modules():
        if isinstance(part, torch_spe.SPE):
            found[name] = part.template(7).detach().clone()
        elif isinstance(part, SPEFilter):
            found[name] = part.template(torch.zeros(4, 16, 15)).detach().clone()
        elif isinstance(part, RotaryPositions):
            found[name] = part.draw((3,)).cycles.detach().clone()
        elif isinstance(part, PositiveFeatures):
            found[name] = part.eval().draw().weight.clone()
        elif isinstance(part, Decay):
            x = torch.ones(1, 1, 64) if part.kind == "data" else None
            found[name] = part(x).detach().clone()
    return found


def test_every_module_is_in_the_table():
    public = {
        name for name in torch_spe.__all__
        if inspect.isclass(getattr(torch_spe, name)) and issubclass(getattr(torch_spe, name),
                                                                    nn.Module)
    }  # fmt: skip
    assert public - {"SPE", "Position"} == {name.partition(",")[0] for name in MODULES}


@pytest.mark.parametrize("loop", [initialize, huggingface])
@pytest.mark.parametrize("name", MODULES)
def test_generic_initialization(name, loop):
    torch.manual_seed(0)
    module = MODULES[name]()
    before = kernels(module)
    loop(module)
    after = kernels(module)
    assert before.keys() == after.keys()
    for part, kernel in before.items():
        assert torch.equal(after[part], kernel), part
    for part in module.modules():
        if isinstance(part, FlatParameterModule):
            assert all(p.dim() == 1 for p in part.parameters())


@pytest.mark.parametrize("position", ["sine", "paper", "conv", "rotary"])
def test_the_initialization_of_transformers(position):
    torch.manual_seed(0)
    options = {"frequencies": "learned"} if position == "rotary" else {}
    layer = SPETransformerEncoderLayer(64, 4, 128, position=position, **options)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    decoder_layer = nn.TransformerDecoderLayer(64, 4, 128)
    decoder_layer.self_attn = SPEMultiheadAttention(64, 4, position=position, **options)
    decoder = nn.TransformerDecoder(decoder_layer, 2)
    before = kernels(nn.ModuleList([encoder, decoder]))
    weight = encoder.layers[0].linear1.weight.detach().clone()
    model = nn.Transformer(64, 4, custom_encoder=encoder, custom_decoder=decoder)
    assert not torch.equal(model.encoder.layers[0].linear1.weight, weight)
    after = kernels(nn.ModuleList([model.encoder, model.decoder]))
    assert len(before) == (4 if position == "rotary" else 8)
    for part, kernel in before.items():
        assert torch.equal(after[part], kernel), part


# What is read and written has its shape.


@pytest.mark.parametrize("name", FLAT)
def test_attributes_have_their_shape(name):
    torch.manual_seed(0)
    module = MODULES[name]()
    for part in module.modules():
        for parameter, shape in getattr(part, "_shapes", {}).items():
            stored, read = part._parameters[parameter], getattr(part, parameter)
            assert read.shape == shape
            assert stored.shape == (read.numel(),)
            assert read.data_ptr() == stored.data_ptr()
            stored.grad = torch.randn_like(stored)
            assert torch.equal(getattr(part, parameter).grad.flatten(), stored.grad)
            with torch.no_grad():
                getattr(part, parameter).fill_(3.0)
            assert (stored == 3).all()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_of_every_form_load(name, assign):
    recorded = json.loads((DATA / "state_dict_keys.json").read_text())[name]
    old = {key: torch.randn(shape) for key, shape in recorded.items()}
    layer = layer_of(name)
    layer.load_state_dict(old, assign=assign)
    new = layer.state_dict()
    assert all(torch.equal(new[key], value) for key, value in old.items())
    assert {type(value) for value in new.values()} == {torch.Tensor}
    assert not any(isinstance(value, nn.Parameter) for value in new.values())
    # Flat, as parameters are: what tools that save parameters by themselves have.
    flat = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    flat = {name: flat[name] for name in new}
    other = layer_of(name)
    other.load_state_dict(copy.deepcopy(flat), assign=assign)
    assert all(torch.equal(value, new[key]) for key, value in other.state_dict().items())
    assert all(p.dim() == 1 for n, p in other.named_parameters() if "position" in n or "gate" in n)


def test_what_does_not_fit_is_refused():
    spe = SineSPE(4, 16, num_sines=3)
    for shape in ((16, 4, 3), (4, 16), (191,), (192, 1)):
        with pytest.raises(RuntimeError, match="size mismatch for freqs"):
            spe.load_state_dict({"freqs": torch.zeros(shape)}, strict=False)


def test_functional_calls_take_both_forms():
    layer = SPEMultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    expected = layer(x, x, x)[0]
    for parameters in (layer.state_dict(), dict(layer.named_parameters())):
        assert torch.equal(torch.func.functional_call(layer, parameters, (x, x, x))[0], expected)


def test_positions_of_modules_that_return_the_attribute():
    class Gains(SineSPE):
        def position_parameters(self):
            return [self.gains]

    module = Gains(2, 8)
    with torch.no_grad():
        groups = {g["name"]: g["params"] for g in parameter_groups(module, 1.0)}
    assert len(groups["positions"]) == 1
    assert groups["positions"][0] is module._parameters["gains"]


@pytest.mark.parametrize("name", FLAT)
def test_what_is_set_on_the_attribute_reaches_the_parameter(name):
    module = next(m for m in MODULES[name]().modules() if getattr(m, "_shapes", {}))
    for parameter, stored in module._parameters.items():
        if len(module._shapes.get(parameter, ())) < 2 or stored is None:  # read as they are
            continue
        view = getattr(module, parameter)
        module.requires_grad_(False)
        view.requires_grad_(True)
        assert stored.requires_grad
        view.requires_grad = False
        assert not stored.requires_grad
        getattr(module, parameter).requires_grad = True
        assert stored.requires_grad
        shapes = []
        see = shapes.append
        hooks = [
            view.register_hook(lambda grad, see=see: see(grad.shape) or 2 * grad),
            view.register_post_accumulate_grad_hook(lambda p, see=see: see(p.grad.shape)),
        ]
        (3 * getattr(module, parameter)).sum().backward()
        assert shapes == [view.shape, view.shape]
        assert (stored.grad == 6).all()
        for hook in hooks:
            hook.remove()
        view.grad = torch.ones(view.shape)
        assert (stored.grad == 1).all()
        view.grad = None
        assert stored.grad is None
        view.data = torch.full(view.shape, 7.0)
        assert (stored == 7).all()
        view.data.fill_(8.0)
        assert (stored == 8).all()
        nn.init.constant_(view, 9.0)
        assert (stored == 9).all()
        for what in ("data", "grad"):
            with pytest.raises(ValueError, match=f"{what} of a parameter of shape"):
                setattr(view, what, torch.zeros(*view.shape, 1, 2))
        for copied in (copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
            assert type(copied) is nn.Parameter
            assert torch.equal(copied, view)
        assert type(view * 2) is torch.Tensor


def test_parametrizations_want_a_parameter_of_its_shape():
    spe = SineSPE(2, 8, num_sines=3)
    with pytest.raises(ValueError, match="non-leaf"):
        parametrize.register_parametrization(spe, "gains", nn.Softplus())
    gains = spe.gains.detach().clone()
    spe.gains = nn.Parameter(gains)
    parametrize.register_parametrization(spe, "gains", nn.Softplus())
    assert torch.equal(spe.gains, nn.functional.softplus(gains))
    spe.template(3).sum().backward()
    assert spe.parametrizations.gains.original.grad.shape == (2, 8, 3)
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.SGD([spe.freqs], lr=0.1)


def test_the_page_about_optimizers():
    """Resume an optimizer that was saved when parameters had their shape."""
    (recipe,) = re.findall(r"```python\n(def flatten_state.*?)```", PAGE.read_text(), re.DOTALL)
    names = {"torch": torch}
    exec(recipe, names)
    spe = SineSPE(2, 8, num_sines=3)
    shaped = [nn.Parameter(getattr(spe, n).detach().clone()) for n, _ in spe.named_parameters()]
    flat = list(spe.parameters())
    before, after = torch.optim.AdamW(shaped, lr=0.1), torch.optim.AdamW(flat, lr=0.1)
    for step in range(2):
        for a, b in zip(shaped, flat, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.flatten()
        before.step()
        if step == 0:
            after.load_state_dict(copy.deepcopy(before.state_dict()))
            names["flatten_state"](after)
            spe.load_state_dict(dict(zip(("freqs", "offsets", "gains"), shaped, strict=True)))
        else:
            after.step()
    for a, b in zip(shaped, flat, strict=True):
        assert torch.equal(a.flatten(), b)


def test_sharded_parameters(tmp_path):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        layer = SPEMultiheadAttention(30, 3, batch_first=True)
        before, x = copy.deepcopy(layer.state_dict()), torch.randn(2, 5, 30)
        fsdp.fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer(x, x, x)[0].square().sum().backward()
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        optimizer.step()
        state = layer.state_dict()
        for name, value in state.items():
            assert value.shape == dict(layer.named_parameters())[name].shape
            assert not torch.equal(value.full_tensor().flatten(), before[name].flatten())
        layer.load_state_dict(state)
        whole = SPEMultiheadAttention(30, 3, batch_first=True)
        whole.load_state_dict({name: value.full_tensor() for name, value in state.items()})
        options = dist.checkpoint.state_dict.StateDictOptions(full_state_dict=True)
        dist.checkpoint.state_dict.set_model_state_dict(layer, dict(before), options=options)
        for name, value in layer.state_dict().items():
            assert torch.equal(value.full_tensor().flatten(), before[name].flatten())
    finally:
        dist.destroy_process_group()
