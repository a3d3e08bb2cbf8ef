"""What users of such layers reported, each kind wherever it can occur."""

import copy
import warnings

import numpy
import pytest
import torch
from helpers import error
from torch import nn

import torch_spe
from torch_spe import (
    ConvSPE,
    LinearAttention,
    PositiveFeatures,
    RotaryPositions,
    SineSPE,
    SPEFilter,
    SPEMultiheadAttention,
    SPETransformerEncoderLayer,
)
from torch_spe import functional as SF

pytestmark = pytest.mark.usefixtures("device", "one_thread")
cpu_only = pytest.mark.cpu_only
E, H, B, N = 32, 4, 2, 20

# Private attributes of nn.MultiheadAttention that switch on fast paths of PyTorch's containers.

GRAD_MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode}


def attention(**options):
    return SPEMultiheadAttention(E, H, batch_first=True, **options)


def encoder_layer():
    layer = nn.TransformerEncoderLayer(E, H, 48, dropout=0.0, batch_first=True)
    layer.self_attn = attention(seed=3)
    return layer


def slow_layer(layer, x, padding=None):
    """What the layer computes where PyTorch has no fast path."""
    x = layer.norm1(x + layer.self_attn(x, x, x, key_padding_mask=padding)[0])
    return layer.norm2(x + layer.linear2(layer.activation(layer.linear1(x))))


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_layer_of_pytorch_in_eval_mode(mode, padded):
    torch.manual_seed(0)
    layer, x = encoder_layer().eval(), torch.randn(B, N, E)
    padding = (torch.arange(N) >= torch.tensor([[N], [13]])) if padded else None
    expected = slow_layer(layer, x, padding)
    with GRAD_MODES[mode]():
        assert torch.equal(layer(x, src_key_padding_mask=padding), expected)
    assert layer.train()(x, src_key_padding_mask=padding).shape == x.shape


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize("replaced", ["before", "after"])
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_of_pytorch_in_eval_mode(mode, replaced, padded):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # nested tensors are not used; nested tensors are a prototype
        if replaced == "before":
            encoder = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=True)
        else:
            # The container decided for nested tensors when it saw nn.MultiheadAttention.
            layer = nn.TransformerEncoderLayer(E, H, 48, dropout=0.0, batch_first=True)
            encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
            assert encoder.use_nested_tensor
            for layer in encoder.layers:
                layer.self_attn = attention()
        encoder.eval()
        x = torch.randn(B, N, E)
        padding = (torch.arange(N) >= torch.tensor([[N], [13]])) if padded else None
        expected = x
        for layer in encoder.layers:
            expected = slow_layer(layer, expected, padding)
        with GRAD_MODES[mode]():
            out = encoder(x, src_key_padding_mask=padding)
        if padded:
            out, expected = (y.masked_fill(padding.unsqueeze(-1), 0) for y in (out, expected))
        assert error(out, expected) < 1e-6
        assert encoder.train()(x, src_key_padding_mask=padding).shape == x.shape


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize("name", ["self_attn", "multihead_attn", "both"])
def test_decoder_layer_of_pytorch_in_eval_mode(mode, name):
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(E, H, 48, dropout=0.0, batch_first=True)
    for attribute in ("self_attn", "multihead_attn"):
        if name in (attribute, "both"):
            setattr(layer, attribute, attention())
    layer.eval()
    x, memory = torch.randn(B, N, E), torch.randn(B, 11, E)
    mask = nn.Transformer.generate_square_subsequent_mask(N)
    y = layer.norm1(x + layer.self_attn(x, x, x, attn_mask=mask, need_weights=False)[0])
    y = layer.norm2(y + layer.multihead_attn(y, memory, memory, need_weights=False)[0])
    expected = layer.norm3(y + layer.linear2(layer.activation(layer.linear1(y))))
    with GRAD_MODES[mode]():
        decoder = nn.TransformerDecoder(layer, 1)
        assert error(layer(x, memory, tgt_mask=mask), expected) < 1e-6
        assert error(decoder(x, memory, tgt_mask=mask), expected) < 1e-6
    assert layer.train()(x, memory, tgt_mask=mask, tgt_is_causal=True).shape == x.shape


