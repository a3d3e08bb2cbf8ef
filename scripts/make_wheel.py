"""Build a manylinux wheel for the PyTorch of this environment. `make wheel` calls it.

The wheel has the library once and its Python module for each version of Python named: this one, and
those of `--python`. Its name says which torch it is for, and whether it has the CUDA kernels:
torch_spe-0.2.0+torch2.11.0.cpu-cp310.cp311-none-manylinux_2_34_x86_64.whl. It is then read (what it
links to), and under every Python that has this torch installed in an environment of its own,
imported and run. A Python without it, or of which there are only the headers, is named at the end.

The manylinux tag follows from the glibc of the compiler's system: Debian 12 gives manylinux_2_34.
TORCH_SPE_INSTRUCTION_SETS and TORCH_CUDA_ARCH_LIST choose kernels as they do for setup.py.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from email import message_from_string
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libc10.so", "libtorch_python.so")
# libgomp is torch's: another OpenMP beside it would have threads of its own.
EXCLUDED = (*TORCH_LIBRARIES, "libc10_cuda.so", "libgomp.so.1")
SYSTEM_LIBRARIES = re.compile(
    r"(libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+|libgomp|ld-linux-[\w-]+)\.so\.\d+"
)
PROBE = """
import json, sys, sysconfig
print(json.dumps([
    sys.implementation.name, "%d%d" % sys.version_info[:2],
    sysconfig.get_config_var("EXT_SUFFIX"), sysconfig.get_path("include"),
]))
"""
WHERE = """
import json, sysconfig, torch
version = torch.__version__.split("+")[0]
print(json.dumps([sysconfig.get_path("purelib"), version, torch.version.cuda]))
"""
TRIAL = """
import torch, torch_spe
from torch_spe import SPEMultiheadAttention
x = torch.randn(2, 5, 8)
y, _ = SPEMultiheadAttention(8, 2, batch_first=True)(x, x, x, is_causal=True, need_weights=False)
y.sum().backward()
print(torch_spe.__file__)
"""
LOAD = "import ctypes, sys; ctypes.CDLL(sys.argv[1], 0x2); print(open('/proc/self/maps').read())"


class Error(Exception):
    """What is wrong with the wheel or its surroundings."""


def run(*command, **variables):
    """Run a command of this environment; return its output, or raise with it."""
    path = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PATH": path, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise Error(f"{' '.join(map(str, command[:4]))} failed:\n{done.stdout}")
    return done.stdout


def probe(python):
    """Return the tag of a Python, the suffix of its modules and the folder of its headers.

    A folder of headers alone is enough.
    """
    if Path(python).is_dir():
        name, include = "cpython", str(Path(python).resolve())
        check_headers(python, include)
        text = Path(include, "patchlevel.h").read_text()
        version = "".join(re.findall(r"define PY_(?:MAJOR|MINOR)_VERSION\s+(\d+)", text))
        own = f"{sys.version_info.major}{sys.version_info.minor}"
        suffix = sysconfig.get_config_var("EXT_SUFFIX").replace(own, version)
    else:
        name, version, suffix, include = json.loads(run(python, "-c", PROBE))
    if name != "cpython" or int(version[1:]) < 10:
        raise Error(f"{python}: expected CPython 3.10 or later, got {name} {version}")
    check_headers(python, include)
    return f"cp{version}", suffix, include


def check_headers(python, include):
    if not Path(include, "Python.h").is_file():
        raise Error(
            f"{python}: no Python.h in {include}: install its development files (python3.x-dev on "
            "Debian and Ubuntu), or name a folder that has them, as unpacked from such a package"
        )


def whole_headers(include, folder):
    """Return a folder of headers that needs no other: Debian has pyconfig.h in one beside it."""
    text = Path(include, "pyconfig.h").read_text()
    match = re.search(r"#\s*include <([\w-]*linux-gnu\w*/\S+)>", text)
    beside = Path(include).parent / match[1] if match else None
    if beside is None or not beside.is_file() or beside.is_relative_to("/usr/include"):
        return include
    shutil.copytree(include, folder, dirs_exist_ok=True)
    shutil.copy(beside, folder / "pyconfig.h")
    return str(folder)


def local_version(torch_version, cuda):
    """Return the local part of the version: torch2.11.0.cpu, torch2.11.0.cu130."""
    variant = f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    return f"torch{torch_version.split('+')[0]}.{variant}"


def relabel_metadata(text, version, torch_version):
    """Return METADATA of the wheel for one torch."""
    lines = []
    for line in text.split("\n"):
        if line.startswith("Version: "):
            line = f"Version: {version}"
        elif line.startswith("Requires-Dist: torch>") or line == "Requires-Dist: torch":
            line = f"Requires-Dist: torch=={torch_version.split('+')[0]}"
        lines.append(line)
    new = "\n".join(lines)
    wanted = (version, [f"torch=={torch_version.split('+')[0]}"])
    message = message_from_string(new)
    torch = [r for r in message.get_all("Requires-Dist") or [] if re.match(r"torch\b(?!-)", r)]
    if (message["Version"], torch) != wanted:
        raise Error(f"METADATA: expected version and requirement {wanted}, got {torch}")
    return new


def relabel_tags(text, tags):
    """Return WHEEL with a tag for each Python: the library itself knows none."""
    (tag,) = re.findall(r"^Tag: (.*)$", text, re.MULTILINE)
    system = tag.split("-")[2]
    lines = "\n".join(f"Tag: {python}-none-{system}" for python in sorted(tags))
    return text.replace(f"Tag: {tag}", lines)


def relabel(wheel, local, torch_version, tags, folder):
    """Write the wheel again with its local version, its one torch and its versions of Python."""
    run(sys.executable, "-m", "wheel", "unpack", "--dest", folder / "unpacked", wheel)
    (tree,) = (folder / "unpacked").iterdir()
    (info,) = tree.glob("*.dist-info")
    version = info.name.removesuffix(".dist-info").split("-")[1]
    named = info.with_name(f"torch_spe-{version}+{local}.dist-info")
    info.rename(named)
    metadata, tagged = named / "METADATA", named / "WHEEL"
    metadata.write_text(relabel_metadata(metadata.read_text(), f"{version}+{local}", torch_version))
    tagged.write_text(relabel_tags(tagged.read_text(), tags))
    (folder / "relabelled").mkdir()
    run(sys.executable, "-m", "wheel", "pack", "--dest-dir", folder / "relabelled", tree)
    (relabelled,) = (folder / "relabelled").iterdir()
    return relabelled


def needed(library):
    """Return the libraries that one links to."""
    return re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "--dynamic", "--wide", library))


def symbols(library, kind):
    """Return the names of dynamic symbols, without versions: `kind` is what nm calls them."""
    listing = run("nm", "--dynamic", f"--{kind}-only", "--format=posix", library)
    lines = (line.split() for line in listing.splitlines())
    return {name.split("@")[0] for name, letter, *_ in lines if letter not in "wv"}


def check_libraries(files, torch_lib, cuda):
    """Raise unless libraries link to torch and the system alone, the CPU's to nothing of CUDA."""
    allowed = {*TORCH_LIBRARIES, "libtorch_spe.so", *["libc10_cuda.so"] * bool(cuda)}
    for file in files:
        for library in needed(file):
            if library not in allowed and not SYSTEM_LIBRARIES.fullmatch(library):
                raise Error(f"{file.name} links to {library}")
    if cuda:
        return
    provided = set()
    for file in (*files, *(torch_lib / name for name in TORCH_LIBRARIES)):
        provided |= symbols(file, "defined")
    for file in files:
        # C++ symbols of torch, which a CPU build has too: none of libtorch_cuda or libc10_cuda.
        names = ("c10", "at", "torch", "caffe2")
        of_torch = re.compile("_Z.*(" + "|".join(f"{len(name)}{name}" for name in names) + ")")
        missing = sorted(n for n in symbols(file, "undefined") - provided if of_torch.match(n))
        if missing:
            raise Error(f"{file.name} needs what libtorch_cpu.so does not have: {missing[:3]}")


