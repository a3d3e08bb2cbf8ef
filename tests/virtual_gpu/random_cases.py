"""Random shapes through the virtual GPU, against the equations in float64.

    python tests/virtual_gpu/random_cases.py [--folder FOLDER] [--count N] [--seed S] [--only OPERATOR]

The reference is torch_spe.reference in float64, on the same (rounded) inputs, with its autograd.
An error is the largest difference divided by the largest number of the right result. Prints the
largest error for each operator and type, and every case beyond its bound.
"""

import collections
import random
import time

from virtual_gpu import load, parser

DTYPES = ["float32", "float16", "bfloat16", "float64"]
# Of results and gradients; the first rounding of a 16-bit result alone is 2^-11, 2^-8.
BOUNDS = {"float64": 1e-11, "float32": 1e-5, "float16": 6e-3, "bfloat16": 4e-2}


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--count", type=int, default=200)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--only")
    arguments = arguments.parse_args()
    vgpu = load(arguments.folder)
    import torch

    from torch_spe import functional, reference

    ops = torch.ops.torch_spe
    rng = random.Random(arguments.seed)

    def size(most):
        """Small and odd, or a multiple of 8 or 16, or near one."""
        kind = rng.random()
        if kind < 0.4:
            return rng.randint(1, most)
        if kind < 0.8:
            return max(1, min(most, rng.choice([8, 16, 24, 32, 48, 64, 72, 80, 96, 128, 136])))
        return max(1, min(most, rng.choice([16, 32, 64, 128]) + rng.choice([-1, 1])))

    def normal(*shape, dtype):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    def filters(kind, dtype, wide):
        batch, length, heads = rng.choice([1, 2, 3, 5, 8, 9, 17]), size(200), rng.randint(1, 2)
        features, constant = size(80), rng.random() < 0.5
        ndim = rng.choice([0, 0, 0, 1, 2])
        sines, real = rng.randint(1, 12), 2 * rng.randint(1, 70)
        if batch * length * features * real > 3_000_000:
            length = max(1, 3_000_000 // (batch * features * real))
        if kind == "sine_filter":
            real = size(136)
        grid = (ndim,) if ndim else ()
        columns = real // 2 if kind == "phasor_filter" else sines
        x = normal(batch, length, heads, features, dtype=dtype)
        freqs = (torch.rand(heads, features, columns, *grid, generator=g).double() / 2).to(wide)
        positions = normal(length, ndim, dtype=torch.float64) * 9 if ndim else None
        start = 0.0 if ndim else rng.choice([0.0, 0.0, 12345.0, -7.0])
        if kind == "sine_filter":
            weight = (
                normal(heads, features, 2 * sines, real, dtype=wide) / (features * sines) ** 0.5
            )
            c = normal(heads, features, real, dtype=wide) / features**0.5 if constant else None
            inputs = [x, freqs, weight, c, positions]
            outputs = real
        elif kind == "phasor_filter":
            weight = normal(heads, features, columns, 2, dtype=wide)
            c = normal(heads, features, real, dtype=wide) if constant else None
            inputs = [x, freqs, weight, c, positions]
            outputs = real
        else:
            amplitudes = normal(heads, features, sines, dtype=wide)
            offsets = normal(heads, features, sines, dtype=wide) if rng.random() < 0.5 else None
            c = normal(heads, features, dtype=wide) if constant else None
            inputs = [x, freqs, amplitudes, offsets, c, positions]
            outputs = (2 * sines + constant) * features
        grad = normal(batch, length, heads, outputs, dtype=dtype)
        operator, right = getattr(ops, kind), getattr(reference, kind)
        note = f"B{batch} N{length} H{heads} D{features} K{sines} R{real} c{constant} ndim{ndim} start{start}"
        return (
            lambda *t: operator(*t, start),
            lambda *t: right(*t, start),
            inputs, grad, note,
        )  # fmt: skip

    def attention(dtype, wide):
        batch, heads = rng.randint(1, 2), rng.randint(1, 2)
        queries = size(300)
        causal = rng.random() < 0.6
        keys = queries if causal else size(300)
        features, values = size(136), size(136)
        feature_map = rng.choice(["elu", "elu", "relu", "identity"])
        normalize = feature_map != "identity" and rng.random() < 0.7
        q = normal(batch, queries, heads, features, dtype=dtype)
        k = normal(batch, keys, heads, features, dtype=dtype)
        v = normal(batch, keys, heads, values, dtype=dtype)
        mask = None
        if rng.random() < 0.3:
            mask = torch.rand(batch, keys, generator=g) < 0.3
            mask[:, :2] = False
        grad = normal(batch, queries, heads, values, dtype=dtype)
        eps = 1e-1 if feature_map == "relu" else 1e-3
        note = f"B{batch} N{queries} M{keys} H{heads} R{features} E{values} {feature_map} causal{causal} norm{normalize} mask{mask is not None}"
        return (
            lambda a, b, c: ops.linear_attention(a, b, c, feature_map, causal, normalize, eps, mask)[0],
            lambda a, b, c: reference.linear_attention(a, b, c, feature_map, causal, normalize, eps, mask)[0],
            [q, k, v], grad, note,
        )  # fmt: skip

    def convolution(dtype, wide):
        ndim = rng.choice([1, 1, 1, 2, 3])
        batch, heads, features = rng.choice([1, 2, 3, 8, 9, 17]), rng.randint(1, 2), size(40)
        sizes = [size(140)] if ndim == 1 else [rng.randint(1, 9) for _ in range(ndim)]
        taps = [size(130)] if ndim == 1 else [rng.randint(1, 4) for _ in range(ndim)]
        real = size(72)
        strides = [rng.choice([1, 1, 2, 4, 7, 16, 32, 64])] if ndim == 1 else [
            rng.choice([1, 2, 3]) for _ in range(ndim)
        ]  # fmt: skip
        kind = rng.choice(["gaussian", "rademacher"])
        starts = [rng.choice([0, -5, 1000])] * ndim
        given = rng.random() < 0.2
        constant = rng.random() < 0.5
        x = normal(batch, *sizes, heads, features, dtype=dtype)
        kernel = normal(heads, features, *taps, dtype=wide)
        c = normal(heads, features, real, dtype=wide) if constant else None
        grad = normal(batch, *sizes, heads, real, dtype=dtype)
        line = [n + p - 1 for n, p in zip(sizes, taps, strict=True)]
        seed = rng.randint(0, 1 << 40)
        noise = functional.conv_noise(
            seed, heads, features, line, real, noise_kind=kind, noise_stride=strides, start=starts,
            dtype=torch.float64,
        )  # fmt: skip
        note = f"B{batch} {sizes} H{heads} D{features} P{taps} R{real} {kind} stride{strides} start{starts} given{given} c{constant}"
        if given:
            z = noise.to(wide)
            return (
                lambda a, b, d: ops.conv_filter(a, b, z, d),
                lambda a, b, d: reference.conv_filter(a, b, z.double(), d),
                [x, kernel, c], grad, note,
            )  # fmt: skip
        many = [] if all(s == 1 for s in strides) else strides
        at = [] if all(s == 0 for s in starts) else starts
        key = torch.tensor(seed)
        return (
            lambda a, b, d: ops.conv_filter(a, b, None, d, key, real, kind, many, at),
            lambda a, b, d: reference.conv_filter(a, b, noise, d),
            [x, kernel, c], grad, note,
        )  # fmt: skip

    def evaluate(function, inputs, grad, wide):
        leaves = []
        for t in inputs:
            if t is None:
                leaves.append(None)
                continue
            leaf = t.detach().double() if wide else t.detach().clone()
            leaves.append(leaf.requires_grad_())
        out = function(*leaves)
        wanted = [t for t in leaves if t is not None]
        grads = torch.autograd.grad(out, wanted, grad.double() if wide else grad)
        return [out.detach(), *(t.detach() for t in grads)]

    makers = {
        "sine_filter": lambda *a: filters("sine_filter", *a),
        "phasor_filter": lambda *a: filters("phasor_filter", *a),
        "sine_features": lambda *a: filters("sine_features", *a),
        "linear_attention": attention,
        "conv_filter": convolution,
    }
    if arguments.only:
        makers = {k: v for k, v in makers.items() if k in arguments.only.split(",")}
    worst = collections.defaultdict(float)
    counts = collections.Counter()
    failures = 0
    began = time.time()
    for case in range(arguments.count):
        g = torch.Generator().manual_seed(arguments.seed * 100003 + case)
        name = list(makers)[case % len(makers)]
        dtype = getattr(torch, rng.choice(DTYPES[:3] * 2 + DTYPES[3:]))
        wide = torch.promote_types(dtype, torch.float32)
        function, right, inputs, grad, note = makers[name](dtype, wide)
        label = f"{name} {str(dtype)[6:]}"
        vgpu.set_schedule(rng.choice(["fifo", "lifo", f"random:{case}"]))
        expected = evaluate(right, inputs, grad, True)
        try:
            vgpu.enable(True)
            torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
            got = evaluate(function, inputs, grad, False)
        except RuntimeError as error:
            failures += 1
            print(f"FAILED case {case} {label} {note}: {error}", flush=True)
            continue
        finally:
            torch.use_deterministic_algorithms(False)
            vgpu.enable(False)
        counts[label] += 1
        names = ["out"] + [f"grad{i}" for i, t in enumerate(inputs) if t is not None]
        for what, actual, answer in zip(names, got, expected, strict=True):
            scale = answer.abs().max().clamp(min=1e-3)
            error = float((actual.double() - answer).abs().max() / scale)
            worst[label, what] = max(worst[label, what], error if error == error else float("inf"))
            if not error <= BOUNDS[str(dtype)[6:]]:
                failures += 1
                print(f"BEYOND case {case} {label} {what}: {error:.2e}  {note}", flush=True)
    print(f"{arguments.count} cases, {failures} failures, {time.time() - began:.0f} s")
    for label in sorted(counts):
        errors = ", ".join(f"{w} {e:.1e}" for (n, w), e in sorted(worst.items()) if n == label)
        print(f"{label:28s} {counts[label]:4d}  {errors}")


if __name__ == "__main__":
    main()
