"""Measures on a GPU what gpu_model.py predicts for an H100: the times of an operator's kernels.

    python tests/virtual_gpu/gpu_measure.py [OPERATOR ...] [--peer] [--json FILE] [name=value ...]
    python tests/virtual_gpu/gpu_measure.py --layers fading,sine,none,softmax [name=value ...]

Operators and shape names are those of gpu_profile.py. --layers measures whole self-attention layers
instead, of width H D, and lists the kernels that take most of the time, PyTorch's included. A time is the sum of the times of all kernels
that a pass starts, as PyTorch's profiler has them, mean of `--repeats` passes: launch overhead is left
out, kernels of PyTorch (sums, casts) are not. --peer also measures flash-linear-attention's kernels
(its products alone, and with the map and the normalization that ours has inside).
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_model import OPERATORS
from gpu_profile import make_case, roof_of, shape_of

import torch_spe

HEAD = (
    "operator",
    "pass",
    "kernels",
    "measured, ms",
    "roof, ms",
    "of the roof",
    "costliest kernel",
)


def to_gpu(function):
    """The function with the tensors among its defaults on the GPU."""
    if getattr(function, "__defaults__", None):
        function.__defaults__ = tuple(
            d.cuda() if isinstance(d, torch.Tensor) else d for d in function.__defaults__
        )
    return function


def kernel_times(run, repeats):
    """Seconds of the GPU's kernels in one call (the mean), and name -> (how many, seconds)."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    kernels = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count, time = kernels.get(event.name, (0, 0.0))
            seconds = event.time_range.elapsed_us() / 1e6 / repeats
            kernels[event.name] = (count + 1 / repeats, time + seconds)
    return sum(time for _, time in kernels.values()), kernels


def passes(function, inputs, repeats):
    """Of each pass: seconds, and its kernels. `inputs` want gradients."""
    out = function(*inputs)
    grad = torch.randn_like(out)
    yield "forward", *kernel_times(lambda: function(*inputs), repeats)
    yield (
        "backward",
        *kernel_times(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True), repeats),
    )


def peers(shape):
    """flash-linear-attention's kernels: name -> a function of q, k and v."""
    from fla.ops.linear_attn import chunk_linear_attn, fused_chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla, fused_chunk_simple_gla

    decay = -torch.rand(shape["H"], device="cuda") / 64

    def products(attend, **options):
        return lambda q, k, v: attend(q, k, v, scale=1.0, **options)[0]

    def whole(attend):
        return lambda q, k, v: attend(F.elu(q) + 1, F.elu(k) + 1, v, scale=1.0, normalize=True)[0]

    return {
        "fla chunk, products": products(chunk_linear_attn, normalize=False),
        "fla chunk, products, decay": products(chunk_simple_gla, g_gamma=decay),
        "fla chunk, with map and normalization": whole(chunk_linear_attn),
        "fla fused_chunk, products, decay": products(fused_chunk_simple_gla, g_gamma=decay),
        "fla fused_chunk, with map and normalization": whole(fused_chunk_linear_attn),
    }


def layer(position, heads, features, dtype):
    """A causal self-attention layer as a function of its input, and its parameters."""
    width = heads * features
    if position == "softmax":
        module = torch.nn.MultiheadAttention(width, heads, batch_first=True)
    else:
        position = None if position == "none" else position
        module = torch_spe.SPEMultiheadAttention(width, heads, batch_first=True, position=position)
    module = module.to("cuda", dtype)
    options = {"need_weights": False, "is_causal": True}

    def run(x):
        mask = None
        if position == "softmax":
            mask = torch.nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device)
        return module(x, x, x, attn_mask=mask, **options)[0]

    return run, list(module.parameters())


def measure_layers(positions, shape, repeats):
    """Print the times of layers and of their costliest kernels."""
    dtype = getattr(torch, shape["dtype"])
    width = shape["H"] * shape["D"]
    x = torch.randn(shape["B"], shape["N"], width, device="cuda", dtype=dtype).requires_grad_()
    for position in positions:
        run, parameters = layer(position, shape["H"], shape["D"], dtype)
        for which, seconds, kernels in passes(
            lambda x, *_, run=run: run(x), [x, *parameters], repeats
        ):
            count = round(sum(count for count, _ in kernels.values()))
            print(f"\n{position}, {which}: {1e3 * seconds:.3f} ms in {count} kernels", flush=True)
            worst = sorted(kernels.items(), key=lambda item: -item[1][1])[:12]
            for name, (times, time) in worst:
                print(f"  {1e3 * time:.3f} ms {times:5.1f} x {name[:150]}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", help="operators (default: all) and name=value")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--repeats", type=int, default=20, help="passes (default: 20)")
    parser.add_argument("--layers", default="", help="positions, separated by commas")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shape = shape_of(item for item in arguments.what if "=" in item)
    operators = [item for item in arguments.what if "=" not in item] or OPERATORS
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, measured:")
    print(" ".join(f"{name}={value}" for name, value in shape.items()) + "\n")
    if arguments.layers:
        measure_layers(arguments.layers.split(","), shape, arguments.repeats)
        return
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    results = []

    def show(name, function, inputs, work):
        inputs = [tensor.cuda().requires_grad_() for tensor in inputs]
        size = sum(t.nbytes for t in inputs)
        try:
            measured = list(passes(function, inputs, arguments.repeats))
        except Exception as error:  # the next operator is measured all the same
            print(f"| {name} | {type(error).__name__}: {error} |", flush=True)
            return
        out = function(*inputs).nbytes
        data = {"forward": size + out, "backward": 2 * size + out}
        for which, seconds, kernels in measured:
            roof = roof_of(data[which], work * (1 if which == "forward" else 2))
            worst = max(kernels, key=lambda kernel: kernels[kernel][1])
            share = 100 * kernels[worst][1] / sum(time for _, time in kernels.values())
            label = re.sub(r"<.*|\(.*|^void |torch_spe::cuda::", "", worst)
            count = round(sum(count for count, _ in kernels.values()))
            print(
                f"| {name} | {which} | {count} | {1e3 * seconds:.3f} | {1e3 * roof:.3f} "
                f"| {100 * roof / seconds:.0f} % | {label} ({share:.0f} %) |",
                flush=True,
            )
            results.append({
                "operator": name, "pass": which, "seconds": seconds, "roof": roof,
                "kernels": {key: time for key, (_, time) in kernels.items()},
            })  # fmt: skip

    for operator in operators:
        function, inputs, work = make_case(operator, shape)
        show(operator, to_gpu(function), inputs, work)
        if operator == "linear_attention" and arguments.peer:
            q, k, v = inputs[:3]
            for name, peer in peers(shape).items():
                show(name, peer, [q, k, v], work)
    if arguments.json:
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        arguments.json.write_text(
            json.dumps(
                {**machine, "version": torch_spe.__version__, "shape": shape, "results": results}
            )
        )


if __name__ == "__main__":
    sys.exit(main())
