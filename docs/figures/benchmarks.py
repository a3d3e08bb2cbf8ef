"""The figures of benchmarks/results, drawn."""

import json
from pathlib import Path

from matplotlib import pyplot as plt
from style import BLUE, GREEN, GREY, ORANGE, WIDTH, save

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
PASSES = {"forward": "forward", "forward+backward": "forward and backward"}

# A row: its name; the file, the case, ours, the published code.
PUBLISHED, GAUSSIAN = "(published code)", "(published code, Gaussian noise)"
ENCODERS = (
    ("SineSPE, Gaussian noise", "sine", "SineSPE, Gaussian noise", "torch_spe", "published code"),
    ("SineSPE, phase noise", "phasor", "SineSPE, phase noise", "torch_spe", GAUSSIAN),
    ("ConvSPE, Gaussian noise", "conv", "ConvSPE", "torch_spe", PUBLISHED),
    ("ConvSPE, signs, stride 64", "conv", "ConvSPE", "torch_spe, signs, s = 64", PUBLISHED),
)
ATTENTION = {
    "torch_spe": ("torch_spe", BLUE),
    "idiap/fast-transformers": ("fast-transformers", GREEN),
    "(softmax attention)": ("softmax attention", ORANGE),
}


def rows_of(name):
    return json.loads((RESULTS / f"cpu_{name}.json").read_text())["rows"]


def value_of(name, case, implementation, column, **sizes):
    (row,) = [
        row
        for row in rows_of(name)
        if row["case"] == case
        and row["implementation"] == implementation
        and all(row[size] == value for size, value in sizes.items())
    ]
    return row[column]


def label_bars(axes, bars, texts):
    for bar, text in zip(bars, texts, strict=True):
        axes.annotate(
            text, (bar.get_width(), bar.get_y() + bar.get_height() / 2), (4, 0),
            textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip


def show_time(ms):
    if ms >= 1000:
        return f"{ms / 1000:.1f} s"
    return f"{ms:.0f} ms" if ms >= 10 else f"{ms:.1f} ms" if ms >= 0.95 else f"{ms:.2f} ms"


def show_memory(megabytes):
    return f"{megabytes / 1000:.1f} GB" if megabytes >= 1000 else f"{megabytes:.0f} MB"


def draw_encoders(folder, batch=1):
    """Time and peak memory beside the published code, forward and backward."""
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 3.9), sharey=True)
    columns = (
        ("ms", "time, logarithmic", show_time),
        ("MB", "peak memory, logarithmic", show_memory),
    )
    for axes, (unit, title, show) in zip(panels, columns, strict=True):
        values = [
            [
                value_of(name, case, who, f"forward+backward {unit}", B=batch)
                for _, name, case, *pair in ENCODERS
                for who in (pair[side],)
            ]
            for side in (0, 1)
        ]
        for side, (color, label) in enumerate(((BLUE, "torch_spe"), (GREY, "published code"))):
            places = [row + 0.37 * side for row in range(len(ENCODERS))]
            bars = axes.barh(places, values[side], 0.34, color=color, label=label, log=True)
            texts = [show(value) for value in values[side]]
            if side == 0:
                ratios = [b / a for a, b in zip(*values, strict=True)]
                texts = [
                    f"{text}  ({ratio:.0f} x)" for text, ratio in zip(texts, ratios, strict=True)
                ]
            label_bars(axes, bars, texts)
        axes.set_title(title, loc="left")
        axes.set_xlim(right=max(map(max, values)) * 12)
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks([])
        axes.xaxis.minorticks_off()
    panels[0].set_yticks([row + 0.18 for row in range(len(ENCODERS))], [row[0] for row in ENCODERS])
    panels[0].tick_params(axis="y", length=0)
    panels[0].invert_yaxis()
    panels[1].tick_params(axis="y", length=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    save(figure, folder, "benchmark_encoders")


def draw_attention(folder):
    """Causal linear attention beside another implementation and softmax attention, by length."""
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 3.2), sharey=True)
    rows = rows_of("attention")
    for axes, (column, title) in zip(panels, PASSES.items(), strict=True):
        for implementation, (label, color) in ATTENTION.items():
            points = sorted(
                (row["N"], row[f"{column} ms"])
                for row in rows
                if row["implementation"] == implementation
            )
            axes.loglog(*zip(*points, strict=True), "o-", color=color, label=label)
            length, ms = points[-1]
            axes.annotate(
                show_time(ms), (length, ms), (6, 0), textcoords="offset points", va="center",
                fontsize=9, color=color,
            )  # fmt: skip
        lengths = sorted({row["N"] for row in rows})
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.xaxis.minorticks_off()
        axes.set(xlim=(lengths[0] * 0.8, lengths[-1] * 2.2), xlabel="tokens")
        axes.set_title(title, loc="left")
        axes.grid(axis="y", color="0.92")
    panels[0].set_ylabel("milliseconds")
    panels[0].set_yticks([1, 10, 100], ["1", "10", "100"])
    panels[0].legend(loc="upper left")
    save(figure, folder, "benchmark_attention")


