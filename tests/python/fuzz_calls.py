"""Random calls of the functional operators, valid ones and ones with a single wrong argument.

A call is a function of a text key alone, so that each can be repeated.
"""

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from helpers import here
from test_codes import (
    plain_exact_code,
    plain_gate_code,
    plain_gate_exact_code,
    plain_phase_code,
    plain_sine_code,
)

from torch_spe import functional, reference
from torch_spe.feature_maps import apply_feature_map

DATA_TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Sizes that kernels treat apart: none, one, odd ones, and those around widths of vectors and tiles.
SMALL, SMALL_WEIGHTS = [0, 1, 2, 3, 4, 5, 7, 9, 17, 33], [1, 4, 4, 4, 2, 4, 2, 2, 1, 1]
LONG, LONG_WEIGHTS = [*SMALL, 47, 49, 63, 64, 65, 130, 257], [*SMALL_WEIGHTS, *[1] * 7]
ELEMENTS = 300_000  # of the largest tensor that a reference may store


class Call(NamedTuple):
    """One call; `function` and `reference` return a tuple of tensors from the arguments."""

    operator: str
    arguments: dict
    shapes: dict  # name of a tensor -> symbols of its dimensions, such as "B N H D"
    function: Callable
    reference: Callable | None  # None: the arguments alone decide
    finite: tuple = ()  # arguments that are checked for NaN and infinities

    def __str__(self):
        def show(value):
            if not isinstance(value, torch.Tensor):
                return repr(value)
            grad = ", requires_grad" * value.requires_grad
            return f"{value.dtype} {list(value.shape)} strides {list(value.stride())}{grad}"

        lines = (f"  {name} = {show(value)}" for name, value in self.arguments.items())
        return "\n".join((self.operator, *lines))


