"""Every task by its name, with its presets."""

from __future__ import annotations

from lra import listops
from lra.presets import Preset

TASKS: dict[str, dict[str, Preset]] = {"listops": listops.PRESETS}
