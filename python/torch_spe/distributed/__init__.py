"""A sequence that is cut over the ranks of a process group; the states of attention are exchanged.

Each rank holds consecutive tokens, rank 0 the first ones; pieces may differ in length. States have
``R x E`` values a head and sequence, however long the pieces are: keys and values stay where they
are. Codes need no exchange, as they are functions of the seed and of absolute positions.
"""

from torch_spe.distributed.attention import linear_attention
from torch_spe.distributed.exchange import sequence_start
from torch_spe.distributed.layers import SPESequenceParallel

__all__ = ["SPESequenceParallel", "linear_attention", "sequence_start"]
