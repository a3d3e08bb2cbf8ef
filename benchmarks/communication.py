"""``python -m benchmarks.communication``: bytes that ranks of a sequence send, and time on paper.

Bytes are counted while a layer of this library runs as one rank of a process group that sends
nothing (PyTorch's "fake" backend): they do not depend on what is sent. Ring attention's are
computed: every rank passes keys and values on to the next one, and backward these and their
gradients. Times are computed from rates that are assumed, not measured.

``--time`` instead measures the two exchanges of states that there are, an all-gather and doubling,
with gloo between processes of this machine, of one thread each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import torch_spe
from benchmarks import measure
from torch_spe.distributed import SPESequenceParallel, exchange


@dataclasses.dataclass(frozen=True)
class Model:
    """A Transformer of layers of a width, with feed-forward parts of four times that."""

    width: int = 2048
    heads: int = 16
    layers: int = 24
    features: int = 3  # of an encoded query or key, for each of the head's; with a gate

    @property
    def state(self) -> int:
        """Values of a layer's state for one sequence: sums, those of the denominator, shares."""
        head = self.width // self.heads
        return self.heads * (self.features * head * head + self.features * head + 1)


@dataclasses.dataclass(frozen=True)
class Machine:
    """GPUs in machines: what they are assumed to reach."""

    flops: float = 400e12  # H100, bfloat16: 40 % of its 989e12
    inside: float = 450e9  # bytes per second in one direction, NVLink 4
    outside: float = 50e9  # InfiniBand NDR, 400 Gb/s for each GPU
    latency: float = 20e-6  # seconds of a message
    gpus: int = 8  # of a machine

    def seconds(self, messages: int, sent: float, ranks: int) -> float:
        """Time to send bytes, in messages one after the other."""
        return messages * self.latency + sent / (
            self.inside if ranks <= self.gpus else self.outside
        )


class Counter(TorchDispatchMode):
    """Counts bytes that this rank sends."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.sent = ranks, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        others, name = self.ranks - 1, function._schema.name
        if name == "_c10d_functional::all_gather_into_tensor":  # its part to all others
            self.sent += arguments[0].nbytes * others
        elif name in ("_c10d_functional::all_reduce", "c10d::allreduce_"):
            self.sent += 2 * arguments[0].nbytes * others // self.ranks  # scattered, then gathered
        elif name == "_c10d_functional::all_to_all_single":  # to one rank or none
            self.sent += arguments[0].nbytes
        elif "c10d" in name and not any(x in name for x in ("wait", "wrap", "allgather")):
            raise NotImplementedError(f"bytes of {name}")
        return function(*arguments, **(keywords or {}))


def count(ranks: int, rank: int, causal: bool, model: Model, **options: object) -> tuple[int, int]:
    """Bytes that a rank sends forward and backward, for one layer and sequence."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        layer = torch_spe.SPEMultiheadAttention(
            model.width, model.heads, batch_first=True, **options
        ).eval()
        style = SPESequenceParallel(equal_lengths=True)
        parallelize_module(layer, init_device_mesh("cpu", (ranks,)), style)
        layer._ranks._agreed = True  # what other ranks say is not known here
        x = torch.zeros(1, 4, model.width, requires_grad=True)  # any number of tokens
        with Counter(ranks) as counter:
            out = layer(x, x, x, is_causal=causal)[0]
            forward = counter.sent
            out.sum().backward()
        return forward, counter.sent - forward
    finally:
        dist.destroy_process_group()


def ring(ranks: int, tokens: int, width: int, size: int = 2) -> tuple[float, float]:
    """Bytes that a rank sends in ring attention, forward and backward; `size` of an element."""
    keys_and_values = 2 * (tokens / ranks) * width * size
    return (ranks - 1) * keys_and_values, (ranks - 1) * keys_and_values + ranks * keys_and_values


def state_messages(ranks: int, most_gathered: int = 8) -> tuple[int, int]:
    """Messages one after the other, and pieces that a rank sends, for one causal exchange."""
    if ranks <= most_gathered:
        return ranks - 1, ranks - 1
    steps = 1 + math.ceil(math.log2(ranks - 1))
    return steps, steps


def step_seconds(
    ranks: int, tokens: int, model: Model, machine: Machine
) -> tuple[float, float, float, float]:
    """Time of a training step on paper: ours, its exchanges; ring attention's, its exchanges.

    Backward takes twice as long as forward, and what is sent after the local work is not hidden
    behind it; ring attention hides what it sends behind its products, and takes the longer of both.
    """
    local = tokens / ranks
    dense = 3 * 24 * model.width**2 * local  # projections and feed-forward part
    # Products with the state forward, for the state of all keys once more, and backward.
    ours = dense + (4 + 2 + 8) * model.features * model.width * (model.width / model.heads) * local
    softmax = dense + 3.5 * 2 * tokens * model.width * local  # causal, backward 2.5 times forward
    messages, pieces = state_messages(ranks)
    exchange = 2 * machine.seconds(messages, 4 * pieces * model.state, ranks) if ranks > 1 else 0.0
    passing = 0.0
    if ranks > 1:
        forward, backward = ring(ranks, tokens, model.width)
        passing = machine.seconds(2 * ranks, forward + backward, ranks)
    layers = model.layers
    return (
        layers * (ours / machine.flops + exchange),
        layers * exchange,
        layers * max(softmax / machine.flops, passing),
        layers * passing,
    )


