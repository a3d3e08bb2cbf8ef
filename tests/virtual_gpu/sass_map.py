"""Tells which machine instructions ptxas makes of every PTX instruction.

    python tests/virtual_gpu/sass_map.py [--folder FOLDER] [--nvdisasm PATH] [--ptxas ptxas] [--arch sm_90] [MODULE ...]

Each PTX instruction gets a line number of its own, ptxas keeps line numbers, and nvdisasm prints
them. Writes FOLDER/sass.json: for each module's kernels the registers and, for each PTX instruction,
the opcodes with how often each stands for one execution. Modules that have not changed since are
kept; MODULE (sine_filter): only these. nvdisasm comes with the CUDA toolkit; Triton's package brings
one too. Where ptxas copied a loop's body (more loads, stores, special functions or tensor-core
instructions of a PTX instruction than one), each copy counts in part.
"""

import collections
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from virtual_gpu import parser

# PTX instructions that become exactly one machine instruction each.
ANCHOR = re.compile(
    r"mma\.|ldmatrix|ld\.(global|shared)|st\.(global|shared)|cp\.async\.c|shfl|bar\.sync|"
    r"(ex2|lg2)\.approx|(sin|cos)\.approx"
)
ANCHOR_SASS = {
    "mma": ("HMMA",), "ldmatrix": ("LDSM",), "ld": ("LDG", "LDS"), "st": ("STG", "STS"),
    "cp": ("LDGSTS",), "shfl": ("SHFL",), "bar": ("BAR",), "ex2": ("MUFU",), "lg2": ("MUFU",),
    "sin": ("MUFU",), "cos": ("MUFU",),
}  # fmt: skip


def plain(name):
    """A kernel's mangled name without what differs from build to build: the hash of its file and
    the architectures in CUB's namespace."""
    name = re.sub(r"\d+CUB_\d+_SM_[\d_]+?6detail", "CUB6detail", name)
    return re.sub(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?_cu)_[0-9a-f]{8}", r"_GLOBAL__\1_", name)


def number_instructions(text):
    """PTX with a .loc before every instruction; kernels as (name, first line, instructions)."""
    out, kernels = [], []
    line = 0
    in_body = False
    rows = []
    for raw in text.splitlines():  # one statement a line, also of { a; b; }
        s = raw.strip()
        if re.match(r"\{ |.*; *\}$", s):
            rows += [
                part for part in re.sub(r"^\{|;|\}$", r"\g<0>\n", s).split("\n") if part.strip()
            ]
        else:
            rows.append(raw)
    for raw in rows:
        s = raw.strip()
        if s.startswith((".loc", ".file")):
            continue
        if s.startswith(".target"):
            raw = raw.split(",")[0]  # without "debug"
        entry = re.match(r"(?:\.visible |\.weak )?\.entry\s+(\w+)", s)
        if entry:
            kernels.append((entry.group(1), line + 1, []))
        if s.startswith(".address_size"):
            out.append(raw)
            out.append('.file 1 "numbered.ptx"')
            continue
        if s == "{":
            in_body = True
        is_instruction = (
            in_body and s.endswith(";") and re.match(r"@|[a-z]", s) and not s.startswith(".")
        )
        if is_instruction:
            line += 1
            out.append(f"\t.loc 1 {line} 0")
            kernels[-1][2].append(s.rstrip(";").strip())
        out.append(raw)
    return "\n".join(out) + "\n", kernels


def find_tool(name):
    """A program of the CUDA toolkit, or of Triton's package; None if there is none."""
    toolkit = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin" / name
    triton = importlib.util.find_spec("triton")
    places = [shutil.which(name), toolkit]
    if triton is not None:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin" / name)
    return next((str(place) for place in places if place and Path(place).exists()), None)


