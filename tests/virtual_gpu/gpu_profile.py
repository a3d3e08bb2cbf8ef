"""Predicts what bounds an operator on an H100, from the instructions its kernels execute.

    python tests/virtual_gpu/gpu_profile.py OPERATOR [name=value ...] [--folder FOLDER] [--ptxas FOLDER] [--sass FILE]
        [--blocks N] [--json FILE] [--lines N]

Operators: sine_filter, phasor_filter, sine_features, exact_sines (K = 1 and a constant), rotary,
conv_filter, polyphase_filter, linear_attention. Shape names: B N H D R K P E stride dtype causal
decay rms; defaults are those of `SHAPE`; with decay=1 linear attention has a decay per head, which
wants a gradient with decay=2; with decay=3 and decay=4 it has a decay per feature; with rms=1 it
divides by the root of the mean square, as layers with a decay do, not by denominators.
--sass names the table of sass_map.py, if not FOLDER/sass.json; without it --ptxas names the
folder with ptxas' reports (*.ptxas), for registers and so occupancy.

A STATIC PREDICTION, not a measurement: some blocks of each launch are executed on the virtual
GPU, their PTX instructions are weighed by the machine instructions that ptxas makes of them
(sass.json of sass_map.py, or else the estimate `WEIGHTS`), and every pipe of a multiprocessor is
taken to be always busy. Latencies, dependencies between instructions, bank conflicts between warps,
launch overhead and clock changes are left out: real times are longer.
"""

import collections
import json
import math
import re
from pathlib import Path

from sass_map import plain
from virtual_gpu import load, parser

# One H100 SXM. Rates are of one multiprocessor in one cycle; of warp instructions where a lane
# count is given, lanes / 32.
CLOCK = 1.755e9
MULTIPROCESSORS = 132
HBM, L2 = 3.35e12, 5.5e12
RATES = {
    "issue": 4.0,  # warp instructions
    "tensor": 1024.0,  # multiply-adds of 16-bit mma.sync; tf32 counts twice
    "fp32": 128 / 32,
    "imad": 64 / 32,  # integer multiply-adds: half of the fp32 pipe
    "int": 64 / 32,
    "fp64": 64 / 32,
    "mufu": 16 / 32,
    "convert64": 16 / 32,  # conversions from and to 64 bits
    "lsu": 1.0,  # passes of 128 bytes: shared memory, and global sectors / 4
}
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 227 * 1024, 2048, 32

SHAPE = dict(
    B=8, N=4096, H=8, D=64, R=64, K=10, P=128, E=64, stride=32, dtype="bfloat16", causal=1, decay=0,
    rms=0,
)  # fmt: skip


def shape_of(items):
    """`SHAPE`, with what "name=value" say."""
    shape = dict(SHAPE)
    for item in items:
        name, value = item.split("=")
        shape[name] = value if name == "dtype" else int(value)
    return shape


