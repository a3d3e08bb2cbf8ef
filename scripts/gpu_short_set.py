"""Run every CUDA kernel once on small tensors, for compute-sanitizer, which is slow."""

import argparse

import torch

import torch_spe  # noqa: F401


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="one shape and two types only")
    tiny = parser.parse_args().tiny
    shapes = [(2, 70, 1, 5, 3, 9)] if tiny else [(2, 70, 1, 5, 3, 9), (1, 200, 2, 16, 4, 72)]
    dtypes = [torch.bfloat16, torch.float32]
    if not tiny:
        dtypes += [torch.float16, torch.float64]
    for dtype in dtypes:
        for shape in shapes:
            sine(dtype, *shape)
            attention(dtype, *shape)
    torch.cuda.synchronize()
    print("done")


def leaf(*shape, dtype):
    return torch.randn(*shape, dtype=dtype, device="cuda", requires_grad=True)


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def sine(dtype, batch, length, heads, features, sines, real):
    x = leaf(batch, length, heads, features, dtype=dtype)
    freqs = leaf(heads, features, sines, dtype=wide(dtype))
    weight = leaf(heads, features, 2 * sines, real, dtype=wide(dtype))
    constant = leaf(heads, features, real, dtype=wide(dtype))
    positions = leaf(length, dtype=torch.float64)
    for p in (None, positions):
        out = torch.ops.torch_spe.sine_filter(x, freqs, weight, constant, p)
        out.backward(torch.randn_like(out))


def attention(dtype, batch, length, heads, features, sines, real):
    q, k = (leaf(batch, length, heads, features, dtype=dtype) for _ in range(2))
    v = leaf(batch, length, heads, real, dtype=dtype)
    s = leaf(batch, heads, features, real, dtype=wide(dtype))
    z = torch.rand(batch, heads, features, dtype=wide(dtype), device="cuda", requires_grad=True)
    mask = torch.zeros(batch, length, dtype=torch.bool, device="cuda")
    mask[:, 3:5] = True
    for causal in (False, True):
        out, s1, z1 = torch.ops.torch_spe.linear_attention(
            q, k, v, "elu", causal, True, 1e-3, mask, None, s, z, True
        )
        (out.float().sum() + s1.sum() + z1.sum()).backward()


if __name__ == "__main__":
    main()