def check_loads_without_cuda(package, torch_lib, folder):
    """Load the library where torch has its CPU libraries only."""
    lib = folder / "torch" / "lib"
    lib.mkdir(parents=True)
    for file in torch_lib.iterdir():
        if not re.search("cuda|nvrtc|nvshmem|torch_python", file.name):
            (lib / file.name).symlink_to(file)
    # In a CUDA build libtorch.so, which is empty, also brings libtorch_cuda.so.
    (lib / "libtorch.so").unlink()
    source = folder / "empty.cpp"
    source.touch()
    compiler = os.environ.get("CXX", "c++")
    run(compiler, "-shared", "-Wl,-soname,libtorch.so", "-o", lib / "libtorch.so", source)
    if (torch_lib.parent.parent / "nvidia").is_dir():  # libraries that libtorch_cpu.so itself wants
        (folder / "nvidia").symlink_to(torch_lib.parent.parent / "nvidia")
    shutil.copytree(package, folder / "torch_spe")
    mapped = run(sys.executable, "-c", LOAD, folder / "torch_spe" / "libtorch_spe.so")
    if "libtorch_spe.so" not in mapped or re.search("libtorch_cuda|libc10_cuda", mapped):
        raise Error("libtorch_spe.so brings torch's CUDA libraries")