@cpu_only
@pytest.mark.parametrize("container", ["attention", "layer"])
def test_dynamic_quantization(container):
    torch.manual_seed(0)
    module = (attention() if container == "attention" else encoder_layer()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(module), {nn.Linear})
    x = torch.randn(B, N, E)
    with torch.no_grad():
        out, expected = (
            m(x, x, x)[0] if container == "attention" else m(x) for m in (quantized, module)
        )
    name = "out_proj" if container == "attention" else "linear1"
    assert type(quantized.get_submodule(name)) is not nn.Linear
    assert error(out, expected) < 0.05


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("is_causal", [False, True])
def test_nested_tensors(layout, is_causal):
    torch.manual_seed(0)
    layer = attention().eval()
    rows = [torch.randn(n, E) for n in (7, 1, 12)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor(rows, layout=layout).requires_grad_()
        out = layer(x, x, x, is_causal=is_causal)[0]
        assert out.layout == layout
        for got, row in zip(out.unbind(), rows, strict=True):
            assert error(got, layer(row, row, row, is_causal=is_causal)[0]) < 1e-6
        out.to_padded_tensor(0.0).square().sum().backward()
        assert x.grad.to_padded_tensor(0.0).isfinite().all()


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_whole_layer_takes_jagged_tensors(norm_first):
    torch.manual_seed(0)
    layer = SPETransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True, norm_first=norm_first)
    rows = [torch.randn(n, 32) for n in (3, 5, 1)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged).requires_grad_()
    out = layer(x, is_causal=True)
    for got, row in zip(out.unbind(), rows, strict=True):
        assert torch.allclose(got, layer(row[None], is_causal=True)[0], atol=1e-5)
    (out * out).sum().backward()
    assert all(gradient.abs().sum() > 0 for gradient in x.grad.unbind())
    _, state = layer.eval()(x, state=layer.initial_state(3))
    assert state.position.tolist() == [3, 5, 1]


