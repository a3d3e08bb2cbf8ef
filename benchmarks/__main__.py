"""``python -m benchmarks``: time, memory and share of the machine's limits, beside the peers."""

from __future__ import annotations

import argparse
import datetime
import functools
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import cases, measure, shares
from benchmarks.decode import decode

SLOW = 2.0  # seconds of a call; fewer calls of such ones
DIRECTIONS = ("forward", "forward+backward")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def outputs(implementation: cases.Implementation) -> list[torch.Tensor]:
    """What an implementation computes from the common seed."""
    torch.manual_seed(1)
    return [out.detach().float() for out in implementation.run()]


def attempt(implementation: cases.Implementation, function: Callable, *arguments: object):
    """The result; None, and the reason in `left_out`, without memory or where a peer fails."""
    try:
        return function(*arguments)
    except torch.OutOfMemoryError:
        implementation.left_out = "out of memory"
    except Exception as failure:
        if not implementation.name.startswith("("):
            raise
        print(f"{implementation.name} failed: {failure}")
        implementation.left_out = f"failed, {type(failure).__name__}"
    # What the failed call held is free only now.
    measure.free_memory("cpu" if not torch.cuda.is_initialized() else "cuda")
    return None


def check(case: cases.Case, dtype: torch.dtype) -> None:
    """All implementations of a function must agree before any is timed."""
    if not case.exact:
        return
    functions: dict[str, list[cases.Implementation]] = {}
    for implementation in case.implementations:
        if not implementation.name.startswith("(") and not implementation.left_out:
            functions.setdefault(implementation.function, []).append(implementation)
    for implementations in functions.values():
        first, expected = None, None  # that the others must agree with: the first that ran
        for implementation in implementations:
            got = attempt(implementation, outputs, implementation)
            if got is None:
                continue
            if expected is None:
                first, expected = implementation, got
                continue
            for a, b in zip(expected, got, strict=True):
                error = ((a - b).norm() / b.norm()).item()
                if not error <= cases.tolerance(dtype):
                    raise SystemExit(
                        f"{case.name} {case.shape}: {first.name} and {implementation.name} differ "
                        f"by {error:.2e} (relative), expected at most "
                        f"{cases.tolerance(dtype):.0e}; nothing was timed"
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
    """Seconds and peak bytes of each implementation that is not left out.

    All take turns, so that a change of the machine's speed meets all of them.
    """
    calls, single = {}, {}
    samples: dict[str, list[float]] = {i.name: [] for i in case.implementations}
    for implementation in case.implementations:
        if implementation.left_out or not implementation.timed:
            continue
        name, call = implementation.name, functools.partial(run, implementation)
        # A first call on a GPU may load and compile.
        first = attempt(implementation, measure.times, call, device, 1, device != "cpu")
        if first is None:
            continue
        calls[name] = call
        (single[name],) = first
        if single[name] > SLOW:
            samples[name].append(single[name])  # warming up makes no difference
        else:
            (single[name],) = measure.times(call, device, 1, warm_up=False)
    if not calls:
        return {}
    repeats = {name: measure.burst(time, device) for name, time in single.items()}
    turn = sum(time * (repeats[name] if device != "cpu" else 1) for name, time in single.items())
    for _ in range(max(3, min(30, int(seconds / turn)))):
        for name, call in calls.items():
            if sum(samples[name]) > 5 * SLOW:
                continue
            # As warm as a training loop would have it: the call before was of something else.
            samples[name] += measure.times(call, device, repeats[name], warm_up=repeats[name] > 1)
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
    written = 0
    for implementation in case.implementations:
        outs = None if implementation.left_out else attempt(implementation, forward, implementation)
        if outs is not None:
            written = sum(t.nbytes for t in outs)
            del outs  # the peak of memory is measured without them
            break
    rows = {
        i.name: {"case": case.name, **case.shape, "implementation": i.name}
        for i in case.implementations
        if i.timed
    }
    for name, run, flops, executed, moved in (
        ("forward", forward, case.flops, case.executed, read + written),
        (
            "forward+backward",
            forward_and_backward,
            case.flops + case.flops_backward,
            case.executed + case.executed_backward,
            3 * read + 2 * written,
        ),
    ):
        measured = measure_direction(case, run, device, seconds)
        time, memory = measured.get("torch_spe", (math.nan, 1))
        reasons = {i.name: i.left_out for i in case.implementations}
        for implementation, row in rows.items():
            if implementation not in measured:
                row[f"{name} left out"] = reasons[implementation]
                continue
            its_time, its_memory = measured[implementation]
            row[f"{name} ms"] = its_time * 1e3
            row[f"{name} MB"] = its_memory / 1e6
            row[f"{name} ratio"] = its_time / time
            row[f"{name} memory ratio"] = its_memory / max(memory, 1)
        for implementation in case.implementations:
            rated = implementation.name == "torch_spe" or implementation.rated
            if not rated or implementation.name not in measured:
                continue
            row, time = rows[implementation.name], measured[implementation.name][0]
            row[f"{name} GFLOP/s"] = flops / time / 1e9
            row[f"{name} share"] = flops / time / 1e9 / machine.gflops
            row[f"{name} share of the bandwidth"] = moved / time / 1e9 / machine.gbytes
            if executed and device == "cpu":
                row[f"{name} share executed"] = executed / time / 1e9 / machine.gflops
    return list(rows.values())


def crossings(rows: list[dict], name: str, theirs: str) -> list[str]:
    """From which length on the implementations of a case take less time than another one's."""
    lines = []
    rows = [row for row in rows if row["case"] == name]
    for ours in dict.fromkeys(row["implementation"] for row in rows):
        for direction in DIRECTIONS:
            time = f"{direction} ms"
            found = {}  # how many times longer theirs takes, in logarithms, at each length
            for row in rows:
                if row["implementation"] != ours or ours == theirs or time not in row:
                    continue
                shape = {key: row[key] for key in "BN"}
                for other in rows:
                    same = other["implementation"] == theirs and shape.items() <= other.items()
                    if same and time in other:
                        found[row["N"]] = math.log(other[time] / row[time])
            lengths = sorted(found)
            if len(lengths) < 2:
                continue
            if found[lengths[-1]] <= 0:
                answer = f"is slower than {theirs} still at N = {lengths[-1]}"
            elif all(found[n] > 0 for n in lengths):
                answer = f"is faster than {theirs} already at N = {lengths[0]}"
            else:
                before = max(n for n in lengths if found[n] <= 0)
                after = min(n for n in lengths if n > before)
                # Between two lengths the ratio is taken to be a power of the length.
                share = found[before] / (found[before] - found[after])
                length = before * (after / before) ** share
                answer = (
                    f"is faster than {theirs} from N = {length:.0f} on "
                    f"(measured at {before} and {after})"
                )
            lines.append(f"{name}, {direction}: {ours} {answer}")
    return lines


def ratio(value: float) -> str:
    """Write a ratio, of times that are close with two digits behind the point."""
    return f"{value:.2f}" if value < 2 else f"{value:.1f}"


def table(rows: list[dict], digits: int = 2) -> str:
    """The rows as Markdown, milliseconds with that many digits."""
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
                f"{row[f'{name} share of the bandwidth']:.0%}"
                + (f", executed {row[key]:.0%}" if (key := f"{name} share executed") in row else "")
                + ")"
                for name in DIRECTIONS
                if f"{name} share" in row
            )
        cells = [
            f"{row[f'{name} left out']} | | "
            if f"{name} left out" in row
            else f"{row[f'{name} ms']:.{digits}f} ms | {ratio(row[f'{name} ratio'])} "
            f"| {row[f'{name} MB']:.1f} MB"
            for name in DIRECTIONS
        ]
        lines.append(f"| {row['implementation']} | {cells[0]} | {cells[1]} | {rate} |")
    return "\n".join(lines)