GENERATION = {
    "torch_spe": ('torch_spe, "fading"', BLUE),
    "(softmax attention with a cache)": ("softmax attention with a cache", ORANGE),
    "(nn.MultiheadAttention, all keys projected again)": ("nn.MultiheadAttention, no cache", GREY),
}


def draw_generation(folder):
    """Time of one more token, by how many there are before it."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3))
    rows = rows_of("decode")
    for implementation, (label, color) in GENERATION.items():
        points = sorted(
            (row["N"], row["forward ms"]) for row in rows if row["implementation"] == implementation
        )
        axes.loglog(*zip(*points, strict=True), "o-", color=color, label=label)
        for length, ms in points:
            axes.annotate(
                show_time(ms), (length, ms), (0, 7 if ms > 0.6 else -14), ha="center",
                textcoords="offset points",
                fontsize=9, color=color,
            )  # fmt: skip
    lengths = sorted({row["N"] for row in rows})
    axes.set_xticks(lengths, [f"{length:,}".replace(",", " ") for length in lengths])
    axes.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
    axes.minorticks_off()
    axes.set(xlabel="tokens before this one", ylabel="milliseconds")
    axes.set(xlim=(700, 190_000), ylim=(0.1, 8000))
    axes.legend(loc="upper left")
    axes.grid(axis="y", color="0.92")
    save(figure, folder, "benchmark_generation")


LAYERS = {
    "(nn.TransformerEncoderLayer)": ("nn.TransformerEncoderLayer", ORANGE),
    "torch_spe": ('torch_spe, "fading", the default', BLUE),
    "(torch_spe, rotary, decay)": ('torch_spe, "rotary" and a decay', GREEN),
    "(torch_spe, no positions)": ("torch_spe, no positions", GREY),
}


def draw_layers(folder):
    """A training step of a whole layer, B x N = 4096 tokens, by how long their sequences are."""
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 3.2), sharey=True)
    for axes, (name, title) in zip(
        panels, (("encoder_layer", "AVX-512"), ("encoder_layer_avx2", "AVX2")), strict=True
    ):
        rows = rows_of(name)
        lengths = sorted({row["N"] for row in rows})
        for implementation, (label, color) in LAYERS.items():
            points = sorted(
                (row["N"], row["forward+backward ms"])
                for row in rows
                if row["implementation"] == implementation
            )
            if points:
                axes.semilogx(*zip(*points, strict=True), "o-", color=color, label=label)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.xaxis.minorticks_off()
        axes.set(xlabel="tokens of a sequence")
        axes.set_title(title, loc="left")
        axes.grid(axis="y", color="0.92")
    panels[0].set(ylabel="milliseconds", ylim=(0, None))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    save(figure, folder, "benchmark_layers")


DECAYS = ("[H]", "[B, N, H]", "[H, R]", "[B, N, H, R]")


def draw_decays(folder):
    """How many times as long as without a decay causal attention takes, B = 1, N = 4096."""
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 2.6), sharey=True)
    case, sizes = "linear attention with a decay, causal", {"B": 1, "N": 4096}
    for axes, (column, title) in zip(panels, PASSES.items(), strict=True):
        for side, (name, label, color) in enumerate(
            (("decay", "AVX-512", BLUE), ("decay_avx2", "AVX2", GREEN))
        ):
            without = value_of(name, case, "torch_spe", f"{column} ms", **sizes)
            ratios = [
                value_of(name, case, f"torch_spe, log_decay {form}", f"{column} ms", **sizes)
                / without
                for form in DECAYS
            ]
            places = [row + 0.37 * side for row in range(len(DECAYS))]
            bars = axes.barh(places, ratios, 0.34, color=color, label=label)
            label_bars(axes, bars, [f"{ratio:.2f}" for ratio in ratios])
        axes.axvline(1, color="0.4", linewidth=1)
        axes.set_title(title, loc="left")
        axes.set(xlim=(0, 2.4), xticks=[0, 1, 2])
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks([row + 0.18 for row in range(len(DECAYS))], DECAYS)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    save(figure, folder, "benchmark_decays")


ATTEND = {
    "(softmax attention, rotary)": ("softmax attention, rotary positions", ORANGE),
    "(torch_spe, no noise)": ("exact sines and linear attention", BLUE),
    "torch_spe": ("phase noise and linear attention", GREEN),
}


def draw_gpu_attention(folder):
    """Encoding and attention on an H100 in bfloat16 beside softmax attention, by shape."""
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 3.3), sharey=True)
    content = json.loads((RESULTS / "h100_bfloat16.json").read_text())
    rows = [row for row in content["rows"] if row["case"] == "encode and attend"]
    shapes = list(dict.fromkeys((row["B"], row["N"]) for row in rows))
    for axes, (column, title) in zip(panels, PASSES.items(), strict=True):
        for implementation, (label, color) in ATTEND.items():
            times = [row[f"{column} ms"] for row in rows if row["implementation"] == implementation]
            axes.semilogy(range(len(shapes)), times, "o-", color=color, label=label)
        axes.set_xticks(range(len(shapes)), [f"{batch} x {length}" for batch, length in shapes])
        axes.tick_params(axis="x", labelsize=8)
        axes.yaxis.minorticks_off()
        axes.set(xlabel="sequences x tokens")
        axes.set_title(title, loc="left")
        axes.grid(axis="y", color="0.92")
    panels[0].set(ylabel="milliseconds")
    panels[0].set_yticks([0.2, 0.5, 1, 2, 5, 10, 20, 50], ["0.2", "0.5", *"125", "10", "20", "50"])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    save(figure, folder, "gpu_attention")


KERNELS = {
    "linear_attention": "attention, causal",
    "linear_attention decay=1": "causal, a decay per head",
    "linear_attention rms=1 decay=2": "and RMS norm, as in layers",
    "linear_attention R=192 rms=1 decay=2": "the same, R = 192",
    "linear_attention causal=0": "attention, full",
    "linear_attention causal=0 decay=1": "full, a decay per head",
    "exact_sines": "exact sines",
    "sine_features": "sine features, K = 10",
    "rotary": "rotary positions",
    "phasor_filter": "phasor filter",
    "sine_filter": "sine filter",
    "polyphase_filter": "polyphase convolution",
    "conv_filter": "dense convolution",
}


def draw_gpu_kernels(folder):
    """Time of the operators' kernels on an H100, and what share of it the roof would be."""
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 4.2), sharey=True)
    rows = json.loads((RESULTS / "h100_kernels.json").read_text())["runs"][-1]["rows"]
    for axes, name in zip(panels, ("forward", "backward"), strict=True):
        found = {row["case"]: row for row in rows if row["pass"] == name}
        times, roofs = ([found[case][column] for case in KERNELS] for column in ("ms", "roof ms"))
        places = range(len(KERNELS))
        bars = axes.barh(places, times, 0.7, color=BLUE, alpha=0.35, label="measured")
        axes.barh(places, roofs, 0.7, color=BLUE, label="roof: bytes once, or products")
        label_bars(
            axes, bars,
            [f"{time:.2f} ms  {roof / time:.0%}" for time, roof in zip(times, roofs, strict=True)],
        )  # fmt: skip
        axes.set(xlim=(0, 1.6 * max(times)))
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_title(name, loc="left")
    panels[0].set_yticks(places, KERNELS.values())
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    save(figure, folder, "gpu_kernels")


def draw(folder):
    draw_encoders(folder)
    draw_attention(folder)
    draw_generation(folder)
    draw_layers(folder)
    draw_decays(folder)
    draw_gpu_attention(folder)
    draw_gpu_kernels(folder)
