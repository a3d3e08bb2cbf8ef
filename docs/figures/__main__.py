"""Make the figures of the pages that the library itself draws: `python docs/figures`.

Pictures of trained models are not among them: the examples make those.
"""

import argparse
from pathlib import Path

import benchmarks
import choice
import method
from style import set_style

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    images = Path(__file__).resolve().parents[1] / "images"
    parser.add_argument("--out", type=Path, default=images, help="folder of the pictures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    set_style()
    for part in (method, choice, benchmarks):
        part.draw(out)
