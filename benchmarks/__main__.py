"""``python -m benchmarks``: time, memory and share of the machine's limits, beside the peers."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import torch_spe
from benchmarks import cases, measure

SLOW = 2.0  # seconds of a call; fewer calls of such ones
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def outputs(implementation: cases.Implementation) -> list[torch.Tensor]:
    """What an implementation computes from the common seed."""
    torch.manual_seed(1)
    return [out.detach().float() for out in implementation.run()]


def check(case: cases.Case, dtype: torch.dtype) -> None:
    """All implementations of a function must agree before any is timed."""
    if not case.exact:
        return
    functions: dict[str, list[cases.Implementation]] = {}
    for implementation in case.implementations:
        if not implementation.name.startswith("("):
            functions.setdefault(implementation.function, []).append(implementation)
    for first, *others in functions.values():
        expected = outputs(first)
        for other in others:
            for a, b in zip(expected, outputs(other), strict=True):
                error = ((a - b).norm() / b.norm()).item()
                if not error <= cases.tolerance(dtype):
                    raise SystemExit(
                        f"{case.name} {case.shape}: {first.name} and {other.name} differ by "
                        f"{error:.2e} (relative), expected at most {cases.tolerance(dtype):.0e}; "
                        "nothing was timed"
                    )


def forward(implementation: cases.Implementation) -> object:
    with torch.no_grad():
        return implementation.run()


def forward_and_backward(implementation: cases.Implementation) -> object:
    outs = implementation.run()
    if implementation.grad_outputs is None:
        implementation.grad_outputs = [torch.ones_like(out) for out in outs]
    return torch.autograd.grad(outs, implementation.inputs, implementation.grad_outputs)


def measure_direction(
    case: cases.Case, run: Callable, device: str, seconds: float
) -> dict[str, tuple[float, float]]:
    """Seconds and peak bytes of each implementation.

    All take turns, so that a change of the machine's speed meets all of them.
    """
    calls = {i.name: functools.partial(run, i) for i in case.implementations if i.timed}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    single = {}
    for name, call in calls.items():
        (single[name],) = measure.times(call, device, 1, warm_up=False)
        if single[name] > SLOW:
            samples[name].append(single[name])  # warming up makes no difference
        else:
            (single[name],) = measure.times(call, device, 1, warm_up=False)
    for _ in range(max(3, min(30, int(seconds / sum(single.values()))))):
        for name, call in calls.items():
            if sum(samples[name]) > 5 * SLOW:
                continue
            # As warm as a training loop would have it: the call before was of something else.
            repeats = max(1, min(10, int(0.2 / single[name])))
            samples[name] += measure.times(call, device, repeats, warm_up=repeats > 1)
    return {
        name: (statistics.median(samples[name]), measure.peak_memory(call, device))
        for name, call in calls.items()
    }


def measure_case(
    case: cases.Case, device: str, seconds: float, machine: measure.Machine
) -> list[dict]:
    """One row for each implementation."""
    # Least bytes to move: inputs and outputs, and, backward, these and their gradients.
    read = sum(t.nbytes for t in case.implementations[0].inputs)
    written = sum(t.nbytes for t in forward(case.implementations[0]))
    rows = {
        i.name: {"case": case.name, **case.shape, "implementation": i.name}
        for i in case.implementations
        if i.timed
    }
    for name, run, flops, moved in (
        ("forward", forward, case.flops, read + written),
        (
            "forward+backward",
            forward_and_backward,
            case.flops + case.flops_backward,
            3 * read + 2 * written,
        ),
    ):
        measured = measure_direction(case, run, device, seconds)
        time, memory = measured["torch_spe"]
        for implementation, row in rows.items():
            its_time, its_memory = measured[implementation]
            row[f"{name} ms"] = its_time * 1e3
            row[f"{name} MB"] = its_memory / 1e6
            row[f"{name} ratio"] = its_time / time
            row[f"{name} memory ratio"] = its_memory / max(memory, 1)
        for implementation in case.implementations:
            if implementation.name != "torch_spe" and not implementation.rated:
                continue
            row, time = rows[implementation.name], measured[implementation.name][0]
            row[f"{name} GFLOP/s"] = flops / time / 1e9
            row[f"{name} share"] = flops / time / 1e9 / machine.gflops
            row[f"{name} share of the bandwidth"] = moved / time / 1e9 / machine.gbytes
    return list(rows.values())


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = []
    shown = None
    for row in rows:
        shape = ", ".join(f"{key} = {row[key]}" for key in "BNMHDREKP" if key in row)
        head = f"{row['case']}: {shape}"
        if head != shown:
            lines += [
                "", f"**{head}**", "",
                "| implementation | forward | ratio | memory | forward+backward | ratio | memory "
                "| GFLOP/s (share of the matrix product, share of the bandwidth) |",
                "|---|---:|---:|---:|---:|---:|---:|---|",
            ]  # fmt: skip
            shown = head
        rate = ""
        if "forward share" in row:
            rate = " / ".join(
                f"{row[f'{name} GFLOP/s']:.0f} ({row[f'{name} share']:.0%}, "
                f"{row[f'{name} share of the bandwidth']:.0%})"
                for name in ("forward", "forward+backward")
            )
        cells = [
            f"{row[f'{name} ms']:.2f} ms | {row[f'{name} ratio']:.1f} | {row[f'{name} MB']:.1f} MB"
            for name in ("forward", "forward+backward")
        ]
        lines.append(f"| {row['implementation']} | {cells[0]} | {cells[1]} | {rate} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments, measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "cases",
        nargs="*",
        metavar="CASE",
        help="sine, phasor, exact, conv, attention, layer (default: all)",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--length", type=int, nargs="+", default=[2048])
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="for each case and direction")
    parser.add_argument(
        "--spe-checkout", type=Path, help="a checkout of aliutkus/spe to compare with"
    )
    parser.add_argument("--output", type=Path, help="write the rows here as JSON")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    published = cases.published_module(args.spe_checkout) if args.spe_checkout else None
    makers = {
        "sine": lambda b, n, *a: cases.sine(b, n, *a, published=published),
        "phasor": lambda b, n, *a: cases.phasor(b, n, *a, published=published),
        "exact": cases.exact,
        "conv": lambda b, n, *a: cases.conv(b, n, *a, published=published),
        "attention": cases.attention,
        "layer": cases.layer,
    }
    unknown = set(args.cases) - set(makers)
    if unknown:
        parser.error(f"unknown case {', '.join(sorted(unknown))}: expected {', '.join(makers)}")
    machine = measure.machine(args.device, DTYPES[args.dtype])
    print(
        f"{machine.name}, {machine.threads} threads, {os.cpu_count()} cores: "
        f"matrix product {machine.gflops:.0f} GFLOP/s, copy {machine.gbytes:.0f} GB/s; "
        f"torch {torch.__version__}, {args.dtype}, "
        f"{torch_spe.build_info()['instruction_set']}, {datetime.date.today()}"
    )
    rows = []
    work = [(name, b, n) for name in args.cases or makers for b in args.batch for n in args.length]
    for name, batch, length in tqdm(work, disable=None):
        case = makers[name](batch, length, args.device, DTYPES[args.dtype])
        check(case, DTYPES[args.dtype])
        rows += measure_case(case, args.device, args.seconds, machine)
        if args.output:  # at once: whoever is stopped keeps what was measured
            result = {"machine": machine.__dict__, "torch": torch.__version__}
            write(args.output, {**result, "dtype": args.dtype, "rows": rows})
    print(table(rows))


def write(file: Path, content: dict) -> None:
    """Write JSON, in a folder that need not exist."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
