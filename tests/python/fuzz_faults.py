"""Ways to break one argument of a valid call of `fuzz_calls`, and what the errors must say."""

import math
import re

import torch
from helpers import here

REQUIRED = {
    "x", "freqs", "weight", "coefficients", "amplitudes", "kernel", "q", "k", "v", "offsets",
    "gains", "noise", "sine", "phases", "query", "key", "gate", "seed",
}  # fmt: skip
OPTIONAL = {
    ("conv_filter", "noise"), ("conv_filter", "seed"), ("sine_features", "offsets"),
    ("sine_attention", "offsets"),
}  # fmt: skip


def complaint(call, argument, kind, value):
    """What is wrong with the error of a call with this argument, or None."""
    try:
        call.function(**{**call.arguments, argument: value})
    except (TypeError, ValueError, IndexError) as error:
        message = str(error)
    except RuntimeError as error:
        message = str(error)
        # PyTorch's own parser of arguments, which names the type that came.
        if type(error) is not RuntimeError or "Expected a value of type" not in message:
            return f"{type(error).__name__}: {message}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    else:
        return "no error"
    names = {argument, *({"initial_state"} if argument.startswith("initial_") else {})}
    symbol = kind.split()[0]
    # Of two sizes that do not fit each other, either is wrong.
    names |= {n for n, s in call.shapes.items() if symbol in s.split() and "dimension" not in kind}
    if argument == "kernel" and "dimension" in kind:
        names.add("x")  # whose dimensions follow those of the kernel
    if argument == "num_realizations":
        names |= {"noise", "constant"}
    return None if any(re.search(rf"\b{name}\b", message) for name in names) else message


def faults(call, draw):
    """Wrong values as (argument, kind): value; each makes the call invalid."""
    found = {}
    for name, value in call.arguments.items():
        if isinstance(value, torch.Tensor) and name in call.shapes:
            new = of_tensor(call, name, value.detach(), draw)
        else:
            new = of_others(call, name, value)
        found |= {(name, kind): value for kind, value in new.items()}
    return found


def of_tensor(call, name, value, draw):
    """Every tensor: other types of Python, ranks, sizes, dtypes, devices, layouts and values."""
    plain = value.contiguous()
    wrong = {
        "list": value.tolist(),
        "number": 3,
        "str": "wrong",
        "one dimension more": value.unsqueeze(0),
        "scalar": torch.zeros((), dtype=value.dtype, device=value.device),
        "meta": value.to("meta"),
        "sparse": plain.to_sparse(),
        "nested": torch.nested.as_nested_tensor([plain, plain]),
    }
    if value.dim() == 1 and name == "positions":
        wrong["one dimension more"] = value[None, :, None]  # [N, 1] is valid too
    if value.dim() > 1 and len(value) and name != "positions" and call.operator != "gate_code":
        wrong["one dimension less"] = value[0]
    if (name in REQUIRED) and (call.operator, name) not in OPTIONAL:
        wrong["none"] = None
    if value.is_floating_point():
        wrong |= {"bool": value.bool(), "complex": value.to(torch.complex64)}
        if name != "positions":
            wrong["int32"] = value.int()
        if value.dtype == torch.float32 and value.device.type == "cpu" and value.dim() <= 5:
            wrong["mkldnn"] = plain.to_mkldnn()
        if name in call.finite and value.numel() and value.device.type == "cpu":
            index = draw.random.randrange(value.numel())
            for kind in (math.nan, math.inf, -math.inf):
                wrong[str(kind)] = plain.clone()
                wrong[str(kind)].view(-1)[index] = kind
    else:
        wrong["complex"] = value.to(torch.complex64)
        if name != "positions":
            wrong["float"] = value.float()
        if value.dtype != torch.bool and name != "positions":
            wrong["int16"] = value.short()
    return wrong | of_sizes(call, name, value) | of_values(call, name, plain)


def of_sizes(call, name, value):
    """One entry more or less in a dimension that another argument has too."""
    wrong = {}
    if name == "cu_seqlens" and "initial_s" not in call.shapes:
        return wrong
    for dim, symbol in enumerate(call.shapes[name].split()):
        shared = any(
            symbol in shape.split() for other, shape in call.shapes.items() if other != name
        )
        shared |= symbol == "2" or (symbol[0] == "P" and "noise" in call.shapes)
        if not shared:
            continue
        sizes = list(value.shape)
        sizes[dim] += 1
        wrong[f"{symbol} + 1"] = value.new_ones(sizes)
        if value.shape[dim] > 1:
            wrong[f"{symbol} = 1"] = value.narrow(dim, 0, 1)
    return wrong


