"""Arguments of linear attention beside queries, keys and values: shapes, types and errors.

What they compute is tested with the functions that have them.
"""

import pytest
import torch

import torch_spe  # noqa: F401

pytestmark = pytest.mark.cpu_only
attention = torch.ops.torch_spe.linear_attention
state = torch.ops.torch_spe.linear_attention_state


def data(dtype=torch.float32):
    q, k, v = (torch.randn(2, 6, 3, n, dtype=dtype) for n in (4, 4, 5))
    return q, k, v, torch.randn(2, 6, 3, 7, dtype=dtype).exp(), torch.rand(2, 6, 3, 7, dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.half, torch.float32)],
)
def test_shapes_and_types(dtype, wide):
    q, k, v, dq, dk = (t.to("meta") for t in data(dtype))
    out, s, z, divisor = attention(q, k, v)
    assert (out.shape, s.shape, z.shape, divisor.shape) == ((2, 6, 3, 5), (0,), (0,), (2, 6, 3))
    assert (out.dtype, s.dtype, z.dtype, divisor.dtype) == (dtype, wide, wide, wide)
    assert attention(q, k, v, normalize=False)[3].shape == (0,)
    assert attention(q, k, v, normalize=False, rms_norm=True)[3].shape == (2, 6, 3)
    _, s, z, _ = attention(q, k, v, return_state=True, denominator_q=dq, denominator_k=dk)
    assert (s.shape, z.shape) == ((2, 3, 4, 5), (2, 3, 7))
    s, z = state(k, v, denominator_k=dk)
    assert (s.shape, z.shape, s.dtype, z.dtype) == ((2, 3, 4, 5), (2, 3, 7), wide, wide)
    # Backwards: one gradient more for each.
    out, s, z, divisor = attention(q, k, v, denominator_q=dq, denominator_k=dk)
    grads = torch.ops.torch_spe.linear_attention_backward(
        out, None, None, out, divisor, q, k, v, "elu", False, True, 1e-6, None, None, None, None,
        False, dq, dk, "identity", False, None, [True] * 8,
    )  # fmt: skip
    expected = [q.shape, k.shape, v.shape, dq.shape, dk.shape]
    assert [g.shape for g in grads if g is not None] == expected


def test_the_divisor_has_no_gradient():
    q, k, v, *_ = data()
    out, s, _z, divisor = attention(q.requires_grad_(), k, v)
    assert (out.requires_grad, s.requires_grad, divisor.requires_grad) == (True, False, False)