class Draw:
    """Random choices and tensors from one key; `fixed` gives the sizes of some dimensions."""

    def __init__(self, key, fixed=None, plain=False):
        self.random = random.Random(key)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.fixed = fixed or {}
        self.plain = plain
        self.dtype = self.fixed.get("dtype") or self.random.choice(DATA_TYPES)

    def chance(self, share):
        return self.random.random() < share

    def choose(self, *choices):
        return self.random.choice(choices)

    def size(self, symbol, least=0, most=33):
        if symbol in self.fixed:
            return self.fixed[symbol]
        return max(least, min(most, self.random.choices(SMALL, SMALL_WEIGHTS)[0]))

    def length(self, symbol="N"):
        if symbol in self.fixed:
            return self.fixed[symbol]
        return self.random.choices(LONG, LONG_WEIGHTS)[0]

    def parameter_type(self):
        """That of the data, or what their sums are taken in."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return self.choose(self.dtype, wide)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")

    def tensor(self, values, dtype, finite=True):
        """The values in the type, with any strides; what lies between is NaN or large."""
        values = values.to(dtype)
        if not self.plain:
            kinds = (self.transposed, self.sliced, self.shifted, self.expanded)
            values = self.random.choice((lambda t: t, *kinds))(values)
        values = here(values)
        return values.requires_grad_(values.is_floating_point() and self.chance(0.6))

    def transposed(self, values):
        order = list(range(values.dim()))
        self.random.shuffle(order)
        inverse = [order.index(i) for i in range(values.dim())]
        return values.permute(order).contiguous().permute(inverse)

    def sliced(self, values):
        steps = [self.choose(1, 1, 2, 3) for _ in values.shape]
        around = torch.full(
            [n * s + 1 for n, s in zip(values.shape, steps, strict=True)],
            math.nan if values.is_floating_point() else 1, dtype=values.dtype,
        )  # fmt: skip
        view = around[
            tuple(slice(1, 1 + n * s, s) for n, s in zip(values.shape, steps, strict=True))
        ]
        return view.copy_(values)

    def shifted(self, values):
        """Contiguous, at any place in its storage."""
        first = self.choose(1, 3, 5)
        around = values.new_ones(values.numel() + first + 2)
        return around[first : first + values.numel()].copy_(values.flatten()).view(values.shape)

    def expanded(self, values):
        """Other values: the first of a dimension everywhere in it."""
        wide = [i for i, n in enumerate(values.shape) if n > 1]
        if not wide or not values.is_floating_point():
            return values
        dim = self.random.choice(wide)
        return values.narrow(dim, 0, 1).contiguous().expand(values.shape)


def positions_and_start(draw, length, ndim):
    """Positions or None, and the first position of the default ones."""
    if ndim == 1 and draw.chance(0.5):
        return None, draw.choose(0.0, 5, -3.5, 100.25)
    values = 20 * draw.normal(length, ndim)
    dtype = draw.choose(torch.float64, torch.float32, torch.int64, torch.int32)
    if ndim == 1 and draw.chance(0.7):
        values = values[:, 0]
    return draw.tensor(values, dtype), 0.0


def x_and_freqs(draw, symbol):
    """What the encoders with sines share; `symbol` is the name of the dimension of freqs."""
    batch, length, heads, features = (
        draw.size("B", most=5), draw.length(), draw.size("H", most=5), draw.size("D"),
    )  # fmt: skip
    ndim = draw.fixed.get("ndim", draw.choose(1, 1, 1, 2, 3))
    count = draw.size(symbol, least=1, most=17)
    grid = ndim > 1 or "ndim" in draw.fixed or draw.chance(0.3)
    freqs = draw.normal(heads, features, count, *[ndim] * grid).sigmoid() / 2
    positions, start = positions_and_start(draw, length, ndim)
    arguments = {
        "x": draw.tensor(draw.normal(batch, length, heads, features), draw.dtype),
        "freqs": draw.tensor(freqs, draw.choose(*DATA_TYPES[:2], draw.dtype)),
    }
    shapes = {"x": "B N H D", "freqs": f"H D {symbol}" + " ndim" * grid}
    tail = {"positions": positions, "start": start}
    if positions is not None:
        shapes["positions"] = "N ndim" if positions.dim() == 2 else "N"
    arguments["feature_map"] = draw.choose("identity", "identity", "elu", "relu")
    return arguments, shapes, tail


def realizations(draw, arguments, least=1):
    """R, such that the codes do not become too large."""
    real = draw.size("R", least=least)
    codes = arguments["x"].shape[1:].numel()
    return real if "R" in draw.fixed else max(least, min(real, ELEMENTS // max(1, codes)))


def one_output(function):
    return lambda **arguments: (function(**arguments),)


def plain_rotary(x, freqs, positions=None, start=0.0):
    if positions is None:
        positions = start + torch.arange(x.shape[1], dtype=torch.float64, device=x.device)
    angle = 2 * math.pi * positions.double()[:, None, None] * freqs.double()
    cos, sin = angle.cos(), angle.sin()
    even, odd = x.double()[..., ::2], x.double()[..., 1::2]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def encoder(name, arguments, shapes, tail, finite):
    arguments = {**arguments, **tail}
    plain = plain_rotary if name == "rotary" else getattr(reference, name)

    def expected(x, feature_map, **others):
        return plain(apply_feature_map(feature_map, x), **others)

    return Call(
        name, arguments, shapes, one_output(getattr(functional, name)), one_output(expected),
        ("freqs", *finite, "constant", "positions", "start"),
    )  # fmt: skip


def sine_filter(draw):
    arguments, shapes, tail = x_and_freqs(draw, "K")
    heads, features, sines = arguments["freqs"].shape[:3]
    real = realizations(draw, arguments)
    weight = draw.normal(heads, features, 2 * sines, real)
    arguments["weight"] = draw.tensor(weight, draw.parameter_type())
    shapes["weight"] = "H D K R"
    arguments["constant"] = None
    if draw.chance(0.5):
        constant = draw.normal(heads, features, real)
        arguments["constant"] = draw.tensor(constant, draw.parameter_type())
        shapes["constant"] = "H D R"
    return encoder("sine_filter", arguments, shapes, tail, ("weight",))


def phasor_filter(draw):
    arguments, shapes, tail = x_and_freqs(draw, "P")
    heads, features, pairs = arguments["freqs"].shape[:3]
    coefficients = draw.normal(heads, features, pairs, 2)
    arguments["coefficients"] = draw.tensor(coefficients, draw.parameter_type())
    shapes["coefficients"] = "H D P 2"
    arguments["constant"] = None
    if draw.chance(0.5):
        constant = draw.normal(heads, features, 2 * pairs)
        arguments["constant"] = draw.tensor(constant, draw.parameter_type())
        shapes["constant"] = "H D P"
    return encoder("phasor_filter", arguments, shapes, tail, ("coefficients",))


def sine_features(draw):
    arguments, shapes, tail = x_and_freqs(draw, "K")
    heads, features, sines = arguments["freqs"].shape[:3]
    for name, shape in (("amplitudes", (sines,)), ("offsets", (sines,)), ("constant", ())):
        arguments[name] = None
        if name == "amplitudes" or draw.chance(0.5):
            values = draw.normal(heads, features, *shape)
            arguments[name] = draw.tensor(values, draw.parameter_type())
            shapes[name] = "H D K" if shape else "H D"
    return encoder("sine_features", arguments, shapes, tail, ("amplitudes", "offsets"))


def rotary(draw):
    batch, length, heads, pairs = (
        draw.size("B", most=5), draw.length(), draw.size("H", most=5), draw.size("D", most=17),
    )  # fmt: skip
    positions, start = positions_and_start(draw, length, 1)
    if positions is not None and positions.dim() == 2:
        positions = positions.detach()[:, 0].clone().requires_grad_(positions.requires_grad)
    freqs = draw.normal(heads, pairs).sigmoid() / 2
    arguments = {
        "x": draw.tensor(draw.normal(batch, length, heads, 2 * pairs), draw.dtype),
        "freqs": draw.tensor(freqs, draw.choose(*DATA_TYPES[:2], draw.dtype)),
        "feature_map": draw.choose("identity", "elu", "relu"),
    }
    shapes = {"x": "B N H D", "freqs": "H D"}
    if positions is not None:
        shapes["positions"] = "N"
    return encoder("rotary", arguments, shapes, {"positions": positions, "start": start}, ())


def conv_sizes(draw, ndim):
    """Sizes of the positions and of the kernel."""
    most = (257, 17, 7)[ndim - 1]
    size = [min(draw.length(f"N{i}"), most) for i in range(ndim)]
    taps = [draw.size(f"P{i}", least=1, most=(33, 5, 4)[ndim - 1]) for i in range(ndim)]
    return size, taps


def conv_filter(draw):
    ndim = draw.fixed.get("ndim", draw.choose(1, 1, 2, 3))
    size, taps = conv_sizes(draw, ndim)
    batch, heads, features = draw.size("B", most=4), draw.size("H", most=4), draw.size("D", most=9)
    real = draw.size("R", least=1)
    longer = math.prod(n + p - 1 for n, p in zip(size, taps, strict=True))
    if "R" not in draw.fixed:
        real = max(1, min(real, ELEMENTS // max(1, heads * features * longer)))
    x = draw.normal(batch, *size, heads, features)
    positions = " ".join(f"N{i}" for i in range(ndim))
    kernel = draw.normal(heads, features, *taps)
    arguments = {
        "x": draw.tensor(x, draw.dtype),
        "kernel": draw.tensor(kernel, draw.parameter_type()),
        "noise": None,
        "constant": None,
    }
    shapes = {
        "x": f"B {positions} H D",
        "kernel": "H D " + " ".join(f"P{i}" for i in range(ndim)),
    }
    if draw.chance(0.5):
        constant = draw.normal(heads, features, real)
        arguments["constant"] = draw.tensor(constant, draw.parameter_type())
        shapes["constant"] = "H D R"
    if draw.chance(0.5):
        noise_size = [max(0, n + p - 1) for n, p in zip(size, taps, strict=True)]
        noise = draw.normal(heads, features, *noise_size, real)
        arguments["noise"] = draw.tensor(noise, draw.parameter_type())
        shapes["noise"] = f"H D {positions} R"
        if draw.chance(0.3):
            arguments["num_realizations"] = real
    else:
        arguments |= seeded(draw, ndim) | {"num_realizations": real}

    def expected(x, kernel, noise, constant, seed=None, num_realizations=None, **generated):
        if noise is None:
            size = [n + p - 1 for n, p in zip(x.shape[1:-2], kernel.shape[2:], strict=True)]
            noise = functional.conv_noise(
                seed, *kernel.shape[:2], size, num_realizations, dtype=torch.float64, **generated
            ).to(kernel)
        return (reference.conv_filter(x, kernel.to(noise.dtype), noise, constant),)

    return Call(
        "conv_filter", arguments, shapes, one_output(functional.conv_filter), expected,
        ("kernel", "constant"),
    )  # fmt: skip


def seeded(draw, ndim):
    """Arguments of generated noise."""
    seed = draw.random.getrandbits(64) - 2**63
    stride = draw.choose(1, 2, 3, 8)
    start = draw.choose(0, 3, -70, 2**18 + 1)
    return {
        "seed": here(torch.tensor([seed])) if draw.chance(0.4) else seed,
        "noise_kind": draw.choose("gaussian", "rademacher"),
        "noise_stride": stride if draw.chance(0.5) else [draw.choose(1, 2, 3) for _ in range(ndim)],
        "start": start if draw.chance(0.5) else [draw.choose(0, 1, -5) for _ in range(ndim)],
    }


def conv_noise(draw):
    ndim = draw.fixed.get("ndim", draw.choose(1, 1, 2, 3))
    arguments = {
        "num_heads": draw.size("H", most=5),
        "in_features": draw.size("D", most=5),
        "size": [draw.size(f"N{i}") for i in range(ndim)],
        "num_realizations": draw.size("R"),
        **seeded(draw, ndim),
        "dtype": draw.choose(None, *DATA_TYPES),
    }

    def piece(seed, num_heads, in_features, size, num_realizations, start, dtype, **kind):
        """The same from a larger call: an entry is a function of its indices alone."""
        start = [start] * len(size) if isinstance(start, int) else start
        whole = functional.conv_noise(
            seed, num_heads + 1, in_features + 2, [n + 5 for n in size], num_realizations + 3,
            start=[n - 2 for n in start], dtype=dtype, **kind,
        )  # fmt: skip
        inner = (slice(2, 2 + n) for n in size)
        return (whole[(slice(num_heads), slice(in_features), *inner, slice(num_realizations))],)

    return Call("conv_noise", arguments, {}, one_output(functional.conv_noise), piece)


def plain_linear_attention(
    q, k, v, *, feature_map, normalize=True, eps=1e-6, initial_state=None, denominator_q=None,
    denominator_k=None, denominator_feature_map="identity", rms_norm=False, **which,
):  # fmt: skip
    """`reference.linear_attention`, with denominators of their own and row norms."""
    if denominator_q is None:
        out, state = reference.linear_attention(
            q, k, v, feature_map, normalize=normalize, eps=eps, initial_state=initial_state, **which
        )
        if rms_norm:
            out = out / (out.square().mean(-1, keepdim=True) + eps).sqrt()
        return out, state
    of_keys = of_sums = None
    if initial_state is not None:
        s, z = initial_state
        of_keys, of_sums = (s, s.new_zeros(s.shape[:3])), (z.unsqueeze(-1), z)
    which["normalize"] = False
    out, (s, _) = reference.linear_attention(q, k, v, feature_map, initial_state=of_keys, **which)
    total, (_, z) = reference.linear_attention(
        denominator_q, denominator_k, torch.ones_like(v[..., :1]), denominator_feature_map,
        initial_state=of_sums, **which,
    )  # fmt: skip
    if normalize:
        total = total + eps
        out = torch.where(total == 0, 0.0, out / total.masked_fill(total == 0, 1.0))
    return out, (s, z)


def linear_attention(draw):
    batch, heads = draw.size("B", most=5), draw.size("H", most=5)
    features, values = draw.size("R", least=1), draw.size("E", least=1)
    queries = draw.length()
    packed = draw.chance(0.3) and "B" not in draw.fixed
    causal = draw.chance(0.5) and ("N" not in draw.fixed or "M" not in draw.fixed)
    keys = draw.length("M")
    if packed:
        batch = 1
    if packed or causal:
        queries = keys = draw.fixed.get("N", keys)
    shapes = {"q": "B N H R", "k": "B M H R", "v": "B M H E"}
    if packed or causal:
        shapes = {name: shape.replace("M", "N") for name, shape in shapes.items()}
    feature_map = draw.choose("elu", "relu", "identity")
    normalize = draw.chance(0.6)

    def positive(values):
        """Sums of weights of any sign may be 0 by accident, and no quotient is right then."""
        return values.abs() + 0.1 if normalize and feature_map == "identity" else values

    arguments = {
        "q": draw.tensor(positive(draw.normal(batch, queries, heads, features)), draw.dtype),
        "k": draw.tensor(positive(draw.normal(batch, keys, heads, features)), draw.dtype),
        "v": draw.tensor(draw.normal(batch, keys, heads, values), draw.dtype),
        "feature_map": feature_map,
        "causal": causal,
        "normalize": normalize,
        "eps": draw.choose(1e-6, 0.3, 0.0),
        "return_state": draw.chance(0.5),
    }
    if not normalize and draw.chance(0.5):
        arguments["rms_norm"] = True
        arguments["eps"] = draw.choose(1e-3, 0.3)
    if draw.chance(0.3):
        share = draw.choose(0.0, 0.3, 0.9, 1.1)
        mask = torch.rand(batch, keys, generator=draw.generator, device="cpu") < share
        arguments["key_padding_mask"] = draw.tensor(mask, torch.bool)
        shapes["key_padding_mask"] = shapes["k"][:3]
    sequences = batch
    if packed:
        sequences = draw.size("S", least=1, most=5)
        inner = sorted(draw.random.choices(range(queries + 1), k=sequences - 1))
        bounds = torch.tensor([0, *inner, queries], device="cpu")
        arguments["cu_seqlens"] = draw.tensor(bounds, draw.choose(torch.int32, torch.int64))
        shapes["cu_seqlens"] = "S"
    width, z = features, "R"
    if normalize and ("F" in draw.fixed or draw.chance(0.3)):
        width, z = draw.size("F", least=1), "F"
        psi = arguments["denominator_feature_map"] = draw.choose("elu", "relu", "identity")
        for name, like in (("denominator_q", "q"), ("denominator_k", "k")):
            rows = draw.normal(*arguments[like].shape[:3], width).abs() + 0.1
            arguments[name] = draw.tensor(rows if psi != "elu" else -rows, draw.dtype)
            shapes[name] = shapes[like][:-1] + "F"
    if queries == keys and draw.chance(0.4):
        form = draw.choose("H", "H R", "B M H", "B M H R")
        if width == features or "R" not in form:
            sizes = {"B": batch, "M": keys, "H": heads, "R": features}
            steps = -draw.normal(*(sizes[name] for name in form.split())).abs()
            steps = steps * draw.choose(0.0, 1e-3, 0.3, 30.0)
            arguments["log_decay"] = draw.tensor(steps, draw.choose(torch.float32, torch.float64))
            shapes["log_decay"] = form.replace("B M", shapes["k"][:3])
    if draw.chance(0.4):
        dtype = draw.choose(torch.float32, torch.float64)
        state = draw.normal(sequences, heads, features, values)
        total = draw.normal(sequences, heads, width).abs() + 0.1
        arguments["initial_s"] = draw.tensor(state, dtype)
        arguments["initial_z"] = draw.tensor(total, draw.choose(dtype, torch.float64))
        shapes["initial_s"] = ("S" if packed else "B") + " H R E"
        shapes["initial_z"] = ("S" if packed else "B") + f" H {z}"

    def gather(arguments):
        state = arguments.pop("initial_s", None), arguments.pop("initial_z", None)
        given = any(s is not None for s in state)
        return {**arguments, "initial_state": state if given else None}

    def function(**arguments):
        out = functional.linear_attention(**gather(arguments))
        return (out[0], *out[1]) if arguments.get("return_state") else (out,)

    def expected(return_state, **arguments):
        out, state = plain_linear_attention(**gather(arguments))
        return (out, *state) if return_state else (out,)

    return Call("linear_attention", arguments, shapes, function, expected)


def sine_attention(draw):
    """A call of `linear_attention` whose queries and keys are encoded before."""
    fixed = dict(draw.fixed)
    draw.fixed = {**fixed, "R": fixed.get("D", draw.choose(1, 2, 3, 5, 8, 17))}
    while True:
        call = linear_attention(draw)
        arguments = {n: x for n, x in call.arguments.items() if n != "return_state"}
        divided = arguments["normalize"] and "denominator_q" not in arguments
        cannot = {"cu_seqlens", "initial_s"} & set(arguments) or "R" in call.shapes.get(
            "log_decay", ""
        )
        # A sine near 0 may be the only weight that relu leaves.
        if not cannot and not (divided and arguments["feature_map"] == "relu"):
            break
    draw.fixed = fixed
    shapes = {name: shape.replace("R", "D") for name, shape in call.shapes.items()}
    heads, features = arguments["q"].shape[2:]
    sines = draw.size("K", least=1, most=5)
    # Weights must not come near 0 where they are divided by: all phases then lie in one quarter.
    arguments["encoded_feature_map"] = arguments.pop("feature_map")
    arguments["feature_map"] = "identity" if divided else draw.choose("identity", "elu", "relu")
    freqs = draw.normal(heads, features, sines).sigmoid() / (4000 if divided else 2)
    # Of a frequency of few bits some sines are 0, but for the rounding of pi: relu has no slope.
    short = [] if arguments["encoded_feature_map"] == "relu" else [draw.dtype]
    arguments["freqs"] = draw.tensor(freqs, draw.choose(*DATA_TYPES[:2], *short))
    shapes["freqs"] = "H D K"
    for name, shape in (("amplitudes", (sines,)), ("offsets", (sines,)), ("constant", ())):
        arguments[name] = None
        if name == "amplitudes" or (draw.chance(0.5) and not (divided and name == "offsets")):
            values = draw.normal(heads, features, *shape)
            values = values.abs() if divided else values
            arguments[name] = draw.tensor(values, draw.parameter_type())
            shapes[name] = "H D K" if shape else "H D"
    arguments["start"] = 0 if divided else draw.choose(0.0, 5, -3.5, 100.25)

    def expected(
        q, k, freqs, amplitudes, offsets, constant, start, feature_map, encoded_feature_map,
        **attention,
    ):  # fmt: skip
        q, k = (apply_feature_map(feature_map, x) for x in (q, k))
        q = reference.sine_features(q, freqs, amplitudes, offsets, constant, start=start)
        k = reference.sine_features(k, freqs, amplitudes, None, constant, start=start)
        return (plain_linear_attention(q, k, feature_map=encoded_feature_map, **attention)[0],)

    return Call(
        "sine_attention", arguments, shapes, one_output(functional.sine_attention), expected,
        ("freqs", "amplitudes", "offsets", "constant"),
    )  # fmt: skip


def linear_attention_state(draw):
    """The keys of a call of `linear_attention` without queries."""
    call = linear_attention(draw)
    kept = (
        "k", "v", "feature_map", "key_padding_mask", "cu_seqlens", "initial_s", "initial_z",
        "denominator_k", "denominator_feature_map", "log_decay",
    )  # fmt: skip
    arguments = {name: call.arguments[name] for name in kept if name in call.arguments}
    shapes = {name: shape for name, shape in call.shapes.items() if name in arguments}

    def gather(arguments):
        state = arguments.pop("initial_s", None), arguments.pop("initial_z", None)
        return {**arguments, "initial_state": state if state[0] is not None else None}

    def function(**arguments):
        return functional.linear_attention_state(**gather(arguments))

    def expected(k, v, **arguments):
        denominator = arguments.get("denominator_k")
        if denominator is not None:
            arguments["denominator_q"] = denominator
        return plain_linear_attention(k, k, v, **gather(arguments))[1]

    return Call("linear_attention_state", arguments, shapes, function, expected)


def code_parameters(draw):
    """Logits of frequencies, offsets and gains in one type, and a function for more tensors."""
    dtype = draw.choose(torch.float32, torch.float64)
    heads, features = draw.size("H", most=5), draw.size("D")
    sines = draw.size("K", least=1, most=17)
    grid = [draw.fixed["ndim"]] if "ndim" in draw.fixed else draw.choose([], [], [1], [2], [3])

    def more(*shape):
        return draw.tensor(draw.normal(heads, features, *shape), dtype)

    arguments = {"freqs": more(sines, *grid), "offsets": more(sines), "gains": more(sines)}
    shapes = {"freqs": "H D K" + " ndim" * len(grid), "offsets": "H D K", "gains": "H D K"}
    return arguments, shapes, more, grid


def sine_code(draw):
    arguments, shapes, more, _ = code_parameters(draw)
    arguments["noise"] = more(2 * arguments["gains"].shape[2], draw.size("R"))
    shapes["noise"] = "H D K R"
    arguments["scale"] = 0.3
    return Call(
        "sine_code", arguments, shapes, lambda **a: functional.sine_code(**a),
        lambda **a: plain_sine_code(**a),
    )  # fmt: skip


def phase_code(draw):
    arguments, shapes, more, grid = code_parameters(draw)
    heads, features, sines = arguments["gains"].shape
    pairs = draw.size("R")
    size = (heads, features, pairs)
    sine = torch.randint(max(1, sines), size, generator=draw.generator, device="cpu")
    shapes |= {"sine": "H D R", "phases": "H D R"}
    arguments |= {"bandwidths": None, "deviates": None}
    if draw.chance(0.5):
        arguments |= {"bandwidths": more(sines), "deviates": more(pairs, *grid)}
        arguments["deviates"] = arguments["deviates"].detach()
        shapes |= {"bandwidths": "H D K", "deviates": "H D R" + " ndim" * len(grid)}
    arguments["sine"] = draw.tensor(sine, torch.int64)
    arguments["phases"] = more(pairs).detach()
    arguments["scale"] = 0.3
    return Call(
        "phase_code", arguments, shapes, lambda **a: functional.phase_code(**a),
        lambda **a: plain_phase_code(**a),
    )  # fmt: skip


def exact_code(draw):
    arguments, shapes, _, _ = code_parameters(draw)
    del arguments["offsets"], shapes["offsets"]
    arguments["scale"] = 0.3
    return Call(
        "exact_code", arguments, shapes, lambda **a: functional.exact_code(**a),
        lambda **a: plain_exact_code(**a),
    )  # fmt: skip


def gate_exact_code(draw):
    dtype = draw.choose(torch.float32, torch.float64)
    code = draw.size("H", most=5), draw.size("D")
    arguments = {
        "amplitudes": draw.tensor(draw.normal(*code, draw.size("K", most=17)), dtype),
        "gate": draw.tensor(draw.normal(*code), dtype),
    }
    return Call(
        "gate_exact_code", arguments, {"amplitudes": "H D K", "gate": "H D"},
        lambda **a: functional.gate_exact_code(**a), lambda **a: plain_gate_exact_code(**a),
    )  # fmt: skip


def gate_code(draw):
    dtype = draw.choose(torch.float32, torch.float64)
    heads, features = draw.size("H", most=5), draw.size("D")
    inner = [draw.size(f"C{i}", most=17) for i in range(draw.choose(0, 1, 2, 2, 3))]

    def more(*shape):
        return draw.tensor(draw.normal(heads, features, *shape), dtype)

    code = " ".join(("H", "D", *(f"C{i}" for i in range(len(inner)))))
    arguments = {"query": more(*inner), "key": more(*inner), "gate": more()}
    arguments |= {"noise": more(draw.size("R")), "scale": 0.3}
    shapes = {"query": code, "key": code, "gate": "H D", "noise": "H D R"}
    return Call(
        "gate_code", arguments, shapes, lambda **a: functional.gate_code(**a),
        lambda **a: plain_gate_code(**a),
    )  # fmt: skip


OPERATORS = {
    f.__name__: f
    for f in (
        sine_filter, phasor_filter, sine_features, rotary, conv_filter, conv_noise,
        linear_attention, linear_attention_state, sine_attention, sine_code, phase_code, exact_code,
        gate_code, gate_exact_code,
    )
}  # fmt: skip


def tensors_of(arguments):
    return {name: t for name, t in arguments.items() if isinstance(t, torch.Tensor)}
