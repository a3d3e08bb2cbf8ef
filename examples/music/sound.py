"""Sound of a MIDI file: midirenderer plays it with a SoundFont that a package ships."""

from __future__ import annotations

import importlib.util
from itertools import chain
from pathlib import Path

# Where Debian, Fedora and Arch put them; the smaller ones are as good for looking in.
FOLDERS = ("/usr/share/sounds/sf2", "/usr/share/soundfonts", "/usr/local/share/soundfonts")
ADVICE = (
    "no sound was written: a SoundFont is missing. Install the Debian package "
    "timgm6mb-soundfont or fluid-soundfont-gm, or pretty_midi (pip), which brings one, or name a "
    "file with --soundfont"
)


def find_soundfont() -> Path | None:
    """A General MIDI SoundFont of this machine, or None."""
    fonts = chain.from_iterable(sorted(Path(folder).glob("*.sf2")) for folder in FOLDERS)
    package = importlib.util.find_spec("pretty_midi")
    shipped = Path(package.origin).with_name("TimGM6mb.sf2") if package else None
    candidates = chain(fonts, [shipped] if shipped else [])
    return next((font for font in candidates if font.exists()), None)


def write_wav(midi: Path, wav: Path, soundfont: Path | None = None) -> str | None:
    """Play the file `midi` into `wav`; where that cannot be done, return what to do about it."""
    soundfont = soundfont or find_soundfont()
    if soundfont is None:
        return ADVICE
    if importlib.util.find_spec("midirenderer") is None:
        return "no sound was written: pip install midirenderer (or .[music] of torch_spe)"
    from midirenderer import render_wave_from

    wav.write_bytes(render_wave_from(soundfont.read_bytes(), midi.read_bytes()))
    return None
