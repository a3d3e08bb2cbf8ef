"""What is measured: for each case, one shape and several implementations of the same function."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import torch_spe
from torch_spe import functional, reference


@dataclass
class Implementation:
    """One way to compute a case: `run` gives the outputs, `inputs` are what it differentiates.

    All of one function must agree. Those with names in brackets compute something else, shown for
    comparison.
    """

    name: str
    run: Callable[[], tuple[Tensor, ...]]
    inputs: list[Tensor]
    function: str = ""
    timed: bool = True  # or only there to compare results with
    rated: bool = False  # whether its operations a second are shown, as those of "torch_spe" are
    grad_outputs: list[Tensor] | None = None  # what it is differentiated with; made once
    memory: float = 0.0  # bytes that forward and backward take about, where they may be too many
    left_out: str = ""  # why it is neither checked nor timed


@dataclass
class Case:
    """A function at one shape, with the operations that its formula needs."""

    name: str
    shape: dict[str, int]
    flops: float  # forward
    flops_backward: float
    implementations: list[Implementation] = field(default_factory=list)
    # What the library's CPU kernel executes for it instead, where that is known.
    executed: float = 0.0
    executed_backward: float = 0.0
    exact: bool = True  # whether all implementations, given the same seed, give the same values
    shares: bool = False  # whether to say what share of the time which operators take, on the CPU


def published_module(checkout: Path):
    """The published PyTorch code from a checkout of aliutkus/spe."""
    file = checkout / "src" / "pytorch" / "spe" / "__init__.py"
    if not file.exists():
        raise SystemExit(f"--spe-checkout: expected a checkout of aliutkus/spe, no {file}")
    spec = importlib.util.spec_from_file_location(
        "published_spe", file, submodule_search_locations=[str(file.parent)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["published_spe"] = module
    spec.loader.exec_module(module)
    return module


# Bytes that materializing takes for each entry of the codes of queries and keys, forward and
# backward: codes, the same with the gate, in the type of the data, and a gradient of each.
MATERIALIZED = 2 * 2 * 10.0
# Tokens of a chunk of causal attention on the CPU (kChunk in csrc/cpu/attention/segments.h).
CHUNK = 64
# Where PyTorch's depthwise convolutions begin to take seconds on a GPU.
LONG_CONVOLUTION = 4096
# Names that `crossings` looks for.
ATTEND = "encode and attend"
LAYER = "self-attention layer"
SOFTMAX = "(softmax attention, rotary)"
SOFTMAX_LAYER = "(nn.MultiheadAttention)"
ENCODER_LAYER = "encoder layer"
SOFTMAX_ENCODER_LAYER = "(nn.TransformerEncoderLayer)"


def _leaf(*shape: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()


def sine(
    batch: int, length: int, device: str, dtype: torch.dtype, published=None,
    heads: int = 8, features: int = 64, realizations: int = 64, sines: int = 10,
) -> Case:  # fmt: skip
    """Gated SineSPE, drawing the noise and encoding both queries and keys."""
    q = _leaf(batch, length, heads, features, device=device, dtype=dtype)
    k = _leaf(batch, length, heads, features, device=device, dtype=dtype)
    torch.manual_seed(0)
    spe = torch_spe.SineSPE(heads, features, realizations, sines).to(device)
    filt = torch_spe.SPEFilter(code_shape=spe.code_shape).to(device)

    def fast() -> tuple[Tensor, ...]:
        return filt(q, k, spe((batch, length)))

    def materialized() -> tuple[Tensor, ...]:
        code = spe((batch, length))
        gate = filt.gate.sigmoid()[..., None]
        constant = gate.sqrt() * code.draw_gate_noise() / (realizations * features) ** 0.25
        return tuple(
            torch.einsum("bnhd,nhdr->bnhr", x, ((1 - gate).sqrt() * bar[0] + constant).to(x.dtype))
            for x, bar in zip((q, k), code.materialize(), strict=True)
        )

    def given_noise() -> tuple[Tensor, ...]:
        # What the published code draws from PyTorch's generator.
        noise = torch.randn(heads, features, 2 * sines, realizations, device=device)
        gate_noise = torch.randn(heads, features, realizations, device=device)
        return filt(q, k, spe((batch, length), noise=noise), noise=gate_noise)

    # The two filters and the gate, on noise and weights that were made before.
    code = spe((batch, length))
    drawn = dataclasses.replace(
        code,
        freqs=code.freqs.detach().requires_grad_(),
        query_weight=code.query_weight.detach().requires_grad_(),
        key_weight=code.key_weight.detach().requires_grad_(),
    )
    drawn_gate = drawn.draw_gate_noise()

    inputs = [q, k, *spe.parameters(), *filt.parameters()]
    # A side: the codes from the basis, then the batch with the codes; backward, each of these for
    # both of its factors.
    codes = 2.0 * length * heads * features * realizations * 2 * sines
    batched = 2.0 * length * heads * features * realizations * batch
    case = Case(
        "SineSPE, Gaussian noise",
        {"B": batch, "N": length, "H": heads, "D": features, "R": realizations, "K": sines},
        flops=2 * (codes + batched),
        flops_backward=2 * (2 * codes + 2 * batched),
        implementations=[
            Implementation("torch_spe", fast, inputs),
            Implementation(
                "(torch_spe, noise and weights given)",
                lambda: filt(q, k, drawn, noise=drawn_gate),
                [q, k, drawn.freqs, drawn.query_weight, drawn.key_weight, *filt.parameters()],
                rated=True,
            ),
            Implementation(
                "materializing reference", materialized, inputs,
                memory=MATERIALIZED * length * heads * features * realizations,
            ),
        ],
    )  # fmt: skip
    if published is not None:
        theirs = _published_sine(published, spe, filt, q, k, "published code")
        given = Implementation("torch_spe, their noise", given_noise, inputs, timed=False)
        theirs.function = given.function = "published"
        case.implementations += [theirs, given]
    return case


def _published_sine(published, spe, filt, q: Tensor, k: Tensor, name: str) -> Implementation:
    """The published SineSPE and filter of the same sizes and parameters."""
    theirs = published.SineSPE(
        spe.num_heads, spe.in_features, spe.num_realizations, spe.num_sines
    ).to(q.device)
    their_filter = published.SPEFilter(code_shape=theirs.code_shape).to(q.device)
    theirs.load_state_dict(spe.state_dict())
    their_filter.load_state_dict(filt.state_dict())
    return Implementation(
        name,
        lambda: their_filter(q, k, theirs(q.shape[:2])),
        [q, k, *theirs.parameters(), *their_filter.parameters()],
        # Codes, and the products with each row of the batch before they are summed up.
        memory=MATERIALIZED * (1 + q.shape[0]) * q[0].numel() * spe.num_realizations,
    )


def phasor(
    batch: int, length: int, device: str, dtype: torch.dtype, published=None,
    heads: int = 8, features: int = 64, realizations: int = 64, sines: int = 10,
) -> Case:  # fmt: skip
    """Gated SineSPE with phase noise, drawing the noise and encoding both queries and keys."""
    q = _leaf(batch, length, heads, features, device=device, dtype=dtype)
    k = _leaf(batch, length, heads, features, device=device, dtype=dtype)
    torch.manual_seed(0)
    spe = torch_spe.SineSPE(heads, features, realizations, sines, noise="phase").to(device)
    filt = torch_spe.SPEFilter(code_shape=spe.code_shape).to(device)

    def plain() -> tuple[Tensor, ...]:
        code = spe((batch, length))
        gate = filt.gate.sigmoid()[..., None]
        constant = gate.sqrt() * code.draw_gate_noise() / (realizations * features) ** 0.25
        return tuple(
            reference.phasor_filter(
                x, code.freqs, (1 - gate).sqrt()[..., None] * coefficients, constant
            )
            for x, coefficients in (
                (q, code.query_coefficients),
                (k, code.key_coefficients),
            )
        )

    inputs = [q, k, *spe.parameters(), *filt.parameters()]
    pairs = 1.0 * length * heads * features * realizations / 2
    # A pair's code is 5 operations, with the gate 7; a row of x takes 4. Backward, the codes again,
    # a row takes 8, and 14 follow for the parameters.
    case = Case(
        "SineSPE, phase noise",
        {"B": batch, "N": length, "H": heads, "D": features, "R": realizations, "K": sines},
        flops=2 * pairs * (7 + 4 * batch),
        flops_backward=2 * pairs * (7 + 8 * batch + 14),
        implementations=[
            Implementation("torch_spe", lambda: filt(q, k, spe((batch, length))), inputs),
            Implementation(
                "materializing reference", plain, inputs,
                timed=device != "cpu",
                memory=MATERIALIZED * length * heads * features * realizations,
            ),
        ],
    )  # fmt: skip
    dense = torch_spe.SineSPE(heads, features, realizations, sines).to(device)
    dense.load_state_dict(spe.state_dict())
    case.implementations.append(
        Implementation(
            "(torch_spe, Gaussian noise)",
            lambda: filt(q, k, dense((batch, length))),
            [q, k, *dense.parameters(), *filt.parameters()],
        )
    )
    if published is not None:
        case.implementations.append(
            _published_sine(published, spe, filt, q, k, "(published code, Gaussian noise)")
        )
    return case


def exact(
    batch: int, length: int, device: str, dtype: torch.dtype,
    heads: int = 8, features: int = 64, sines: int = 1,
) -> Case:  # fmt: skip
    """Gated SineSPE without noise, beside a copy of as many elements as it reads and writes."""
    q = _leaf(batch, length, heads, features, device=device, dtype=dtype)
    k = _leaf(batch, length, heads, features, device=device, dtype=dtype)
    torch.manual_seed(0)
    spe = torch_spe.SineSPE(heads, features, num_sines=sines, noise="exact").to(device)
    filt = torch_spe.SPEFilter(code_shape=spe.code_shape).to(device)

    def plain() -> tuple[Tensor, ...]:
        code = spe((batch, length))
        gate, scale = filt.gate.sigmoid(), (2 * sines + 1) ** 0.25
        amplitudes = scale * (1 - gate).sqrt()[..., None] * code.amplitudes
        return tuple(
            reference.sine_features(x, code.freqs, amplitudes, offsets, scale * gate.sqrt())
            for x, offsets in ((q, code.offsets), (k, None))
        )

    inputs = [q, k, *spe.parameters(), *filt.parameters()]
    with torch.no_grad():
        qhat, khat = filt(q, k, spe((batch, length)))
    copied = [t.detach().clone().requires_grad_() for t in (q, k, qhat, khat)]
    elements = 2.0 * batch * length * heads * features
    return Case(
        "SineSPE, no noise",
        {"B": batch, "N": length, "H": heads, "D": features, "K": sines},
        flops=elements * (2 * sines + 1),
        flops_backward=elements * (4 * sines + 2),
        implementations=[
            Implementation("torch_spe", lambda: filt(q, k, spe((batch, length))), inputs),
            Implementation("materializing reference", plain, inputs),
            Implementation(
                "(copy of inputs and outputs)", lambda: tuple(t.clone() for t in copied), copied
            ),
        ],
    )


def conv(
    batch: int, length: int, device: str, dtype: torch.dtype, published=None,
    heads: int = 8, features: int = 64, realizations: int = 64, taps: int = 128, stride: int = 64,
) -> Case:  # fmt: skip
    """ConvSPE, encoding both queries and keys, with each kind of noise."""
    q = _leaf(batch, length, heads, features, device=device, dtype=dtype)
    k = _leaf(batch, length, heads, features, device=device, dtype=dtype)
    # The products of the formula: tap by noise, and code by query or key.
    codes = 2.0 * length * heads * features * realizations * taps
    work = 2 * (codes + 2.0 * length * heads * features * realizations * batch)
    case = Case(
        "ConvSPE",
        {"B": batch, "N": length, "H": heads, "D": features, "R": realizations, "P": taps},
        flops=work,
        flops_backward=2 * work,
    )
    slow = "takes too long" if device != "cpu" and length > LONG_CONVOLUTION else ""
    for name, options in {
        "torch_spe": {},
        "torch_spe, signs": {"noise": "rademacher"},
        f"torch_spe, signs, s = {stride}": {"noise": "rademacher", "noise_stride": stride},
    }.items():
        spe = torch_spe.ConvSPE(1, heads, features, realizations, taps, **options).to(device)
        filt = torch_spe.SPEFilter(gated=False, code_shape=spe.code_shape)

        def fast(spe=spe, filt=filt) -> tuple[Tensor, ...]:
            return filt(q, k, spe((batch, length)))

        def materialized(spe=spe) -> tuple[Tensor, ...]:
            codes = spe((batch, length)).materialize()
            return tuple(
                torch.einsum("bnhd,nhdr->bnhr", x, code[0].to(x.dtype))
                for x, code in zip((q, k), codes, strict=True)
            )

        inputs = [q, k, *spe.parameters()]
        case.implementations += [
            Implementation(name, fast, inputs, function=name),
            # As slow as the published code, and of the same memory.
            Implementation(
                f"{name}, materialized", materialized, inputs, name,
                timed=device != "cpu" and not options, left_out=slow,
                memory=MATERIALIZED * length * heads * features * realizations,
            ),
        ]  # fmt: skip
    if published is not None:
        their_spe = published.ConvSPE(1, heads, features, realizations, taps).to(device)
        their_filter = published.SPEFilter(gated=False, code_shape=their_spe.code_shape)

        def theirs() -> tuple[Tensor, ...]:
            return their_filter(q, k, their_spe((batch, length)))

        # It draws other noise, so the values differ; tests compare them on recorded noise.
        case.implementations.append(
            Implementation(
                "(published code)", theirs, [q, k, *their_spe.parameters()],
                memory=MATERIALIZED * (1 + batch) * length * heads * features * realizations,
                left_out=slow,
            )
        )  # fmt: skip
    return case


def executed(tokens: float, features: int, values: int) -> dict[str, float]:
    """Operations that causal attention on the CPU executes, of `tokens` of all heads.

    A product with the state, or one that adds to it, has ``2 R E`` of each token, one within chunks
    ``C R`` or ``C E``, as what is above the diagonal is left out. Forward: weights, values, the
    state read and added to. Backward: the state again and its gradient, and what each gradient
    takes. Segments of a sequence that several threads share take more.
    """
    state, of_queries, of_values = 2.0 * features * values, CHUNK * features, CHUNK * values
    return {
        "executed": tokens * (2 * state + of_queries + of_values),
        "executed_backward": tokens * (5 * state + 3 * of_queries + 2 * of_values),
    }


def attention(
    batch: int, length: int, device: str, dtype: torch.dtype,
    heads: int = 8, features: int = 64, values: int = 64,
) -> Case:  # fmt: skip
    """Causal linear attention with elu + 1 and its normalization."""
    q, k = (_leaf(batch, length, heads, features, device=device, dtype=dtype) for _ in range(2))
    v = _leaf(batch, length, heads, values, device=device, dtype=dtype)
    inputs = [q, k, v]
    work = (
        4.0 * batch * length * heads * features * values
    )  # the state, and the state by the queries
    case = Case(
        "causal linear attention",
        {"B": batch, "N": length, "H": heads, "R": features, "E": values},
        flops=work,
        flops_backward=2 * work,
        **executed(batch * length * heads, features, values),
        implementations=[
            Implementation(
                "torch_spe", lambda: (functional.linear_attention(q, k, v, causal=True),), inputs
            )
        ],
    )
    # In float16 its sums overflow.
    if batch * heads * length**2 <= 2**28 and (dtype != torch.float16 or length <= 512):
        case.implementations.append(
            Implementation(
                "materializing reference",
                lambda: (reference.linear_attention(q, k, v, causal=True)[0],),
                inputs,
            )
        )
    # It takes float32 only.
    if dtype == torch.float32 and importlib.util.find_spec("fast_transformers") is not None:
        from fast_transformers.causal_product import causal_dot_product

        phi = reference.FEATURE_MAPS["elu"]

        def theirs() -> tuple[Tensor, ...]:
            fq, fk = (phi(x).transpose(1, 2).contiguous() for x in (q, k))
            normalizer = torch.einsum("bhnr,bhnr->bhn", fq, fk.cumsum(2)) + 1e-6
            out = causal_dot_product(fq, fk, v.transpose(1, 2).contiguous())
            return ((out / normalizer[..., None]).transpose(1, 2),)

        case.implementations.append(Implementation("idiap/fast-transformers", theirs, inputs))

    chunk_linear_attn = _flash_linear_attention() if device == "cuda" else None
    if chunk_linear_attn is not None:

        def fla() -> tuple[Tensor, ...]:
            fq, fk = (torch.nn.functional.elu(x) + 1 for x in (q, k))
            return (chunk_linear_attn(fq, fk, v, scale=1.0, normalize=True)[0],)

        # In brackets: its epsilon is another.
        case.implementations.append(Implementation("(flash-linear-attention)", fla, inputs))

    rotate = _rotary(length, features, device, dtype)
    # Other functions: how long an exact softmax attention of the same size takes.
    case.implementations += [
        Implementation("(softmax attention)", lambda: _softmax(q, k, v), inputs),
        Implementation(SOFTMAX, lambda: _softmax(rotate(q), rotate(k), v), inputs),
    ]
    return case


def decay(
    batch: int, length: int, device: str, dtype: torch.dtype, causal: bool = True,
    heads: int = 8, features: int = 64, values: int = 64,
) -> Case:  # fmt: skip
    """Linear attention without and with a decay, which has the same steps in each of its forms."""
    q, k = (_leaf(batch, length, heads, features, device=device, dtype=dtype) for _ in range(2))
    v = _leaf(batch, length, heads, values, device=device, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    steps = torch_spe.Decay(heads, "fixed", dtype=wide)().to(device)  # [H]
    of_tokens = steps.expand(batch, length, heads)
    forms = {
        "[H]": steps,
        "[B, N, H]": of_tokens,
        "[H, R]": steps[:, None].expand(heads, features),
        "[B, N, H, R]": of_tokens[..., None].expand(batch, length, heads, features),
    }

    def attend(log_decay: Tensor | None = None) -> tuple[Tensor, ...]:
        return (functional.linear_attention(q, k, v, causal=causal, log_decay=log_decay),)

    work = 4.0 * batch * length * heads * features * values
    case = Case(
        f"linear attention with a decay, {'causal' if causal else 'not causal'}",
        {"B": batch, "N": length, "H": heads, "R": features, "E": values},
        flops=work,
        flops_backward=2 * work,
        **(executed(batch * length * heads, features, values) if causal else {}),
        implementations=[Implementation("torch_spe", attend, [q, k, v])],
    )
    for form, expanded in forms.items():
        log_decay = expanded.detach().clone().contiguous().requires_grad_()
        case.implementations.append(
            Implementation(
                f"torch_spe, log_decay {form}",
                lambda log_decay=log_decay: attend(log_decay),
                [q, k, v, log_decay],
                function="decay",
                # A decay of each feature has other products.
                rated=form in ("[H]", "[B, N, H]"),
            )
        )
    if batch * heads * length**2 <= 2**24:
        case.implementations.append(
            Implementation(
                "materializing reference",
                lambda: (reference.linear_attention(q, k, v, causal=causal, log_decay=steps)[0],),
                [q, k, v],
                function="decay",
                timed=False,
            )
        )
    return case


def _flash_linear_attention():
    """chunk_linear_attn of flash-linear-attention, None where that is not installed."""
    try:
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError:
        return None
    return chunk_linear_attn


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Causal softmax attention of [B, N, H, D]."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
    return (out.transpose(1, 2),)


def _rotary(
    length: int, features: int, device: str, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Rotary positions, with cosines and sines made before."""
    rates = 1e4 ** (-torch.arange(0, features, 2, device=device) / features)
    angle = (torch.arange(length, device=device)[:, None] * rates)[:, None]  # [N, 1, D / 2]
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def rotate(x: Tensor) -> Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    return rotate


