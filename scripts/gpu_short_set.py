"""Run every CUDA kernel once on small tensors, for compute-sanitizer, which is slow."""

import argparse

import torch

import torch_spe  # noqa: F401


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="two shapes and two types only")
    tiny = parser.parse_args().tiny
    # Batch, length, heads, features, sines, realizations.
    shapes = [(2, 70, 1, 5, 3, 9), (9, 70, 1, 9, 1, 72)]
    if not tiny:
        shapes.append((1, 200, 2, 16, 4, 72))
    # Whether to allow tf32, which is of float32 only.
    dtypes = [(torch.bfloat16, False), (torch.float32, False)]
    if not tiny:
        dtypes += [(torch.float32, True), (torch.float16, False), (torch.float64, False)]
    for dtype, tf32 in dtypes:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        for shape in shapes:
            sine(dtype, *shape)
            phasors(dtype, *shape)
            conv(dtype, *shape)
            attention(dtype, *shape)
            rotary_and_maps(dtype, *shape)
            if wide(dtype) == dtype:
                codes(dtype, *shape[2:])
    torch.cuda.synchronize()
    print("done")


def leaf(*shape, dtype):
    return torch.randn(*shape, dtype=dtype, device="cuda", requires_grad=True)


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def sine(dtype, batch, length, heads, features, sines, realizations):
    x = leaf(batch, length, heads, features, dtype=dtype)
    freqs = leaf(heads, features, sines, dtype=wide(dtype))
    weight = leaf(heads, features, 2 * sines, realizations, dtype=wide(dtype))
    constant = leaf(heads, features, realizations, dtype=wide(dtype))
    positions = leaf(length, dtype=torch.float64)
    grid = leaf(heads, features, sines, 2, dtype=wide(dtype))
    for f, p in ((freqs, None), (freqs, positions), (grid, leaf(length, 2, dtype=torch.float64))):
        out = torch.ops.torch_spe.sine_filter(x, f, weight, constant, p)
        out.backward(torch.randn_like(out))


def phasors(dtype, batch, length, heads, features, sines, realizations):
    x = leaf(batch, length, heads, features, dtype=dtype)
    for count, function, coefficients in (
        (realizations, torch.ops.torch_spe.phasor_filter, (2,)),
        (sines, torch.ops.torch_spe.sine_features, ()),
    ):
        freqs = leaf(heads, features, count, dtype=wide(dtype))
        grid = leaf(heads, features, count, 2, dtype=wide(dtype))
        values = leaf(heads, features, count, *coefficients, dtype=wide(dtype))
        for f, positions in (
            (freqs, None),
            (freqs, leaf(length, dtype=torch.float64)),
            (grid, leaf(length, 2, dtype=torch.float64)),
        ):
            out = function(x, f, values, positions=positions)
            out.backward(torch.randn_like(out))


def codes(dtype, heads, features, sines, realizations):
    ops = torch.ops.torch_spe
    name = str(dtype).removeprefix("torch.")
    seed = torch.full((1,), 3, dtype=torch.int64, device="cuda")
    for grid in ((), (2,)):
        freqs = leaf(heads, features, sines, *grid, dtype=dtype)
        offsets, gains, widths = (leaf(heads, features, sines, dtype=dtype) for _ in range(3))
        noise = leaf(heads, features, 2 * sines, realizations, dtype=dtype)
        sine, phases, deviates = ops.phase_noise(
            seed, heads, features, sines, realizations, 0, 2, name
        )
        deviates = deviates if grid else deviates[..., 0]
        gate, constant = leaf(heads, features, dtype=dtype), leaf(heads, features, 8, dtype=dtype)
        for cycles, query, key in (
            ops.sine_code(freqs, offsets, gains, noise, 0.5),
            ops.phase_code(freqs, offsets, gains, widths, sine, phases, deviates, 0.5),
        ):
            outputs = (cycles, *ops.gate_code(query, key, gate, constant, 0.5))
            sum(t.sum() for t in outputs).backward()
        cycles, amplitudes = ops.exact_code(freqs, gains, 0.5)
        outputs = (cycles, *ops.gate_exact_code(amplitudes, gate))
        sum(t.sum() for t in outputs).backward()
    ops.circle_noise(seed, heads, features, realizations, 0, name)