def add_shares(case: cases.Case, rows: list[dict]) -> None:
    """Add what share of a step is products, this library's operators, and everything else."""
    for implementation, row in zip(
        case.implementations, rows[-len(case.implementations) :], strict=True
    ):
        for name, run in zip(DIRECTIONS, (forward, forward_and_backward), strict=True):
            if not implementation.left_out:
                row[f"{name} shares"] = shares.shares(functools.partial(run, implementation))


def shares_lines(rows: list[dict]) -> list[str]:
    """The shares as sentences."""
    return [
        f"{row['case']}, B = {row['B']}, N = {row['N']}, {name}: {row['implementation']}: "
        + ", ".join(f"{what} {share:.1%}" for what, share in row[f"{name} shares"].items())
        for row in rows
        for name in DIRECTIONS
        if f"{name} shares" in row
    ]


def shape(text: str) -> tuple[int, int]:
    """Batch and length from a text such as 8x4096."""
    batch, length = text.split("x")
    return int(batch), int(length)


def main() -> None:
    """Parse the arguments, measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "cases",
        nargs="*",
        metavar="CASE",
        help="sine, phasor, exact, conv, attention, decay, decay_both_ways, attend, "
        "sine_attention, layer, encoder_layer, decode (default: all)",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--length", type=int, nargs="+", default=[2048])
    parser.add_argument(
        "--shapes", type=shape, nargs="+", metavar="BxN",
        help="batch and length, such as 8x4096, instead of all of --batch with all of --length",
    )  # fmt: skip
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
        "decay": cases.decay,
        "decay_both_ways": functools.partial(cases.decay, causal=False),
        "attend": cases.attend,
        "sine_attention": cases.sine_attention,
        "layer": cases.layer,
        "encoder_layer": cases.encoder_layer,
        "decode": decode,
    }
    unknown = set(args.cases) - set(makers)
    if unknown:
        parser.error(f"unknown case {', '.join(sorted(unknown))}: expected {', '.join(makers)}")
    machine = measure.machine(args.device, DTYPES[args.dtype])
    print(
        f"{machine.name}, {machine.threads} threads, {os.cpu_count()} cores: "
        f"matrix product {machine.gflops:.0f} GFLOP/s, copy {machine.gbytes:.0f} GB/s; "
        f"torch {torch.__version__}, {args.dtype}, "
        f"{machine.instruction_set}, {datetime.date.today()}"
    )
    if args.device != "cpu":
        cache = torch.cuda.get_device_properties(args.device).L2_cache_size / 1e6
        print(
            "Times are those of bursts of calls between two events: tensors of up to the L2 "
            f"cache's {cache:.0f} MB stay in it from call to call."
        )
    rows = []
    shapes = args.shapes or [(b, n) for b in args.batch for n in args.length]
    work = [(name, b, n) for name in args.cases or makers for b, n in shapes]
    try:
        for name, batch, length in tqdm(work, disable=None):
            case = makers[name](batch, length, args.device, DTYPES[args.dtype])
            memory = measure.free_memory(args.device)
            for implementation in case.implementations:
                if implementation.memory > memory:
                    size = implementation.memory / 1e9
                    implementation.left_out = f"left out: takes about {size:.0f} GB"
            check(case, DTYPES[args.dtype])
            rows += measure_case(case, args.device, args.seconds, machine)
            if case.shares and args.device == "cpu":
                add_shares(case, rows)
            if args.output:  # at once: whoever is stopped keeps what was measured
                content = {"machine": machine.__dict__, "dtype": args.dtype, "rows": rows}
                measure.write(args.output, {**measure.provenance("benchmarks"), **content})
    except KeyboardInterrupt:
        print("stopped; measured until then:")
        raise SystemExit(1) from None
    finally:
        print(table(rows, 2 if args.device == "cpu" else 4))
        for line in (
            *crossings(rows, cases.ATTEND, cases.SOFTMAX),
            *crossings(rows, cases.LAYER, cases.SOFTMAX_LAYER),
            *crossings(rows, cases.ENCODER_LAYER, cases.SOFTMAX_ENCODER_LAYER),
            *shares_lines(rows),
        ):
            print(f"\n{line}")


if __name__ == "__main__":
    main()