def time_on_rank(rank: int, ranks: int, folder: str, repeats: int, model: Model) -> None:
    """Measure each exchange of a layer's states, forward, and write what the slowest rank took."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    head, heads = model.width // model.heads, model.heads
    shapes = (1, heads, model.features * head, head), (1, heads, model.features * head)
    piece = exchange.Piece(*(torch.rand(shape) for shape in (*shapes, (1, heads, 1))))
    seconds: dict[str, list[float]] = {"all_gather": [], "doubling": []}
    results = {}
    for _ in range(repeats + 1):
        for name, measured in seconds.items():
            limit = ranks if name == "all_gather" else 1
            exchange.most_gathered = lambda *_, limit=limit: limit
            dist.barrier()
            start = time.perf_counter()
            results[name] = exchange.state_before(piece, dist.group.WORLD)
            took = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            measured.append(took.item())
    torch.testing.assert_close(results["all_gather"].s, results["doubling"].s)
    if rank == 0:
        Path(folder, "seconds.json").write_text(
            json.dumps({name: measured[1:] for name, measured in seconds.items()})
        )
    dist.destroy_process_group()


def time_exchanges(ranks: int, repeats: int, model: Model) -> dict[str, float]:
    """Seconds of both exchanges, in turns: the median and the least of each."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            time_on_rank, (ranks, folder, repeats, model), nprocs=ranks, start_method="forkserver"
        )
        seconds = json.loads(Path(folder, "seconds.json").read_text())
    return {
        f"{name}_{kind}": of(measured)
        for name, measured in seconds.items()
        for kind, of in (("median", statistics.median), ("least", min))
    }


def print_times(all_ranks: list[int], repeats: int, output: Path | None) -> None:
    """Print the table of ``--time``, and write the same as JSON."""
    model = Model()
    print(f"Exchange of a state of {4 * model.state / 1e6:.1f} MB, gloo, milliseconds, least time")
    print("| ranks | all-gather | doubling | doubling / all-gather | of the medians |")
    print("|---:|---:|---:|---:|---:|")
    rows = []
    for ranks in all_ranks:
        row = time_exchanges(ranks, repeats, model)
        rows.append({"ranks": ranks, "repeats": repeats, **row})
        share, of_medians = (
            row[f"doubling_{kind}"] / row[f"all_gather_{kind}"] for kind in ("least", "median")
        )
        print(
            f"| {ranks} | {1e3 * row['all_gather_least']:.3g} | {1e3 * row['doubling_least']:.3g} "
            f"| {share:.2f} | {of_medians:.2f} |",
            flush=True,
        )
    if output is not None:
        measure.write(output, {**measure.provenance("benchmarks.communication"), "rows": rows})


def main(arguments: list[str] | None = None) -> None:
    """Print both tables, or that of the times measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.communication", description=__doc__)
    parser.add_argument("--tokens", type=int, default=2**20, help="of the sequence")
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--time", action="store_true", help="measure exchanges on this machine")
    parser.add_argument("--repeats", type=int, default=20, help="of --time")
    parser.add_argument("--output", type=Path, help="JSON file for the results of --time")
    options = parser.parse_args(arguments)
    if options.time:
        print_times(options.ranks or [2, 4, 8], options.repeats, options.output)
        return
    model, machine, tokens = Model(), Machine(), options.tokens
    print(
        "Bytes sent per token and layer, forward and backward (those of the rank in the middle, "
        f"times ranks): {tokens} tokens, "
        f"width {model.width}, {model.heads} heads, states in float32, keys and values in bfloat16"
    )
    print("| ranks | causal, counted | not causal, no decay, counted | ring attention, computed |")
    print("|---:|---:|---:|---:|")
    all_ranks = options.ranks or [2, 4, 8, 16, 64, 256]
    for ranks in all_ranks:
        middle = ranks // 2
        causal = sum(count(ranks, middle, True, model)) * ranks / tokens
        both = sum(count(ranks, middle, False, model, position="exact")) * ranks / tokens
        passed = sum(ring(ranks, tokens, model.width)) * ranks / tokens
        print(f"| {ranks} | {causal:.0f} | {both:.0f} | {passed:.0f} |")
    print(
        f"\nSeconds of a training step on paper, of these exchanges: {tokens} tokens, "
        f"{model.layers} layers, {machine}"
    )
    print("| ranks | torch_spe | exchanges | ring attention | passing keys and values |")
    print("|---:|---:|---:|---:|---:|")
    for ranks in (1, *all_ranks):
        times = step_seconds(ranks, tokens, model, machine)
        print(f"| {ranks} | " + " | ".join(f"{time:.3g}" for time in times) + " |")


if __name__ == "__main__":
    main()
