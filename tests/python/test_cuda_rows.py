"""The factors of rows that the backward pass of linear attention begins with: of rows that a few
lanes hold, of those that a warp reads in several parts, and of more heads than a block has rows."""

import pytest
import torch
from test_cuda_kernels import ATTENTION_TOLERANCES, attention_inputs

pytestmark = pytest.mark.pairwise


@pytest.mark.parametrize("dtype", ATTENTION_TOLERANCES, ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["aligned", "strided"])
@pytest.mark.parametrize("rms_norm", [False, True], ids=["denominators", "norm"])
@pytest.mark.parametrize(("heads", "values"), [(3, 8), (70, 5), (2, 72), (1, 528)])
def test_factors_of_rows(compare, heads, values, rms_norm, strided, dtype):
    inputs, (grad, *_) = attention_inputs(dtype, 2, 9, 9, heads, 4, values)
    if strided:
        grad = grad.transpose(1, 3).contiguous().transpose(1, 3)

    def function(q, k, v, s, z):
        options = {"normalize": not rms_norm, "eps": 1e-3, "rms_norm": rms_norm}
        return torch.ops.torch_spe.linear_attention(q, k, v, "elu", True, **options)[:3]

    compare(function, inputs, (grad, None, None), ATTENTION_TOLERANCES[dtype])
