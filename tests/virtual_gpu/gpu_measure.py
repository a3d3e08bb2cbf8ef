"""Measures on a GPU what gpu_model.py predicts for an H100: the times of an operator's kernels.

    python tests/virtual_gpu/gpu_measure.py ["OPERATOR name=value ..." ...] [--json FILE] [--kernels N]
    python tests/virtual_gpu/gpu_measure.py --layers fading,sine,none,softmax [name=value ...]
    ncu ... python tests/virtual_gpu/gpu_measure.py --once ["OPERATOR name=value ..." ...]

Operators and shape names are those of gpu_profile.py; each case is one argument, and without any
all operators are measured. The operator `peers` is flash-linear-attention's kernels (its products
alone, and with the map and the normalization that ours has inside). --layers measures whole
self-attention layers instead, of width H D, and lists the kernels that take most of the time,
PyTorch's included. A time is the sum of the times of all kernels that a pass starts, as PyTorch's
profiler has them, mean of `--repeats` passes: launch overhead is left out, kernels of PyTorch
(sums, casts) are not. --once runs each case a second time between cudaProfilerStart and
cudaProfilerStop and measures nothing, for Nsight Compute (--profile-from-start off).
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
    "case",
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


def short(kernel):
    """A kernel's name and types, without namespaces and parameters."""
    kernel = re.sub(r"torch_spe::(cuda|core)::|\(anonymous namespace\)::|^void ", "", kernel)
    loop = re.search(r"static_kernel<.*?, long, (?:\w+::)*(\w+)", kernel)
    return f"cub: {loop.group(1)}" if loop else re.sub(r"\(.*", "", kernel)


def parsed(case):
    """Operator and shape of a case."""
    operator, *items = case.split()
    return operator, shape_of(items)


def cases_of(names):
    """(name, function, inputs, useful floating-point operations) of each, on the GPU."""
    for name in names:
        operator, shape = parsed(name)
        function, inputs, work = make_case(
            "linear_attention" if operator == "peers" else operator, shape
        )
        functions = {name: to_gpu(function)}
        if operator == "peers":
            inputs = inputs[:3]
            functions = {f"{key} {name[5:]}".strip(): peer for key, peer in peers(shape).items()}
        for key, each in functions.items():
            yield key, shape, each, [tensor.cuda().requires_grad_() for tensor in inputs], work


def run_once(names):
    """Run each case twice, the second time between the marks that profilers look for."""
    for name, _, function, inputs, _ in cases_of(names):
        for profiled in (False, True):
            torch.cuda.synchronize()
            if profiled:
                torch.cuda.cudart().cudaProfilerStart()
            out = function(*inputs)
            torch.autograd.grad(out, inputs, torch.ones_like(out))
            torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
        print(name, flush=True)


def measure(names, repeats, listed):
    """The rows of a table, which is printed as they come, with some kernels of each."""
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for name, shape, function, inputs, work in cases_of(names):
        size = sum(t.nbytes for t in inputs)
        try:
            measured = list(passes(function, inputs, repeats))
        except Exception as error:  # the next case is measured all the same
            print(f"| {name} | {type(error).__name__}: {error} |", flush=True)
            continue
        out = function(*inputs).nbytes
        data = {"forward": size + out, "backward": 2 * size + out}
        for which, seconds, kernels in measured:
            roof = roof_of(data[which], work * (1 if which == "forward" else 2))
            times = {}
            for kernel, (_, time) in kernels.items():
                times[short(kernel)] = times.get(short(kernel), 0) + 1e3 * time
            times = dict(sorted(times.items(), key=lambda item: -item[1]))
            worst = next(iter(times))
            count = round(sum(count for count, _ in kernels.values()))
            print(
                f"| {name} | {which} | {count} | {1e3 * seconds:.3f} | {1e3 * roof:.3f} "
                f"| {100 * roof / seconds:.0f} % | {worst} ({100 * times[worst] / sum(times.values()):.0f} %) |",
                flush=True,
            )
            for kernel in list(times)[:listed]:
                print(f"    {times[kernel]:.4f} {kernel}", flush=True)
            yield {
                "operator": name.split()[0], "case": name, "pass": which, **shape,
                "kernels": count, "ms": 1e3 * seconds, "roof ms": 1e3 * roof, "ms of kernels": times,
            }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all operators")
    parser.add_argument("--repeats", type=int, default=20, help="passes (default: 20)")
    parser.add_argument("--kernels", type=int, default=0, help="of each pass that are listed")
    parser.add_argument("--layers", default="", help="positions, separated by commas")
    parser.add_argument("--once", action="store_true", help="for a profiler")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(f"{machine['gpu']}, torch {machine['torch']}\n")
    if arguments.layers:
        measure_layers(arguments.layers.split(","), shape_of(arguments.cases), arguments.repeats)
        return
    names = arguments.cases or OPERATORS
    if arguments.once:
        run_once(names)
        return
    rows = []
    for row in measure(names, arguments.repeats, arguments.kernels):
        rows.append(row)
        if arguments.json:  # whatever ends the next one
            arguments.json.write_text(
                json.dumps({**machine, "version": torch_spe.__version__, "rows": rows})
            )


if __name__ == "__main__":
    sys.exit(main())
