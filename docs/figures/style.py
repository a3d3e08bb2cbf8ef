"""How the figures of the pages look: as wide as a page, readable on a phone."""

import io

import matplotlib as mpl
from PIL import Image

mpl.use("Agg")
from matplotlib import pyplot as plt

WIDTH = 6.4  # inches; 832 pixels
BLUE, ORANGE, GREEN, RED, GREY = "#1f6fb4", "#e0862c", "#2e8b57", "#c0392b", "#7a7f87"


def set_style():
    plt.rcdefaults()
    plt.rcParams.update(
        {
            "figure.dpi": 130,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, GREY]),
            "legend.frameon": False,
            "legend.fontsize": 9,
            "image.interpolation": "nearest",
        }
    )


def save(figure, folder, name):
    """Write a small picture that depends on nothing but the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer)
    plt.close(figure)
    picture = Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    picture.save(folder / f"{name}.png", optimize=True)