def attend(
    batch: int, length: int, device: str, dtype: torch.dtype,
    heads: int = 8, features: int = 64, realizations: int = 64, values: int = 64,
) -> Case:  # fmt: skip
    """Encode queries and keys and attend to them, as a layer does, without its projections."""
    q, k = (_leaf(batch, length, heads, features, device=device, dtype=dtype) for _ in range(2))
    v = _leaf(batch, length, heads, values, device=device, dtype=dtype)
    torch.manual_seed(0)

    def ours(**options) -> tuple[Callable[[], tuple[Tensor, ...]], list[Tensor]]:
        spe = torch_spe.SineSPE(heads, features, **options).to(device)
        filt = torch_spe.SPEFilter(code_shape=spe.code_shape).to(device)

        def run() -> tuple[Tensor, ...]:
            qhat, khat = filt(q, k, spe((batch, length)))
            return (functional.linear_attention(qhat, khat, v, causal=True),)

        return run, [q, k, v, *spe.parameters(), *filt.parameters()]

    # As a layer has it: its noise and its number of sines.
    phase = {"num_realizations": realizations, "num_sines": 4, "noise": "phase", "bandwidth": True}
    rotate = _rotary(length, features, device, dtype)
    # Two filters of R / 2 pairs for each feature, and the attention.
    pairs = 1.0 * length * heads * features * realizations / 2
    state = 4.0 * batch * length * heads * realizations * values
    return Case(
        ATTEND,
        {"B": batch, "N": length, "H": heads, "D": features, "R": realizations, "E": values},
        flops=2 * pairs * (7 + 4 * batch) + state,
        flops_backward=2 * pairs * (7 + 8 * batch + 14) + 2 * state,
        implementations=[
            Implementation("torch_spe", *ours(**phase)),
            Implementation("(torch_spe, no noise)", *ours(num_sines=1, noise="exact")),
            Implementation(SOFTMAX, lambda: _softmax(rotate(q), rotate(k), v), [q, k, v]),
        ],
        exact=False,
    )