def find_torch(python, version, cuda):
    """Return where a Python has this torch, or None."""
    if Path(python).is_dir():
        return None
    try:
        site, *found = json.loads(run(python, "-c", WHERE).splitlines()[-1])
    except Error:
        return None
    return site if found == [version.split("+")[0], cuda or found[1]] else None


def try_out(wheel, python, site, folder):
    """Install the wheel in an environment of its own, beside a Python's torch, and run a layer."""
    run(python, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # That Python's packages, without its .pth files: not the package of the source tree.
    (own / "torch.pth").write_text(f"{site}\n")
    where = run(python, "-c", TRIAL, PYTHONPATH="", PYTHONSAFEPATH="1").split()[-1]
    if not Path(where).is_relative_to(own):
        raise Error(f"imported {where}, which is not what was installed in {own}")


def build(source, out, pythons, cuda):
    """Build, repair, check and try a wheel; return its path in `out`."""
    # Neither import is needed for the rest, and torch's takes seconds.
    import torch

    if cuda and not torch.version.cuda:
        raise Error(f"--cuda needs a CUDA build of torch, and this is {torch.__version__}")
    found = [(python, *probe(python)) for python in dict.fromkeys((sys.executable, *pythons))]
    tags = {tag for _, tag, _, _ in found}
    version = torch.__version__
    local = local_version(version, cuda and torch.version.cuda)
    torch_lib = Path(torch.__file__).parent / "lib"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        objects = os.environ.get("TORCH_SPE_BUILD_DIR") or ROOT / "build" / f"wheel-{local}"
        objects = Path(objects).resolve()
        arguments = os.environ.get("CMAKE_ARGS", "").split()
        more = {
            tag: f"{suffix}={whole_headers(include, objects / tag)}"
            for _, tag, suffix, include in found[1:]
            if tag != found[0][1]
        }
        run(
            *(sys.executable, "-m", "build", "--wheel", "--no-isolation"),
            *("--outdir", folder / "built", source),
            TORCH_SPE_BUILD_DIR=str(objects),
            TORCH_SPE_CUDA=str(int(cuda)),
            CMAKE_ARGS=" ".join(
                [*arguments, f"-DTORCH_SPE_MORE_PYTHONS={';'.join(more.values())}"]
            ),
        )
        (built,) = (folder / "built").iterdir()
        built = relabel(built, local, version, tags, folder)
        run(
            *(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", folder / "repaired"),
            *(f"--exclude={library}" for library in EXCLUDED),
            built,
        )
        (repaired,) = (folder / "repaired").iterdir()
        with zipfile.ZipFile(repaired) as archive:
            archive.extractall(folder / "content")
        package = folder / "content" / "torch_spe"
        if sorted(p.name for p in (folder / "content").iterdir() if "dist-info" not in p.name) != [
            "torch_spe"
        ]:
            raise Error("auditwheel copied libraries into the wheel")
        check_libraries(sorted(package.glob("*.so")), torch_lib, cuda)
        if not cuda and platform.system() == "Linux":
            check_loads_without_cuda(package, torch_lib, folder / "cpu")
        for index, (python, tag, _, _) in enumerate(found):
            site = find_torch(python, version, cuda and torch.version.cuda)
            if site is None:
                print(f"wheel: {tag} is compiled, and not run: {python} has no torch {version}")
                continue
            try_out(repaired, python, site, folder / f"trial{index}")
            print(f"wheel: {tag} is installed and run")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(repaired, out))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cuda", action="store_true", help="with the CUDA kernels; needs nvcc")
    parser.add_argument(
        "--python", action="append", default=[], metavar="PYTHON",
        help="another Python to serve, or a folder with its headers; may be repeated",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--source", type=Path, default=ROOT, help="another source tree")
    arguments = parser.parse_args()
    try:
        wheel = build(arguments.source, arguments.out, arguments.python, arguments.cuda)
    except Error as error:
        print(f"wheel: {error}", file=sys.stderr)
        return 1
    print(f"built and tried: {wheel} ({wheel.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