# opcode prefix: {pipe: instructions}. What ptxas makes of a PTX instruction, roughly; the first
# that fits counts.
WEIGHTS = [
    (
        r"mov\.|cvta|ld\.param|ret|cvt\.u64\.u32|cvt\.u32\.u64|cvt\.u32\.u16|cvt\.u16\.u32|cvt\.s64\.s64",
        {},
    ),
    (r"cvt\.s64\.s32|cvt\.[us](8|16|32)", {"int": 1}),
    (r"bra", {"int": 1}),
    (r"bar\.|cp\.async\.(wait|commit)", {"other": 1}),
    (r"(and|or|xor|not)\.pred", {"int": 0.5}),
    (r"(div|rem)\.[us]64", {"int": 70, "fp32": 10, "mufu": 1}),
    (r"(div|rem)\.[us]32", {"int": 12, "fp32": 4, "mufu": 1}),
    (r"mul\.lo\.[us]64", {"fp32": 4}),  # IMAD goes through the multiply-add pipe
    (r"mul\.(wide|lo|hi)|mad\.", {"fp32": 1}),
    (r"(add|sub|and|or|xor|not|neg|shl|shr|selp|bfi)\.[usb]64|setp\.\w+\.[usb]64", {"int": 2}),
    (r"(min|max)\.[us]64", {"int": 4}),
    (r"div\.rn\.f32", {"fp32": 8, "int": 2, "mufu": 1}),
    (r"rcp\.rn\.f32|sqrt\.rn\.f32", {"fp32": 5, "int": 2, "mufu": 1}),
    (r"(div|rcp|sqrt)\.rn\.f64", {"fp64": 10, "int": 4, "mufu": 1}),
    (r"(sin|cos)\.approx", {"fp32": 1, "mufu": 1}),
    (r"sqrt\.approx", {"fp32": 1, "mufu": 1}),
    (r"(ex2|lg2|rcp|rsqrt|tanh)\.", {"mufu": 1}),
    (r"setp\.\w+\.f32|selp\.f32|min\.f32|max\.f32", {"int": 1}),
    (r"selp\.f64", {"int": 2}),
    (r"(add|sub|mul|fma|setp\.\w+|min|max|abs|neg)\.(rn\.|rz\.)?f64", {"fp64": 1}),
    (r"cvt\..*f64|cvt\..*[us]64", {"convert64": 1}),
    (r"cvt\.f32\.f16", {"fp32": 1}),
    (r"cvt\.", {"int": 1}),
    (r"(fma|mul|add|sub|neg|abs)\.(rn\.|rz\.)?(f32|f16x2|bf16x2)", {"fp32": 1}),
    (r"mma\.", {"other": 1}),
    (r"ld\.|st\.|ldmatrix|shfl|cp\.async", {"memory": 1}),
    (r".", {"int": 1}),
]
COMPILED = [(re.compile(p), w) for p, w in WEIGHTS]

# Pipes of machine instructions, by the start of their opcode; what fits none goes to the integer
# pipe. Uniform, constant, control and memory instructions take an issue slot only, here.
MACHINE = [
    (r"[HIQ]MMA", ()),
    (r"IMAD", ("imad", "fp32")),
    (r"F(FMA|ADD|MUL)|H(FMA2|ADD2|MUL2|SET2|SETP2)", ("fp32",)),
    (r"D(FMA|ADD|MUL|SETP|MNMX)", ("fp64",)),
    (r"MUFU|POPC|FLO|BREV|FRND|F2I|I2F\b|I2F\.|F2F\b|F2F\.", ("mufu",)),
    (r"(LD|ST|ATOM|RED|SHFL|CCTL|ERRBAR|MEMBAR|FENCE)", ()),
    (r"U[A-Z]|R2UR|S2UR|S2R|CS2R|LDC|BRA|BRX|JMP|CALL|RET|EXIT|BSSY|BSYNC|BREAK|BAR|WARPSYNC|NOP|DEPBAR|YIELD|ELECT|VOTE|REDUX|B2R|R2B", ()),
]  # fmt: skip
MACHINE = [(re.compile(p), pipes) for p, pipes in MACHINE]


def machine_pipes(opcode):
    for pattern, pipes in MACHINE:
        if pattern.match(opcode):
            return pipes
    return ("int",)


CLASSES = [  # for the table of instructions
    ("mma", r"mma\."),
    ("ldmatrix", r"ldmatrix"),
    ("cp.async", r"cp\.async"),
    ("barrier", r"bar\."),
    ("ld/st global", r"(ld|st)\.global"),
    ("ld/st shared", r"(ld|st)\.shared"),
    ("shuffle", r"shfl|vote|redux"),
    ("branch", r"bra|ret"),
    ("sfu", r"(sin|cos|lg2|ex2|sqrt|rsqrt|rcp|tanh)\.approx"),
    ("convert", r"cvt\."),
    ("fp64", r"\w+\.(\w+\.)*f64"),
    (
        "fp32",
        r"(fma|mul|add|sub|neg|abs|max|min|div|rcp|sqrt|selp|setp)\.(\w+\.)*(f32|f16x2|bf16x2)",
    ),
    ("move/param", r"mov\.|cvta|ld\.param"),
    ("int", r"."),
]
CLASSES = [(n, re.compile(p)) for n, p in CLASSES]