def sine_attention(
    batch: int, length: int, device: str, dtype: torch.dtype,
    heads: int = 8, features: int = 64, values: int = 64, sines: int = 1,
) -> Case:  # fmt: skip
    """What the layers' default does between its projections, in one operator and in two."""
    q, k = (_leaf(batch, length, heads, features, device=device, dtype=dtype) for _ in range(2))
    v = _leaf(batch, length, heads, values, device=device, dtype=dtype)
    torch.manual_seed(0)
    spe = torch_spe.SineSPE(heads, features, num_sines=sines, noise="exact", init="spread")
    filt = torch_spe.SPEFilter(code_shape=spe.code_shape, init="spread").to(device)
    decay = torch_spe.Decay(heads, "learned").to(device)
    spe.to(device)
    options = {"causal": True, "normalize": False, "rms_norm": True}

    def one() -> tuple[Tensor, ...]:
        code = filt.gate_code(spe((batch, length)))
        sines = code.sines(q, k)
        out = functional.sine_attention(
            q, k, v, **sines, feature_map="elu", log_decay=decay(), **options
        )
        return (out,)

    def two() -> tuple[Tensor, ...]:
        code = filt.gate_code(spe((batch, length)))
        qhat, khat = code.encode(q, "query", "elu"), code.encode(k, "key", "elu")
        out = functional.linear_attention(
            qhat, khat, v, feature_map="identity", log_decay=decay(), **options
        )
        return (out,)

    inputs = [q, k, v, *spe.parameters(), *filt.parameters(), *decay.parameters()]
    encoded = (2 * sines + 1) * features
    work = batch * length * heads * encoded * (2.0 + 4.0 * values)
    return Case(
        "exact sines and causal attention with a decay",
        {"B": batch, "N": length, "H": heads, "D": features, "K": sines, "E": values},
        flops=work,
        flops_backward=2 * work,
        implementations=[
            Implementation("torch_spe", one, inputs),
            Implementation("torch_spe, an operator each", two, inputs),
        ],
    )