def of_values(call, name, value):
    """What only some tensors must be. On a GPU values are not looked at: that would wait for it."""
    if value.is_cuda:
        return {}
    if name == "cu_seqlens" and len(value) > 1:
        longer, negative, first = value.clone(), value.clone(), value.clone()
        longer[-1] += 1
        negative[0] = -1
        first[0] = 1
        wrong = {"longer": longer, "negative": negative, "first": first, "empty": value[:0]}
        if value[-1] > 0:
            wrong["decreasing"] = torch.cat((value, value.flip(0)[1:], value[-1:]))
        # A state for each sequence would be missed first.
        return wrong if "initial_s" not in call.shapes else {"longer": longer, "first": first}
    if name == "sine" and value.numel():
        most = call.arguments["gains"].shape[2]
        return {"negative": value - most, "too large": value + most}
    return {}


def of_others(call, name, value):
    """Numbers, words, flags and seeds."""
    encoder = "freqs" in call.shapes and ("x" in call.shapes or "q" in call.shapes)
    ndim = call.shapes.get("kernel", "").count("P") or len(call.arguments.get("size", []))
    if name == "start" and encoder:
        wrong = {"list": [0.0], "str": "wrong", "nan": math.nan, "inf": math.inf, "none": None}
        return wrong | ({"positions given": 3.0} if "positions" in call.shapes else {})
    if name == "scale":
        return {"list": [0.3], "str": "wrong", "none": None}
    if name == "eps":
        return {"nan": math.nan, "negative": -1e-6, "inf": math.inf, "str": "a", "list": [0.1]}
    if name in ("feature_map", "encoded_feature_map", "noise_kind"):
        return {"another": "wrong", "none": None, "number": 3, "list": ["elu"], "empty": ""}
    if name in ("causal", "normalize"):
        return {"str": "wrong", "list": [True], "none": None}
    if name == "seed" and value is not None:
        generated = here(torch.tensor([1]))
        wrong = {"meta": generated.to("meta")} if call.operator == "conv_filter" else {}
        return wrong | {
            "float": 1.5, "bool": True, "str": "wrong", "list": [1], "none": None,
            "int32": generated.int(), "float tensor": generated.double(),
            "two": generated.repeat(2), "empty": generated[:0],
        }  # fmt: skip
    if name == "num_realizations" and value is not None:
        wrong = {"float": 7.5, "str": "wrong", "list": [7], "negative": -1}
        if call.operator == "conv_filter":
            wrong["zero"] = 0
        if "noise" in call.shapes:
            wrong["another"] = value + 1
        elif call.operator == "conv_filter":
            wrong |= {"none": None, "too many": 2**26 + 1}
        return wrong
    if name == "noise_stride":
        return {
            "zero": 0, "negative": -1, "float": 1.5, "nan": math.nan, "str": "wrong", "none": None,
            "too many": [1] * (ndim + 2), "too large": 2**20 + 1, "product": [2**20] * 2,
            "floats": [1.5] * ndim, "tensor": torch.ones(ndim),
        }  # fmt: skip
    if name == "start":
        return {
            "float": 1.5, "nan": math.nan, "inf": math.inf, "str": "wrong", "none": None,
            "too many": [1] * (ndim + 1), "too far": 2**62, "far below": [-(2**62)] * ndim,
            "floats": [1.5] * ndim, "huge": 2**70,
        }  # fmt: skip
    if name in ("num_heads", "in_features"):
        return {"negative": -1, "float": 1.5, "str": "wrong", "none": None, "too many": 65537}
    if name == "size":
        return {
            "empty": [], "too many": [1] * 4, "negative": [-1] * ndim, "float": 1.5, "none": None,
            "str": "wrong", "nan": math.nan, "floats": [1.5] * ndim,
        }  # fmt: skip
    if name == "dtype":
        return {"int64": torch.int64, "bool": torch.bool, "complex": torch.complex64, "str": "x"}
    return {}