def weight(opcode):
    for pattern, pipes in COMPILED:
        if pattern.match(opcode):
            return pipes
    return {"int": 1}


def short(name):
    """A readable name: kernel and types."""
    found = re.search(r"\d+([a-z]\w*_kernel)(I.*)?", name)
    kernel = found.group(1) if found else name[:40]
    kernel = re.sub(r"^.*?([a-z_]+_kernel)$", r"\1", kernel)
    inner = re.search(r"13static_kernelI.*?4cuda(?:\d+[a-z_]+)*\d+([A-Z]\w*?)(?:I|E)", name)
    if inner:  # CUB's loop, known by its function
        kernel = "cub:" + inner.group(1)
    for code, word in (("8BFloat16", "bf16"), ("4Half", "f16"), ("4Tf32", "tf32")):
        if code in name:
            return f"{kernel}<{word}>"
    return kernel


def registers(folder, target):
    """Registers of each kernel, from what ptxas said for the architecture."""
    found = {}
    for path in Path(folder).glob("*.ptxas"):
        kernel = None
        for line in path.read_text().splitlines():
            entry = re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line)
            if entry:
                kernel = plain(entry.group(1)) if entry.group(2) == target else None
            used = re.search(r"Used (\d+) registers", line)
            if used and kernel:
                found[kernel] = int(used.group(1))
    return found