# What the layers are measured with: a name and the arguments of `SPEMultiheadAttention`.
LAYERS = {
    "torch_spe": {},
    "(torch_spe, exact sines, no decay)": {"position": "exact"},
    "(torch_spe, exact sines, decay per feature)": {"position": "exact", "decay": "feature"},
    "(torch_spe, phase noise)": {"position": "sine"},
    "(torch_spe, rotary, decay)": {"position": "rotary", "decay": "learned"},
    "(torch_spe, rotary)": {"position": "rotary"},
    "(torch_spe, no positions)": {"position": None},
}  # fmt: skip


def layer(
    batch: int, length: int, device: str, dtype: torch.dtype, model: int = 512, heads: int = 8
) -> Case:
    """A whole causal self-attention layer, projections included."""
    x = _leaf(batch, length, model, device=device, dtype=dtype)
    factory = {"batch_first": True, "device": device, "dtype": dtype}
    torch.manual_seed(0)
    ours = {
        name: torch_spe.SPEMultiheadAttention(model, heads, **factory, **options)
        for name, options in LAYERS.items()
    }
    plain = torch.nn.MultiheadAttention(model, heads, **factory)
    mask = _causal_mask(length, device, dtype)
    projections = 8.0 * batch * length * model**2
    return Case(
        LAYER,
        {"B": batch, "N": length, "model": model, "H": heads},
        flops=projections,
        flops_backward=2 * projections,
        implementations=[
            *(
                Implementation(
                    name,
                    lambda layer=layer: (layer(x, x, x, is_causal=True)[0],),
                    [x, *layer.parameters()],
                )
                for name, layer in ours.items()
            ),
            Implementation(
                SOFTMAX_LAYER,
                lambda: (plain(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0],),
                [x, *plain.parameters()],
            ),
        ],
        exact=False,
        shares=True,
    )