def test_autocast_casts_the_data_only():
    _q, k, v, _dq, dk = data()
    initial = (torch.randn(2, 3, 4, 5), torch.rand(2, 3, 7))
    with torch.autocast("cpu", torch.bfloat16):
        s, z = state(k, v, "elu", None, None, *initial, dk)
    assert (s.dtype, z.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("initial", [False, True])
def test_the_state_of_keys_alone_is_that_of_attention(initial, causal):
    q, k, v, *_ = data(torch.float64)
    given = (torch.randn(2, 3, 4, 5).double(), torch.rand(2, 3, 4).double()) if initial else ()
    names = dict(zip(("initial_s", "initial_z"), given, strict=False))
    _, s, z, _ = attention(q, k, v, causal=causal, return_state=True, **names)
    ours = state(k, v, **names)
    torch.testing.assert_close(ours, (s, z))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"rms_norm": True}, ValueError, "rms_norm and normalize exclude each other, got both"),
        ({"denominator_k": None}, ValueError, "denominator_k must be given with denominator_q"),
        ({"denominator_q": None}, ValueError, "denominator_q must be given with denominator_k"),
        ({"normalize": False}, ValueError, "normalize must be true with denominator_q and denom"),
        ({"denominator_q": (2, 6, 3)}, ValueError, r"denominator_q must have 4 dimensions \[B, N,"),
        ({"denominator_k": (2, 6, 3)}, ValueError, r"denominator_k must have 4 dimensions \[B, M,"),
        ({"denominator_q": (1, 6, 3, 7)}, ValueError, r"denominator_q must have size 2 \(B of q"),
        ({"denominator_q": (2, 5, 3, 7)}, ValueError, r"denominator_q must have size 6 \(N of q"),
        ({"denominator_q": (2, 6, 2, 7)}, ValueError, r"denominator_q must have size 3 \(H of q"),
        ({"denominator_q": (2, 6, 3, 6)}, ValueError, r"denominator_q must have size 7 \(F of den"),
        ({"denominator_k": (1, 6, 3, 7)}, ValueError, r"denominator_k must have size 2 \(B of q"),
        ({"denominator_k": (2, 5, 3, 7)}, ValueError, r"denominator_k must have size 6 \(M of k"),
        ({"denominator_k": (2, 6, 2, 7)}, ValueError, r"denominator_k must have size 3 \(H of q"),
        ({"denominator_k": (2, 6, 3, 0)}, ValueError, "denominator_k must have at least one feat"),
        ({"denominator_k": torch.ones(2, 6, 3, 7).double()}, TypeError,
         "denominator_k must be Float like q, got Double"),
        ({"denominator_q": torch.ones(2, 6, 3, 7).half()}, TypeError,
         "denominator_q must be Float like q, got Half"),
        ({"denominator_q": torch.ones(2, 6, 3, 7, device="meta")}, ValueError,
         "denominator_q must be on the device of q, cpu, got meta"),
        ({"denominator_feature_map": "exp"}, ValueError,
         "denominator_feature_map must be 'identity', 'elu' or 'relu', got 'exp'"),
        ({"initial_s": (2, 3, 4, 5), "initial_z": (2, 3, 4)}, ValueError,
         r"initial_z must have size 7 \(F of denominator_k"),
    ],
)  # fmt: skip
def test_errors(changes, kind, message):
    q, k, v, dq, dk = data()
    arguments = {"denominator_q": dq, "denominator_k": dk, **changes}
    for name, value in arguments.items():
        if isinstance(value, tuple):
            arguments[name] = torch.ones(value)
    with pytest.raises(kind, match=f"linear_attention: {message}"):
        attention(q, k, v, **arguments)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"k": (6, 3, 4)}, ValueError, r"k must have 4 dimensions \[B, M, H, R\], got"),
        ({"v": (2, 6, 3)}, ValueError, r"v must have 4 dimensions \[B, M, H, E\], got"),
        ({"v": (2, 5, 3, 5)}, ValueError, r"v must have size 6 \(M of k\)"),
        ({"v": (1, 6, 3, 5)}, ValueError, r"v must have size 2 \(B of k\)"),
        ({"v": torch.ones(2, 6, 3, 5).half()}, TypeError, "v must be Float like k, got Half"),
        ({"feature_map": "exp"}, ValueError, "feature_map must be 'identity', 'elu' or 'relu'"),
        ({"key_padding_mask": (2, 6)}, TypeError, "key_padding_mask must be bool"),
        ({"initial_s": (2, 3, 4, 5)}, ValueError, "initial_z must be given with initial_s"),
        ({"initial_s": (1, 3, 4, 5), "initial_z": (2, 3, 4)}, ValueError,
         r"initial_s must have size 2 \(B of k\)"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"k must have size 1 \(B, with cu_seq"),
        ({"denominator_k": (2, 5, 3, 7)}, ValueError, r"denominator_k must have size 6 \(M of k"),
    ],
)  # fmt: skip
def test_errors_of_the_state(changes, kind, message):
    _, k, v, *_ = data()
    arguments = {"k": k, "v": v, **changes}
    for name, value in arguments.items():
        if isinstance(value, tuple):
            arguments[name] = torch.ones(value)
    with pytest.raises(kind, match=f"linear_attention_state: {message}"):
        state(**arguments)


def test_packed_sequences_of_the_state():
    _, k, v, *_ = data(torch.float64)
    k, v = k[:1], v[:1]
    s, z = state(k, v, cu_seqlens=torch.tensor([0, 2, 6]))
    for i, part in enumerate((slice(0, 2), slice(2, 6))):
        torch.testing.assert_close((s[i : i + 1], z[i : i + 1]), state(k[:, part], v[:, part]))
    with pytest.raises(ValueError, match=r"cu_seqlens must end with 6 \(M of k\), got 5"):
        state(k, v, cu_seqlens=torch.tensor([0, 5]))
