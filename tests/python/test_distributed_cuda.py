"""A sequence cut over two processes, on one GPU: gloo, as NCCL wants a GPU for each."""

import pytest
import torch
from ranks import run_on_ranks
from test_distributed import LENGTHS, compare_with_one_process

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("doubling", [True, False])
def test_pieces_are_the_whole(doubling, tmp_path):
    run_on_ranks(compare_with_one_process, 2, tmp_path, LENGTHS[2], doubling, "cuda")