def conv(dtype, batch, length, heads, features, taps, realizations):
    x = leaf(batch, length, heads, features, dtype=dtype)
    kernel = leaf(heads, features, taps, dtype=wide(dtype))
    noise = leaf(heads, features, length + taps - 1, realizations, dtype=wide(dtype))
    constant = leaf(heads, features, realizations, dtype=wide(dtype))
    image = leaf(batch, 6, 7, heads, features, dtype=dtype)
    taps_2d = leaf(heads, features, 2, 3, dtype=wide(dtype))
    seed = torch.full((), 3, dtype=torch.int64, device="cuda")
    conv_filter = torch.ops.torch_spe.conv_filter
    for out in (
        conv_filter(x, kernel, noise, constant),
        conv_filter(x, kernel, None, constant, seed, realizations, "gaussian"),
        conv_filter(x, kernel, None, None, seed, realizations, "rademacher", [4]),
        conv_filter(image, taps_2d, None, constant, seed, realizations, "gaussian", [2, 1]),
    ):
        out.backward(torch.randn_like(out))
    torch.ops.torch_spe.conv_noise(seed, heads, features, [length], realizations, "gaussian", [3])


def attention(dtype, batch, length, heads, features, sines, realizations):
    q, k = (leaf(batch, length, heads, features, dtype=dtype) for _ in range(2))
    v = leaf(batch, length, heads, realizations, dtype=dtype)
    s = leaf(batch, heads, features, realizations, dtype=wide(dtype))
    z = torch.rand(batch, heads, features, dtype=wide(dtype), device="cuda", requires_grad=True)
    mask = torch.zeros(batch, length, dtype=torch.bool, device="cuda")
    mask[:, 3:5] = True
    for causal in (False, True):
        out, s1, z1, _ = torch.ops.torch_spe.linear_attention(
            q, k, v, "elu", causal, True, 1e-3, mask, None, s, z, True
        )
        (out.float().sum() + s1.sum() + z1.sum()).backward()
    bounds = torch.tensor([0, 0, 5, length], device="cuda")
    q, k, v = (t[:1].detach().requires_grad_() for t in (q, k, v))
    out, *_ = torch.ops.torch_spe.linear_attention(
        q, k, v, "identity", True, False, 1e-3, None, bounds
    )
    out.float().sum().backward()
    # Features of the denominator apart, the norm of rows, and keys alone.
    apart = [leaf(1, length, heads, 3, dtype=dtype) for _ in range(2)]
    for options in (
        {"denominator_q": apart[0], "denominator_k": apart[1], "denominator_feature_map": "elu"},
        {"normalize": False, "rms_norm": True},
    ):
        out, *_ = torch.ops.torch_spe.linear_attention(q, k, v, causal=True, **options)
        out.float().sum().backward()
    s, z = torch.ops.torch_spe.linear_attention_state(k, v, cu_seqlens=bounds)
    (s.sum() + z.sum()).backward()


def rotary_and_maps(dtype, batch, length, heads, features, sines, realizations):
    ops = torch.ops.torch_spe
    x = leaf(batch, length, heads, 2 * features, dtype=dtype)
    positions = leaf(length, dtype=torch.float64)
    for p in (None, positions):
        out = ops.rotary(x, leaf(heads, features, dtype=wide(dtype)), p, feature_map="elu")
        out.backward(torch.randn_like(out))
    x = leaf(batch, length, heads, features, dtype=dtype)
    freqs = leaf(heads, features, sines, dtype=wide(dtype))
    weight = leaf(heads, features, 2 * sines, realizations, dtype=wide(dtype))
    pairs = leaf(heads, features, sines, 2, dtype=wide(dtype))
    for out in (
        ops.sine_filter(x, freqs, weight, feature_map="elu"),
        ops.phasor_filter(x, freqs, pairs, feature_map="relu"),
        ops.sine_features(x, freqs, freqs, feature_map="elu"),
        ops.conv_filter(
            x, freqs, seed=torch.full((), 3, dtype=torch.int64, device="cuda"),
            num_realizations=realizations, feature_map="elu",
        ),
    ):  # fmt: skip
        out.backward(torch.randn_like(out))


if __name__ == "__main__":
    main()
