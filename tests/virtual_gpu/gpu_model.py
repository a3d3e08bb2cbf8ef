"""Prints the table of predictions of gpu_profile.py for all operators: what `make gpu-model` calls.

    python tests/virtual_gpu/gpu_model.py [OPERATOR ...] [--folder FOLDER] [name=value ...]

A STATIC PREDICTION for an H100, not a measurement (see gpu_profile.py). Machine instructions are
those of sass_map.py's table where there is one, else estimated.
"""

import sys

import gpu_profile
from virtual_gpu import load, parser

OPERATORS = [
    "linear_attention", "exact_sines", "sine_features", "phasor_filter", "sine_filter", "rotary",
    "polyphase_filter", "conv_filter",
]  # fmt: skip
HEAD = (
    "operator", "pass", "launches", "bound, ms", "roof, ms", "of the roof", "MB moved",
    "conflicts", "warps", "costliest kernel, and what binds it",
)  # fmt: skip


def row(operator, name, launches, data, work):
    """One pass of an operator, from what gpu_profile.analyse says of its launches."""
    total = sum(launch["time"] for launch in launches)
    roof = gpu_profile.roof_of(data[name], work[name])
    worst = max(launches, key=lambda launch: launch["time"])
    passes = sum(launch["passes"] for launch in launches)
    ideal = sum(launch["ideal_passes"] for launch in launches)
    return (
        operator, name, len(launches), f"{total * 1e3:.3f}", f"{roof * 1e3:.3f}",
        f"{100 * roof / total:.0f} %", f"{sum(a['dram_bytes'] for a in launches) / 1e6:.0f}",
        f"{passes / ideal:.2f}" if ideal else "-", worst["warps_resident"],
        f"{worst['kernel']} ({100 * worst['time'] / total:.0f} %), {worst['bound']}",
    )  # fmt: skip


def main():
    arguments = parser(__doc__)
    arguments.add_argument("what", nargs="*", help="operators (default: all) and name=value")
    arguments.add_argument("--ptxas")
    arguments.add_argument("--sass")
    arguments.add_argument("--blocks", type=int, default=16)
    arguments = arguments.parse_args()
    shape = gpu_profile.shape_of(item for item in arguments.what if "=" in item)
    operators = [item for item in arguments.what if "=" not in item] or OPERATORS
    load(arguments.folder)
    print("STATIC PREDICTION of lower bounds on an H100, not a measurement:")
    print(" ".join(f"{name}={value}" for name, value in shape.items()) + "\n")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for operator in operators:
        result, data, work = gpu_profile.profile(
            arguments.folder, operator, shape, arguments.blocks, arguments.ptxas, arguments.sass
        )
        for name, launches in result.items():
            print(f"| {' | '.join(map(str, row(operator, name, launches, data, work)))} |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
