"""Prepare a release: check the tree, build and try what would be uploaded, and stop before that.

`make release` calls it. The version is that of VERSION; CHANGELOG.md must have a dated entry for
it, above all others; the tag vVERSION must not exist, or be that of HEAD; the tree must be clean.
Then it builds the source distribution and from that the wheel without CUDA kernels and, with
--cuda, the one that has them (scripts/make_wheel.py, which installs and runs each), and checks
their metadata as the package index would.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make_wheel

ROOT = Path(__file__).resolve().parent.parent


def check_version(version):
    """Return what is wrong with a version: it must be as PEP 440 and Semantic Versioning want."""
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        return [f"VERSION: expected a version such as 1.2.3 or 1.2.3rc1, got {version!r}"]
    return []


def check_changelog(text, version, today):
    """Return what is wrong with the newest entry: `## [1.2.3] - 2026-11-26`, and lines below."""
    entries = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    if not entries:
        return ["CHANGELOG.md: no entry"]
    title, _, body = entries[0].partition("\n")
    match = re.fullmatch(r"\[([^\]]+)\] - (.+)", title.strip())
    if not match or match[1] != version:
        return [f"CHANGELOG.md: the first entry must be [{version}], got {title!r}"]
    problems = []
    try:
        if date.fromisoformat(match[2]) > today:
            problems.append(f"CHANGELOG.md: {match[2]} is in the future")
    except ValueError:
        problems.append(
            f"CHANGELOG.md: expected the date of the release, such as {today}, got {match[2]!r}"
        )
    if not re.search(r"^- ", body, re.MULTILINE):
        problems.append(f"CHANGELOG.md: the entry of {version} is empty")
    older = [re.match(r"\[([^\]]+)\]", entry) for entry in entries[1:]]
    if version in [match[1] for match in older if match]:
        problems.append(f"CHANGELOG.md: two entries for {version}")
    return problems


def git(root, *arguments):
    return subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def check_repository(root, version):
    """Return what is wrong with the work tree and the tag."""
    problems = []
    changed = git(root, "status", "--porcelain").splitlines()
    if changed:
        problems.append(f"the tree has changes that are not committed: {', '.join(changed[:5])}")
    tag = f"v{version}"
    if tag in git(root, "tag", "--list", tag).splitlines():
        tagged = git(root, "rev-parse", f"{tag}^{{commit}}")
        head = git(root, "rev-parse", "HEAD")
        if tagged != head:
            problems.append(
                f"the tag {tag} exists and is another commit ({tagged[:12]}, HEAD is {head[:12]})"
            )
    return problems


def check_release(root, today):
    """Return everything that stands in the way of a release of the tree in `root`."""
    version = (root / "VERSION").read_text().strip()
    return [
        *check_version(version),
        *check_changelog((root / "CHANGELOG.md").read_text(), version, today),
        *check_repository(root, version),
    ]


def build(root, out, pythons, cuda):
    """Build what would be uploaded into `out`; return the paths."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_wheel.run(
            sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", folder, root
        )
        (sdist,) = folder.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            if hasattr(tarfile, "data_filter"):
                archive.extraction_filter = tarfile.data_filter
            archive.extractall(folder)
        (source,) = (path for path in folder.iterdir() if path.is_dir())
        # The one that needs nvcc first: the other takes minutes.
        variants = (True, False) if cuda else (False,)
        wheels = [make_wheel.build(source, out, pythons, variant) for variant in variants]
        copied = out / sdist.name
        copied.write_bytes(sdist.read_bytes())
    make_wheel.run(sys.executable, "-m", "twine", "check", "--strict", copied, *wheels)
    return [copied, *wheels]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="check the tree, and build nothing")
    parser.add_argument("--cuda", action="store_true", help="also a wheel with the CUDA kernels")
    parser.add_argument("--python", action="append", default=[], help="as of scripts/make_wheel.py")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    problems = check_release(ROOT, date.today())
    for problem in problems:
        print(f"release: {problem}", file=sys.stderr)
    if problems:
        return 1
    version = (ROOT / "VERSION").read_text().strip()
    print(f"release: {version} can be built and tagged v{version}", flush=True)
    if arguments.check:
        return 0
    try:
        sdist, *wheels = build(ROOT, arguments.out, arguments.python, arguments.cuda)
    except make_wheel.Error as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    print("release: built, checked and tried; nothing was uploaded. What is left:")
    print(f"  git tag -a v{version} -m 'torch_spe {version}' && git push origin v{version}")
    print(f"  python -m twine upload {sdist}")
    for wheel in wheels:
        print(f"  {wheel.name} beside the tag: PyPI takes no local versions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