def occupancy(threads, shared, regs):
    """Blocks of a multiprocessor, and what limits them."""
    warps = math.ceil(threads / 32)
    limits = {"threads": THREADS // (warps * 32), "blocks": BLOCKS}
    if shared:
        limits["shared memory"] = SHARED // (math.ceil(shared / 1024) * 1024 + 1024)
    if regs:
        limits["registers"] = REGISTERS // (math.ceil(regs / 8) * 8 * 32 * warps)
    least = min(limits, key=limits.get)
    return limits[least], least


def machine_code_of(launch, sass):
    """What sass_map.py's table says of a launched kernel; None if it is not there."""
    bare = lambda s: re.sub(r"_ZN\w+|\s", "", s)  # noqa: E731
    builds = sass.get(plain(launch["kernel"]), [])  # a template's, of several modules
    for build in builds:
        code = build["instructions"]
        if all(i[0] < len(code) and bare(code[i[0]]) == bare(i[1]) for i in launch["instructions"]):
            return build
    if builds:
        raise SystemExit(
            f"the table of machine instructions is of another build of {launch['kernel']}"
        )
    return None


def analyse(launch, regs, sass):
    """Cycles of each pipe and time of one launch. `sass` is the table of sass_map.py by kernels."""
    exact = machine_code_of(launch, sass)
    machine = collections.Counter()
    grid = math.prod(launch["grid"])
    scale = grid / launch["executed_blocks"]
    busiest = math.ceil(grid / MULTIPROCESSORS) / launch["executed_blocks"]  # blocks of one SM
    pipes = collections.Counter()
    classes = collections.Counter()
    lines = collections.Counter()
    flops = sectors = ideal_sectors = passes = ideal_passes = 0
    lanes = active = 0
    for at, text, place, warps, threads, units, ideal in launch["instructions"]:
        text = re.sub(r"^@\S+\s+", "", text)
        opcode = text.split()[0]
        if exact:
            made = exact["weights"].get(str(at), {})
            cost = sum(made.values())
            for name, n in made.items():
                machine[name] += n * warps
                for pipe in machine_pipes(name):
                    pipes[pipe] += n * warps
        else:
            pipes_of = weight(opcode)
            cost = sum(pipes_of.values())
            for pipe, n in pipes_of.items():
                if pipe not in ("other", "memory"):
                    pipes[pipe] += n * warps
        pipes["issue"] += cost * warps
        lines[place] += cost * warps
        classes[next(n for n, p in CLASSES if p.match(opcode))] += warps
        lanes += warps * 32
        active += threads
        if opcode.startswith("mma"):
            madds = 2048 if "k16" in opcode else 1024
            flops += 2 * madds * warps
            pipes["tensor"] += madds * warps * (2 if "tf32" in opcode else 1)
        if "global" in opcode and not opcode.startswith("cvta"):
            # Of cp.async, shared passes were added to the sectors: it writes 16 bytes a lane.
            if opcode.startswith("cp.async"):
                extra = 4 * warps
                units, ideal = units - extra, ideal - extra
                passes, ideal_passes = passes + extra, ideal_passes + extra
                pipes["lsu"] += extra
            sectors += units
            ideal_sectors += ideal
            pipes["lsu"] += units / 4
        elif "shared" in opcode:
            passes += units
            ideal_passes += ideal
            pipes["lsu"] += units
        elif opcode.startswith("shfl"):
            pipes["lsu"] += warps
    cycles = {pipe: n * busiest / RATES[pipe] for pipe, n in pipes.items()}
    times = {pipe: c / CLOCK for pipe, c in cycles.items()}
    l2 = sum(r + w for _, r, w in launch["traffic"]) * scale
    dram = sum(min(s, r * scale) + min(s, w * scale) for s, r, w in launch["traffic"])
    times["L2"], times["HBM"] = l2 / L2, dram / HBM
    bound = max(times, key=times.get)
    threads = math.prod(launch["block"])
    shared = launch["static_shared"] + launch["dynamic_shared"]
    used = exact["registers"] if exact else regs.get(plain(launch["kernel"]))
    blocks, limit = occupancy(threads, shared, used)
    resident = min(blocks, math.ceil(grid / MULTIPROCESSORS))
    return {
        "kernel": short(launch["kernel"]),
        "grid": grid, "threads": threads, "shared": shared, "registers": used,
        "blocks_per_sm": blocks, "limit": limit, "occupancy": blocks * threads / THREADS,
        "warps_resident": resident * threads // 32,
        "waves": grid / (MULTIPROCESSORS * blocks) if blocks else None,
        "times": times, "bound": bound, "time": times[bound],
        "tensor_flops": flops * scale, "instructions": pipes["issue"] * scale,
        "ptx_instructions": sum(classes.values()) * scale,
        "classes": {k: v * scale for k, v in classes.items()},
        "sectors": sectors * scale, "ideal_sectors": ideal_sectors * scale,
        "passes": passes * scale, "ideal_passes": ideal_passes * scale,
        "l2_bytes": l2, "dram_bytes": dram,
        "active_lanes": active / lanes if lanes else 1.0,
        "balance": grid / MULTIPROCESSORS / math.ceil(grid / MULTIPROCESSORS),
        "lines": lines.most_common(12),
        "machine": {k: v * scale for k, v in machine.most_common(40)},
        "hmma_found": sum(v for k, v in machine.items() if k.startswith("HMMA")) / classes["mma"] if exact and classes["mma"] else None,
    }  # fmt: skip


def make_case(operator, s):
    """A function of tensors, its inputs, output gradients, and useful work."""
    import torch

    dtype = getattr(torch, s["dtype"])
    g = torch.Generator().manual_seed(0)
    B, N, H, D, R, K, P, E = (s[n] for n in "BNHDRKPE")
    ops = torch.ops.torch_spe

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=g).to(dtype)

    wide = torch.promote_types(dtype, torch.float32)
    if operator == "linear_attention":
        q, k = (normal(B, N, H, R, dtype=dtype) for _ in range(2))
        v = normal(B, N, H, E, dtype=dtype)
        sizes = (H, R) if s["decay"] > 2 else (H,)
        decay = -torch.rand(*sizes, generator=g) / 64 if s["decay"] else None

        def function(q, k, v, log_decay=decay):
            return ops.linear_attention(
                q, k, v, "elu", bool(s["causal"]), not s["rms"], 1e-6, rms_norm=bool(s["rms"]),
                log_decay=log_decay,
            )[0]  # fmt: skip

        inputs = [q, k, v, decay] if s["decay"] in (2, 4) else [q, k, v]
        # Chunked or recurrent: a state update and a read of it for every token.
        return function, inputs, 2 * 2 * B * N * H * R * E
    x = normal(B, N, H, D, dtype=dtype)
    if operator == "sine_filter":
        freqs = torch.rand(H, D, K, generator=g).to(wide) / 2
        weight = normal(H, D, 2 * K, R, dtype=wide) / (D * K) ** 0.5
        # Either product: of x (.) basis with the weight, or codes made once and applied.
        work = min(2 * B * N * H * D * 2 * K * R, 2 * N * H * D * 2 * K * R + 2 * B * N * H * D * R)
        return ops.sine_filter, [x, freqs, weight], work
    if operator == "phasor_filter":
        freqs = torch.rand(H, D, R // 2, generator=g).to(wide) / 2
        coefficients = normal(H, D, R // 2, 2, dtype=wide)
        return ops.phasor_filter, [x, freqs, coefficients], 2 * B * N * H * D * R
    if operator == "sine_features":
        freqs = torch.rand(H, D, K, generator=g).to(wide) / 2
        return ops.sine_features, [x, freqs, normal(H, D, K, dtype=wide)], B * N * H * D * 2 * K
    if operator == "exact_sines":  # what layers make of position="exact"
        freqs = torch.rand(H, D, 1, generator=g).to(wide) / 2
        amplitudes, constant = normal(H, D, 1, dtype=wide), normal(H, D, dtype=wide)

        def function(x, freqs, amplitudes, constant):
            return ops.sine_features(x, freqs, amplitudes, constant=constant)

        return function, [x, freqs, amplitudes, constant], B * N * H * D * 3
    if operator == "rotary":
        return ops.rotary, [x, torch.rand(H, D // 2, generator=g).to(wide) / 2], B * N * H * D * 2
    if operator in ("conv_filter", "polyphase_filter"):
        kernel = normal(H, D, P, dtype=wide)
        strides = [] if operator == "conv_filter" else [s["stride"]]
        seed = torch.tensor(7)

        def function(x, kernel, seed=seed):
            return ops.conv_filter(x, kernel, None, None, seed, R, "gaussian", strides, [])

        taps = P if operator == "conv_filter" else max(1, P // s["stride"])
        return function, [x, kernel], 2 * N * H * D * R * taps + 2 * B * N * H * D * R
    raise SystemExit(f"unknown operator {operator}")


def profile(folder, operator, shape, blocks, ptxas, sass_file=None):
    import torch

    vgpu = torch.ops.torch_spe_virtual_gpu
    target = "sm_" + re.search(r"sm_(\d+)", next(Path(folder).glob("*.ptx")).read_text()).group(1)
    regs = registers(ptxas, target) if ptxas else {}
    table = Path(sass_file or Path(folder) / "sass.json")
    sass = collections.defaultdict(list)
    for kernels in (json.loads(table.read_text()) if table.exists() else {}).values():
        for kernel, build in kernels.items():
            sass[plain(kernel)].append(build)
    function, inputs, work = make_case(operator, shape)
    leaves = [t.requires_grad_() for t in inputs]
    result = {}
    vgpu.enable(True)
    vgpu.profile(True, blocks)
    out = function(*leaves)
    result["forward"] = [analyse(launch, regs, sass) for launch in json.loads(vgpu.report())]
    grad = torch.randn(out.shape).to(out.dtype)
    vgpu.profile(True, blocks)
    out.backward(grad)
    result["backward"] = [analyse(launch, regs, sass) for launch in json.loads(vgpu.report())]
    vgpu.profile(False, 0)
    vgpu.enable(False)

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    data = {"forward": size(inputs) + size([out]), "backward": 2 * size(inputs) + size([out])}
    work = {"forward": work, "backward": 2 * work}
    return result, data, work


def roof_of(data, work):
    """Seconds that bytes read and written once and useful floating-point operations take."""
    return max(data / HBM, work / (2 * RATES["tensor"] * CLOCK * MULTIPROCESSORS))


def show(operator, shape, result, data, work, lines):
    used = " ".join(f"{k}={v}" for k, v in shape.items())
    print(f"\n=== {operator}: {used}")
    print("STATIC PREDICTION of lower bounds on an H100, not a measurement.")
    for name, launches in result.items():
        total = sum(a["time"] for a in launches)
        roof = roof_of(data[name], work[name])
        print(
            f"\n-- {name}: {len(launches)} launches, at least {total * 1e3:.3f} ms; roofline "
            f"{roof * 1e3:.3f} ms ({data[name] / 1e6:.0f} MB, {work[name] / 1e9:.1f} GFLOP), so at "
            f"best {100 * roof / total:.0f} % of it"
        )
        for a in sorted(launches, key=lambda a: -a["time"]):
            times = sorted(a["times"].items(), key=lambda t: -t[1])
            print(
                f"  {a['time'] * 1e3:8.4f} ms  {a['kernel']:34s} grid {a['grid']} x {a['threads']}, "
                f"{a['shared']} B shared, {a['registers']} registers: {a['blocks_per_sm']} blocks/SM "
                f"({a['limit']}), {a['warps_resident']} warps resident, balance {a['balance']:.2f}"
            )
            print(
                "      pipes ms: "
                + ", ".join(f"{p} {t * 1e3:.4f}" for p, t in times if t > 0.05 * a["time"])
            )
            if a["time"] < 0.03 * total:
                continue
            per_mma = (
                a["ptx_instructions"] / a["classes"]["mma"] if a["classes"].get("mma") else None
            )
            mix = sorted(a["classes"].items(), key=lambda c: -c[1])
            print(
                "      PTX warp instructions: "
                + ", ".join(f"{n} {100 * c / a['ptx_instructions']:.0f}%" for n, c in mix[:9])
                + (
                    f"; {per_mma:.1f} per mma (weighed {a['instructions'] / a['classes']['mma']:.1f})"
                    if per_mma
                    else ""
                )
            )
            if a["machine"]:
                total_machine = sum(a["machine"].values())
                print(
                    "      machine instructions: "
                    + ", ".join(
                        f"{n} {100 * c / total_machine:.0f}%"
                        for n, c in list(a["machine"].items())[:14]
                    )
                    + (f"; mma found {a['hmma_found']:.2f}" if a["hmma_found"] else "")
                )
            if a["passes"]:
                print(
                    f"      shared passes {a['passes']:.3g}, {a['passes'] / max(a['ideal_passes'], 1):.2f} x those without conflicts"
                )
            if a["sectors"]:
                print(
                    f"      global sectors {a['sectors']:.3g}, {a['sectors'] / max(a['ideal_sectors'], 1):.2f} x dense; L2 {a['l2_bytes'] / 1e6:.0f} MB, "
                    f"HBM at least {a['dram_bytes'] / 1e6:.0f} MB; active lanes {100 * a['active_lanes']:.0f} %"
                )
            if lines and a["lines"][0][0]:
                for place, cost in a["lines"][:lines]:
                    print(
                        f"        {100 * cost / sum(c for _, c in a['lines']):4.0f} % of these lines: {place}"
                    )


def main():
    arguments = parser(__doc__)
    arguments.add_argument("operator")
    arguments.add_argument("shape", nargs="*")
    arguments.add_argument("--ptxas")
    arguments.add_argument("--sass")
    arguments.add_argument("--blocks", type=int, default=16)
    arguments.add_argument("--json")
    arguments.add_argument("--lines", type=int, default=0)
    arguments = arguments.parse_args()
    shape = shape_of(arguments.shape)
    load(arguments.folder)
    result, data, work = profile(
        arguments.folder,
        arguments.operator,
        shape,
        arguments.blocks,
        arguments.ptxas,
        arguments.sass,
    )
    show(arguments.operator, shape, result, data, work, arguments.lines)
    if arguments.json:
        content = {
            "operator": arguments.operator,
            "shape": shape,
            "data": data,
            "work": work,
            "result": result,
        }
        Path(arguments.json).write_text(json.dumps(content))


if __name__ == "__main__":
    main()