def test_errors_of_nested_tensors():
    rows = [torch.randn(n, E) for n in (7, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor(rows)
        other = torch.nested.nested_tensor(rows)
    with pytest.raises(ValueError, match="batch_first=True, got False"):
        SPEMultiheadAttention(E, H)(x, x, x)
    with pytest.raises(ValueError, match="key_padding_mask must be None with a nested tensor"):
        attention()(x, x, x, torch.zeros(2, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"query must have .* got a nested tensor"):
        attention()(x, other, other)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("is_causal", [False, True])
def test_an_attn_mask_of_integers(dtype, is_causal):
    x, mask = torch.randn(2, 5, 32), torch.ones(5, 5).triu(1).to(dtype)
    with pytest.raises(TypeError, match=f"attn_mask must be bool or floating point, got {dtype}"):
        attention()(x, x, x, attn_mask=mask, is_causal=is_causal)


@pytest.mark.parametrize("position", ["sine", "conv", "rotary", None])
@pytest.mark.parametrize(("start", "kind"), [((3, 4, 5), ValueError), ("a", TypeError)])
def test_a_start_that_does_not_fit(position, start, kind):
    x = torch.randn(2, 5, 32)
    with pytest.raises(kind, match="start must be"):
        attention(position=position)(x, x, x, start=start)


# Every integer and every number of an argument: NumPy's, and tensors of no dimension.

INTEGERS = {
    "int64": numpy.int64,
    "int32": numpy.int32,
    "uint8": numpy.uint8,
    "array": numpy.array,
    "tensor": torch.tensor,
    "tensor32": lambda n: torch.tensor(n, dtype=torch.int32),
}
FLOATS = {
    "float32": numpy.float32,
    "float64": numpy.float64,
    "array": lambda x: numpy.array(float(x)),
    "tensor": lambda x: torch.tensor(float(x)),
}


def small(position="sine", **options):
    return SPEMultiheadAttention(8, 2, batch_first=True, position=position, **options).eval()


def attend(layer, **options):
    x = torch.linspace(-1, 1, 48).reshape(1, 6, 8)
    return layer(x, x, x, **options)[0]


def head_input():
    return torch.linspace(-1, 1, 48).reshape(1, 6, 2, 4)


# Whoever adds a number to a public function adds it here.
INTEGER_CALLS = {
    "attention": lambda n: attend(
        SPEMultiheadAttention(
            n(8), n(2), kdim=n(8), vdim=n(8), batch_first=True, num_realizations=n(8),
            eval_realizations=n(16), seed=n(3), num_sines=n(3), ndim=n(1), dropout=n(0), eps=n(1),
            position="sine",
        ).eval()
    ),
    "attention, conv": lambda n: attend(
        small(position="conv", kernel_size=n(3), noise_stride=n(2), ndim=n(1)), start=n(3)
    ),
    "attention, rotary": lambda n: attend(
        small(position="rotary", base=n(100)), start=n(3)
    ),
    "attention, rotary, start of one": lambda n: attend(small(position="rotary"), start=(n(3),)),
    "attention, grid": lambda n: attend(
        small(ndim=2), grid=(n(2), n(3)), start=(n(1), n(2))
    ),
    "attention, start": lambda n: attend(small(), start=n(3)),
    "attention, template": lambda n: small().template(n(3)),
    "layer": lambda n: SPETransformerEncoderLayer(n(8), n(2), n(16)).linear1.weight,
    "SineSPE": lambda n: SineSPE(n(2), n(4), n(8), n(2), ndim=n(1))(
        (n(1), n(6)), n(4), seed=n(1), start=n(5)
    ).encode(head_input(), "query"),
    "SineSPE, exact": lambda n: SineSPE(n(2), n(4), num_sines=n(2), noise="exact").freqs,
    "SineSPE, template": lambda n: SineSPE(2, 4, ndim=2).template((n(3), n(1))),
    "SineSPE, at": lambda n: SineSPE(2, 4, 8)((1, 6), seed=1).at(n(3)).encode(head_input(), "key"),
    "ConvSPE": lambda n: ConvSPE(n(1), n(2), n(4), n(8), n(3), noise_stride=n(2))(
        (n(1), n(6)), n(4), seed=n(1), start=n(5)
    ).encode(head_input(), "query"),
    "ConvSPE, sequences": lambda n: ConvSPE(
        2, 2, 4, 8, (n(3), n(2)), noise_stride=[n(1), n(2)]
    ).template([n(2), n(1)]),
    "ConvSPE, at": lambda n: ConvSPE(1, 2, 4, 8, 3)((1, 6), seed=1).at(n(3)).encode(
        head_input(), "key"
    ),
    "SPEFilter": lambda n: SPEFilter(code_shape=(n(2), n(4)))(
        head_input(), head_input(), SineSPE(2, 4, 8)((1, 6), seed=1), seed=n(3)
    )[0],
    "PositiveFeatures": lambda n: PositiveFeatures(n(4), n(8), seed=n(3), scale=n(1)).weight,
    "RotaryPositions": lambda n: RotaryPositions(n(2), n(4), base=n(100))(
        head_input(), start=n(3)
    ),
    "parameter_groups": lambda n: torch.as_tensor(
        torch_spe.parameter_groups(small(), n(1), n(3))[1]["lr"]
    ),
    "linear_attention": lambda n: SF.linear_attention(*[head_input()] * 3, eps=n(1)),
    "rotary": lambda n: SF.rotary(head_input(), torch.ones(2, 2) / 9, None, n(3)),
    "functional.phase_noise": lambda n: SF.phase_noise(
        n(1), n(2), n(4), n(3), n(4), stream=n(1), ndim=n(1)
    )[1],
    "functional.circle_noise": lambda n: SF.circle_noise(n(1), n(2), n(4), n(4), stream=n(1)),
    "conv_noise": lambda n: SF.conv_noise(
        n(1), n(2), n(4), n(5), n(6), start=n(1), noise_stride=n(2)
    ),
    "conv_noise, sequences": lambda n: SF.conv_noise(
        n(1), n(2), n(4), [n(5)], n(6), start=[n(1)], noise_stride=[n(2)]
    ),
    "conv_filter": lambda n: SF.conv_filter(
        head_input(), torch.ones(2, 4, 3), seed=n(3), num_realizations=n(4), noise_stride=n(2),
        start=n(1),
    ),
    "seeded_normal": lambda n: torch_spe.noise.seeded_normal((n(2), n(3)), n(1), n(1)),
    "phase_noise": lambda n: torch_spe.noise.phase_noise(
        n(2), n(4), n(3), n(4), seed=n(1), stream=n(1), ndim=n(1)
    ).cycles,
    "orthogonal_noise": lambda n: torch_spe.noise.orthogonal_noise(
        n(2), n(4), n(3), n(4), seed=n(1), stream=n(1)
    ),
}  # fmt: skip
FLOAT_CALLS = {
    "attention": lambda n: attend(small(dropout=n(0.5), eps=n(0.25)), start=n(2.5)),
    "attention, whole start": lambda n: attend(small(position="conv", kernel_size=3), start=n(2)),
    "attention, rotary": lambda n: attend(small(position="rotary", base=n(64)), start=n(2.5)),
    "LinearAttention": lambda n: LinearAttention(eps=n(0.25))(*[head_input()] * 3),
    "PositiveFeatures": lambda n: PositiveFeatures(4, scale=n(0.5)).draw()(head_input()),
    "SineSPE": lambda n: SineSPE(2, 4, 8)((1, 6), seed=1, start=n(0.5)).encode(head_input(), "key"),
    "parameter_groups": lambda n: torch.as_tensor(
        torch_spe.parameter_groups(small(), n(0.5), n(2.5))[1]["lr"]
    ),
    "linear_attention": lambda n: SF.linear_attention(*[head_input()] * 3, eps=n(0.25)),
    "sine_filter": lambda n: SF.sine_filter(
        head_input(), torch.ones(2, 4, 1) / 9, torch.ones(2, 4, 2, 3), start=n(0.5)
    ),
    "rotary": lambda n: SF.rotary(head_input(), torch.ones(2, 2) / 9, None, n(0.5)),
}


def seeded(call, make):
    torch.manual_seed(0)
    return call(make).detach()


@cpu_only
@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("call", INTEGER_CALLS)
def test_integers_of_any_kind(call, kind):
    call = INTEGER_CALLS[call]
    assert torch.equal(seeded(call, INTEGERS[kind]), seeded(call, int))


@cpu_only
@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("call", FLOAT_CALLS)
def test_numbers_of_any_kind(call, kind):
    call = FLOAT_CALLS[call]
    assert torch.equal(seeded(call, FLOATS[kind]), seeded(call, float))


@cpu_only
@pytest.mark.parametrize(
    "value",
    [True, 8.0, "8", None, [8], numpy.float64(8), numpy.bool_(True), numpy.array([8]),
     torch.tensor(8.0), torch.tensor(True), torch.tensor([8])],
    ids=repr,
)  # fmt: skip
def test_what_is_no_integer(value):
    with pytest.raises(ValueError, match="embed_dim must be an integer >= 1, got"):
        SPEMultiheadAttention(value, 2)
    with pytest.raises(ValueError, match="max_lag must be an integer >= 0"):
        SineSPE(2, 4, ndim=2).template((value, 2))
    with pytest.raises(ValueError, match=r"shape must be \(batch, \*size\) with integers >= 0"):
        SineSPE(2, 4)((1, value))


@cpu_only
@pytest.mark.parametrize("value", ["1", None, [1.0], 1j, torch.ones(2)], ids=repr)
def test_what_is_no_number(value):
    for make in (
        lambda: LinearAttention(eps=value),
        lambda: SPEMultiheadAttention(8, 2, dropout=value),
        lambda: RotaryPositions(2, 4, base=value),
        lambda: torch_spe.parameter_groups(small(), value),
    ):
        with pytest.raises(TypeError, match="must be a number, got"):
            make()


@pytest.mark.parametrize("position", ["sine", "paper", "conv", "rotary"])
def test_a_start_of_one_number(position):
    layer, x = attention(position=position).eval(), torch.ones(B, N, E)
    assert torch.equal(layer(x, x, x, start=(3,))[0], layer(x, x, x, start=3)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"ndim": 2}, {"noise": "phase", "bandwidth": True}])
def test_a_template_has_the_type_of_the_parameters(options, dtype):
    torch.manual_seed(0)
    spe = SineSPE(2, 3, num_sines=2, dtype=dtype, **options)
    assert spe.template(4).dtype == dtype
    wide = copy.deepcopy(spe).double().template(4)
    assert error(spe.template(4), wide) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.cpu_only
@pytest.mark.parametrize("output_norm", ["rms", None])
@torch.no_grad()
def test_float16_sums_of_long_sequences(output_norm):
    layer = SPEMultiheadAttention(
        64, 1, batch_first=True, position=None, output_norm=output_norm
    ).eval()
    layer.in_proj_weight.mul_(4)
    layer.in_proj_bias.fill_(2)
    x = torch.randn(1, 16384, 64)
    expected = layer(x, x, x)[0]
    with torch.autocast("cpu", torch.float16):
        out = layer(x, x, x)[0]
    assert error(out, expected) < 0.02


@pytest.mark.cpu_only
@torch.no_grad()
def test_a_causal_prefix_in_float16_does_not_depend_on_what_follows():
    layer = SPEMultiheadAttention(
        64, 1, batch_first=True, position=None, feature_map=PositiveFeatures(64, 128)
    ).eval()
    layer.in_proj_weight.mul_(1.4)
    x = torch.randn(1, 8192, 64)
    prefix = x[:, :64]
    with torch.autocast("cpu", torch.float16):
        whole = layer(x, x, x, is_causal=True)[0][:, :64]
        alone = layer(prefix, prefix, prefix, is_causal=True)[0]
    assert error(whole, alone) < 2e-3


@pytest.mark.parametrize(("scale", "feature_map"), [(3e-20, "identity"), (-45.0, "elu")])
def test_denominators_near_the_smallest_number(scale, feature_map):
    q = torch.full((1, 3, 1, 1), scale, requires_grad=True)
    v = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    out = SF.linear_attention(q, q, v, feature_map=feature_map, causal=True, eps=0.0)
    assert error(out, torch.tensor([1.0, 1.5, 2.0]).view(1, 3, 1, 1)) < 1e-5
    out.sum().backward()
    assert q.grad.isfinite().all()