def map_module(path, arguments):
    folder = Path(arguments.folder) / "sass"
    folder.mkdir(exist_ok=True)
    numbered, cubin = folder / (path.stem + ".ptx"), folder / (path.stem + ".cubin")
    text, kernels = number_instructions(path.read_text())
    saved = folder / (path.stem + ".ptxas")
    if not (numbered.exists() and saved.exists() and numbered.read_text() == text):
        numbered.write_text(text)
        saved.write_text(subprocess.run(
            [arguments.ptxas, f"-arch={arguments.arch}", "-O3", "-lineinfo", "-v", str(numbered), "-o", str(cubin)],
            check=True, capture_output=True, text=True,
        ).stderr)  # fmt: skip
    report = saved.read_text()
    registers = {}
    name = None
    for line in report.splitlines():
        found = re.search(r"Compiling entry function '(\w+)'", line)
        name = found.group(1) if found else name
        found = re.search(r"Used (\d+) registers", line)
        if found:
            registers[name] = int(found.group(1))
    listing = subprocess.run(
        [arguments.nvdisasm, "-g", "-c", str(cubin)], check=True, capture_output=True, text=True
    ).stdout
    # Instructions of each section, with the line that holds for them. Divisions of 64 bits are
    # subroutines at the end of a section: their instructions count where they are called.
    sass = collections.defaultdict(list)
    routines = collections.defaultdict(collections.Counter)
    line, section, routine = 0, None, None
    for row in listing.splitlines():
        found = re.match(r"\s*\.section\s+\.text\.(\w+)", row)
        if found:
            section, line, routine = found.group(1), 0, None
        found = re.match(r"(\$__internal_\S+):", row)
        if found:
            routine = (section, found.group(1))
        found = re.match(r'\s*//## File "[^"]*", line (\d+)', row)
        if found:
            line = int(found.group(1))
        found = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", row)
        if found and section:
            if routine:
                if found.group(1) != "NOP":
                    routines[routine][found.group(1)] += 1
                continue
            if found.group(1) == "NOP":  # after the end of the kernel
                continue
            sass[section].append((line, found.group(1)))
            called = re.search(r"CALL\S* `\((\$__internal_\S+)\)", row)
            # Slow paths, of denormal numbers, are called by a branch that PTX does not have.
            if called and "slowpath" not in called.group(1):
                sass[section].append((line, (section, called.group(1))))
    result = {}
    for name, first, instructions in kernels:
        of_line = collections.defaultdict(collections.Counter)
        for line, opcode in sass[name]:
            for o, n in routines[opcode].items() if isinstance(opcode, tuple) else [(opcode, 1)]:
                of_line[line][o] += n
        # Copies of each PTX basic block, from the anchors in it.
        starts = {0}
        for i, s in enumerate(instructions):
            if re.match(r"(@\S+\s+)?(bra|ret)", s):
                starts.add(i + 1)
        block, block_of = 0, []
        for i in range(len(instructions)):
            if i in starts:
                block += 1
            block_of.append(block)
        seen = collections.defaultdict(list)
        for i, s in enumerate(instructions):
            s = re.sub(r"^@\S+\s+", "", s)
            if not ANCHOR.match(s):
                continue
            wanted = ANCHOR_SASS[re.match(r"[a-z0-9]+", s).group(0)]
            count = sum(n for o, n in of_line[first + i].items() if o.split(".")[0] in wanted)
            seen[block_of[i]].append(count)
        copies = {}
        for b, counts in seen.items():
            counts = sorted(c for c in counts if c > 0)
            copies[b] = max(1, counts[len(counts) // 2]) if counts else 1
        weights = {}
        for i in range(len(instructions)):
            n = copies.get(block_of[i], 1)
            if of_line[first + i]:
                weights[i] = {o: c / n for o, c in of_line[first + i].items()}
        unknown = sum(of_line[0].values())
        result[plain(name)] = {
            "registers": registers.get(name), "instructions": instructions, "weights": weights,
            "sass": len(sass[name]), "unplaced": unknown,
            "copied_blocks": {b: n for b, n in copies.items() if n > 1},
        }  # fmt: skip
    return result


def main():
    arguments = parser(__doc__)
    arguments.add_argument("modules", nargs="*")
    arguments.add_argument("--nvdisasm", default=find_tool("nvdisasm"))
    arguments.add_argument("--ptxas", default=find_tool("ptxas"))
    arguments.add_argument("--arch", default="sm_90")
    arguments = arguments.parse_args()
    if not arguments.nvdisasm or not arguments.ptxas:
        raise SystemExit("sass_map.py: no nvdisasm or ptxas was found: name them")
    table = arguments.folder / "sass.json"
    everything = json.loads(table.read_text()) if table.exists() else {}
    for path in sorted(arguments.folder.glob("*.ptx")):
        if arguments.modules and path.stem not in arguments.modules:
            continue
        # ptxas takes minutes: a module that is in the table and has not changed stays.
        state = f"{arguments.arch} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        stamp = arguments.folder / "sass" / f"{path.stem}.sha256"
        if path.stem in everything and stamp.exists() and stamp.read_text() == state:
            continue
        found = map_module(path, arguments)
        everything[path.stem] = found
        table.write_text(json.dumps(everything))
        stamp.write_text(state)
        print(path.name, len(found), "kernels", flush=True)


if __name__ == "__main__":
    main()
