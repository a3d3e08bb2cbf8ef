"""Functions that run on every rank of a process group, of processes of this machine.

They are forked from a server that has imported PyTorch, as importing it takes longer than most of
what a test does.
"""

import multiprocessing

import torch
import torch.distributed as dist
import torch.multiprocessing

multiprocessing.set_forkserver_preload(["torch", "torch_spe.distributed", "helpers"])


def on_one_rank(rank, function, ranks, folder, arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()


def run_on_ranks(function, ranks, folder, *arguments):
    """Call the function, of a module, in each process; an exception of one is raised here."""
    torch.multiprocessing.start_processes(
        on_one_rank, (function, ranks, str(folder), arguments), nprocs=ranks,
        start_method="forkserver",
    )  # fmt: skip