def encoder_layer(
    batch: int, length: int, device: str, dtype: torch.dtype, model: int = 512, heads: int = 8
) -> Case:
    """A whole causal encoder layer: attention, feed-forward part (4 x model) and norms.

    Without dropout: with it PyTorch's softmax attention on a CPU leaves its fast path.
    """
    x = _leaf(batch, length, model, device=device, dtype=dtype)
    factory = {"batch_first": True, "device": device, "dtype": dtype, "dropout": 0.0}
    torch.manual_seed(0)
    ours = {
        name: torch_spe.SPETransformerEncoderLayer(model, heads, 4 * model, **factory, **options)
        for name, options in LAYERS.items()
    }
    plain = torch.nn.TransformerEncoderLayer(model, heads, 4 * model, **factory)
    mask = _causal_mask(length, device, dtype)
    products = (8.0 + 16.0) * batch * length * model**2
    return Case(
        ENCODER_LAYER,
        {"B": batch, "N": length, "model": model, "H": heads},
        flops=products,
        flops_backward=2 * products,
        implementations=[
            *(
                Implementation(
                    name,
                    lambda layer=layer: (layer(x, is_causal=True),),
                    [x, *layer.parameters()],
                )
                for name, layer in ours.items()
            ),
            Implementation(
                SOFTMAX_ENCODER_LAYER,
                lambda: (plain(x, src_mask=mask, is_causal=True),),
                [x, *plain.parameters()],
            ),
        ],
        exact=False,
        shares=True,
    )


def _causal_mask(length: int, device: str, dtype: torch.dtype) -> Tensor:
    """The mask that PyTorch's layers want beside is_causal; a long one would fill the memory."""
    if length <= 8192:
        return torch.nn.Transformer.generate_square_subsequent_mask(
            length, device=device, dtype=dtype
        )
    return torch.zeros((), dtype=dtype, device=device).expand(length, length)


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative error (in the root mean square) between implementations of one function."""
    return {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 8 * math.sqrt(2) * 2**-8)
