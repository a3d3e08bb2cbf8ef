"""What the noise does on average: unbiased logits, and the variance that theory gives them.

Every head is an independent draw, so that one call of the filter gives a whole sample: parameters
and inputs of one head are repeated over many. Limits are standard errors; the seeds are fixed.
"""

import math

import pytest
import torch
from helpers import here, randn

from torch_spe import SineSPE, SPEFilter, SPEMultiheadAttention, reference

pytestmark = pytest.mark.usefixtures("device")
DRAWS, LENGTH, FEATURES = 20000, 5, 3


def sample_logits(realizations, sines, gated, ndim=1):
    """Draws of qhat . khat / sqrt(R) [DRAWS, m, n], q, k [N, D], template [D, m, n], power [D]."""
    torch.manual_seed(1)
    with torch.device("cpu"), torch.no_grad():
        spe = SineSPE(
            DRAWS, FEATURES, realizations, sines, ndim=ndim, init="spread", dtype=torch.float64
        )
        filt = SPEFilter(gated, spe.code_shape, dtype=torch.float64)
        for parameter in (*spe.parameters(), *filt.parameters()):
            parameter.copy_(parameter[:1].clone().expand_as(parameter))
    spe, filt = here(spe), here(filt)
    q, k = randn(2, LENGTH, FEATURES)
    size = (LENGTH,) if ndim == 1 else (1, LENGTH)
    heads = [x.reshape(1, *size, 1, FEATURES).expand(1, *size, DRAWS, FEATURES) for x in (q, k)]
    with torch.no_grad():
        qhat, khat = (x.reshape(LENGTH, DRAWS, realizations) for x in filt(*heads, spe((1, *size))))
        logits = torch.einsum("mhr,nhr->hmn", qhat, khat) / math.sqrt(realizations)
        single = SineSPE(1, FEATURES, realizations, sines, ndim=ndim, dtype=torch.float64)
        single.load_state_dict({n: p[:1] for n, p in spe.state_dict().items()})
        template = single.template(LENGTH - 1)[0]
        offset_free = dict(single.state_dict(), offsets=torch.zeros(1, FEATURES, sines))
        single.load_state_dict(offset_free)
        power = single.template(0)[0].reshape(FEATURES)  # s_d^2 = P_d(0) before the offset
        if ndim == 2:
            template = template[:, LENGTH - 1]
        lag = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH) + LENGTH - 1
        template = template[:, lag]
        if gated:
            gate = filt.gate[0].sigmoid()
            template = (1 - gate)[:, None, None] * template + gate[:, None, None]
            power = (1 - gate) * power + gate
    return logits, q, k, template, power


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("realizations", "sines"), [(1, 1), (4, 3)])
def test_mean_and_variance_of_a_logit(realizations, sines, gated, ndim):
    logits, q, k, template, power = sample_logits(realizations, sines, gated, ndim)
    mean = torch.einsum("md,dmn,nd->mn", q, template, k) / math.sqrt(FEATURES)
    variance = (
        torch.einsum("md,d->m", q**2, power)[:, None] * torch.einsum("nd,d->n", k**2, power)
        + (mean * math.sqrt(FEATURES)) ** 2
    ) / (realizations * FEATURES)
    spread = logits.var(0)
    assert ((logits.mean(0) - mean).abs() < 4.5 * (spread / DRAWS).sqrt()).all()
    # The standard error of a variance follows from the fourth moment.
    fourth = ((logits - logits.mean(0)) ** 4).mean(0)
    spread_error = ((fourth - spread**2) / DRAWS).sqrt()
    assert ((spread - variance).abs() < 4.5 * spread_error).all()
    # The limits are tight enough to tell: the signal and both terms of the variance show.
    assert (mean.abs() / (spread / DRAWS).sqrt()).max() > 20
    assert (mean**2 / realizations / spread_error).max() > 5


@pytest.mark.parametrize("causal", [True, False])
def test_encoding_the_features_estimates_relative_attention(causal):
    # Every row of the batch shares a code, so the draws are calls; inputs and weights stay.
    torch.manual_seed(0)
    with torch.device("cpu"):
        layer = SPEMultiheadAttention(
            6, 2, batch_first=True, position="sine", output_norm=None, num_realizations=32,
            resample="always", dtype=torch.float64,
        )  # fmt: skip
    layer = here(layer)
    x = randn(1, 7, 6)
    with torch.no_grad():
        draws = torch.stack([layer(x, x, x, is_causal=causal)[0][0] for _ in range(1500)])
        phi = reference.FEATURE_MAPS["elu"]
        q, k, v = (
            t.unflatten(-1, (2, 3))[0]
            for t in torch.nn.functional.linear(x, layer.in_proj_weight).chunk(3, -1)
        )
        q, k = phi(q), phi(k)
        lag = torch.arange(7)[:, None] - torch.arange(7) + 6
        template = layer.template(6)[..., lag]  # [H, D, m, n]
        weights = torch.einsum("mhd,hdmn,nhd->hmn", q, template, k)
        denominator = torch.einsum("mhd,nhd->hmn", q, k)
        if causal:
            weights, denominator = weights.tril(), denominator.tril()
        exact = torch.einsum("hmn,nhe->mhe", weights, v)
        exact = exact / (denominator.sum(-1).T.unsqueeze(-1) + layer.eps)
        exact = layer.out_proj(exact.flatten(-2))
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() < 4.5 * standard_error).all()
    assert exact.abs().max() > 10 * standard_error.max()


def test_the_error_falls_with_the_square_root_of_the_realizations():
    few, many = (sample_logits(realizations, 2, True)[0].std(0).mean() for realizations in (4, 64))
    assert abs(few / many / 4 - 1) < 0.05
