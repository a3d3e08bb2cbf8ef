"""The music example: tokens and MIDI, measures, pictures and sound, training and continuing."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

symusic = pytest.importorskip("symusic")
pytest.importorskip("miditok")

from music import compare, generate, measures, model, sound  # noqa: E402
from music import train as command  # noqa: E402
from music.chorales import data  # noqa: E402
from music.chorales.model import ENCODINGS, ChoraleModel, save_model  # noqa: E402
from music.chorales.training import train  # noqa: E402
from music.pieces import Excerpts, Objective, Piece, Pieces, beginnings, midi_folder  # noqa: E402
from music.presets import COMPARED, POSITIONS, PRESETS, Preset  # noqa: E402
from music.tokens import FourParts, Remi, load_tokens, save_tokens  # noqa: E402

pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures("one_thread")]

TINY = Preset("", 32, 1, 16, 2, 32, 2, 2, 1e-3, transpose=0)


def score_of(pitches, program=0, drums=False, bars=4):
    """A note a quarter, pitches again and again; a drum on every other beat if asked for."""
    score = symusic.Score(480)
    score.time_signatures.append(symusic.TimeSignature(0, 4, 4))
    score.tempos.append(symusic.Tempo(0, 120))
    track = symusic.Track("tune", program)
    for beat in range(4 * bars):
        track.notes.append(symusic.Note(480 * beat, 480, pitches[beat % len(pitches)], 80))
    score.tracks.append(track)
    if drums:
        beats = symusic.Track("drums", 0, True)
        for beat in range(0, 4 * bars, 2):
            beats.notes.append(symusic.Note(480 * beat, 120, 38, 100))
        score.tracks.append(beats)
    return score


def notes(score):
    """Every note's track, drums apart, onset, duration and pitch, in quarters."""
    return sorted(
        (t.is_drum, t.program, n.time / score.tpq, n.duration / score.tpq, n.pitch)
        for t in score.tracks for n in t.notes
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Four readable files, one of them twice, and one that is no MIDI."""
    files = tmp_path / "midi"
    (files / "more").mkdir(parents=True)
    for i in range(4):
        score_of([60 + i, 64 + i, 67 + i], 10 * i, drums=True, bars=12).dump_midi(
            files / f"{i}.mid"
        )
    (files / "more" / "again.MIDI").write_bytes((files / "0.mid").read_bytes())
    (files / "broken.mid").write_bytes(b"MThd nothing that anybody can read")
    (files / "notes.txt").write_text("not MIDI")
    return files


# ---- tokens


def test_chorales_go_to_midi_and_back(tmp_path):
    voices = [[(0, 4, 72), (4, 8, 72)], [(0, 2, 67), (6, 8, 64)], [(0, 8, 60)], [(1, 8, 48)]]
    tokens = torch.from_numpy(data.encode(voices).astype(np.int64))
    four = FourParts()
    score = four.write(tokens)
    score.dump_midi(tmp_path / "a.mid")
    assert four.read(symusic.Score(tmp_path / "a.mid")).equal(tokens)
    assert [track.name for track in score.tracks] == ["Soprano", "Alto", "Tenor", "Bass"]
    assert four.time(tokens, 16) == 1
    with pytest.raises(ValueError, match="tracks must be the 4 voices, got 1 of them"):
        four.read(score_of([60]))


def test_music21_reads_what_is_written(tmp_path):
    converter = pytest.importorskip("music21").converter
    voices = [[(0, 4, 72), (4, 8, 74)], [(0, 8, 67)], [(0, 8, 60)], [(0, 2, 48), (2, 8, 50)]]
    tokens = torch.from_numpy(data.encode(voices).astype(np.int64))
    FourParts().write(tokens).dump_midi(tmp_path / "a.mid")
    read = converter.parse(tmp_path / "a.mid")
    assert len(read.parts) == 4
    assert data.notes_of(read) == voices


@pytest.mark.parametrize("programs", [True, False])
def test_midi_goes_to_remi_and_back(programs, tmp_path):
    remi = Remi(programs)
    score = score_of([60, 62, 71], 40, drums=True)
    tokens = remi.read(score)
    again = remi.write(tokens)
    expected = notes(score)
    if not programs:  # one piano, without the drums
        expected = [(False, 0, *rest) for drum, _, *rest in expected if not drum]
    assert notes(again) == expected
    assert remi.read(again).equal(tokens)
    assert len(remi.bars(tokens)) == 4
    assert remi.time(tokens, int(remi.bars(tokens)[1])) == pytest.approx(3, abs=0.2)
    save_tokens(remi, tmp_path)
    same = load_tokens(tmp_path)
    assert same.read(score).equal(tokens)
    assert (same.size, same.programs) == (remi.size, programs)
    with pytest.raises(ValueError, match="there must be notes, got none"):
        remi.read(symusic.Score(480))


@pytest.mark.parametrize("tokens", [FourParts(), Remi()], ids=["chorales", "remi"])
def test_shifts_are_transpositions(tokens):
    if tokens.kind == "remi":
        score = score_of([60, 64], 5, drums=True)
    else:
        score = tokens.write(
            torch.from_numpy(data.encode([[(0, 16, p)] for p in (72, 67, 60, 48)]).astype("int64"))
        )
    sequence = tokens.read(score)
    moved = tokens.write(tokens.shifts(3)[sequence])
    up = [(*n[:4], n[4] + (0 if n[0] else 3)) for n in notes(score)]
    assert notes(moved) == up
    assert tokens.shifts(0).equal(torch.arange(tokens.size))
    assert (tokens.shifts(2) == -1).sum() == 2
    assert (tokens.shifts(-2) == -1).sum() == 2


# ---- pieces


def test_a_folder_of_midi_names_what_it_leaves_out(folder, capsys):
    pieces = midi_folder(folder, Remi(), progress=False)
    assert [len(part) for part in (pieces.train, pieces.valid, pieces.test)] == [2, 1, 1]
    said = capsys.readouterr().out
    assert "left out broken.mid: " in said
    assert f"left out {Path('more') / 'again.MIDI'}: the same music as 0.mid" in said
    assert said.count("left out") == 2
    for name in ("1.mid", "2.mid"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="three files to train, choose and test with, got 2"):
        midi_folder(folder, Remi(), progress=False)
    empty = folder / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="--midi must be a folder with MIDI files, got none in"):
        midi_folder(empty, Remi(), progress=False)


def test_excerpts_start_at_bars_and_are_padded_and_transposed():
    remi = Remi()
    long = remi.read(score_of([60, 64, 67], bars=20))
    short = remi.read(score_of([62], bars=1))
    excerpts = Excerpts([Piece("long", long), Piece("short", short)], 40, remi, transpose=2)
    windows = excerpts.sample(1000, torch.Generator().manual_seed(0))
    assert windows.shape == (1000, 41)
    assert (windows[:, 0] == long[0]).all()
    padded = (windows == remi.padding).any(1)
    assert 0 < padded.sum() < 300
    # Every shift occurs, and moves nothing but pitches.
    rows = [remi.shifts(k)[long[:41]] for k in range(-2, 3)]
    found = [any(row.equal(window) for window in windows) for row in rows]
    assert found == [True] * 5
    losses = Objective(remi.padding)(lambda x: torch.zeros(*x.shape, remi.size), windows)
    assert losses[padded].isnan().any(1).all()
    assert not losses[~padded].isnan().any()
    with pytest.raises(ValueError, match="length must be less than the longest piece's tokens"):
        Excerpts([Piece("", torch.zeros(8, dtype=torch.int64))], 8, FourParts())
    rows = beginnings([Piece("", long), Piece("", short)], 40, remi.padding)
    assert rows.shape == (2, 41)
    assert beginnings([Piece("", short)], 40, None).shape == (0, 41)


# ---- measures


def test_measures_of_known_music():
    # One pitch class; then all 12 as often.
    one = measures.notes_of(score_of([60, 72]))
    assert measures.pitch_class_entropy(one) == 0
    twelve = measures.notes_of(score_of(list(range(60, 72)), drums=True, bars=3))
    assert measures.pitch_class_entropy(twelve) == pytest.approx(math.log2(12))
    assert math.isnan(measures.pitch_class_entropy(one[:0]))
    same = measures.describe(one, 0, 16)
    assert same == {
        "pitch_class_entropy": 0, "grooving_similarity": 1, "notes_per_quarter": 1
    }  # fmt: skip
    # Two bars of which one is silent: 4 of 64 parts differ.
    half = measures.between(one, 0, 4)
    assert measures.describe(half, 0, 8)["grooving_similarity"] == 1 - 4 / 64
    assert measures.describe(half, 0, 8)["notes_per_quarter"] == 0.5
    assert math.isnan(measures.describe(half, 0, 4)["grooving_similarity"])


def test_overlap_of_known_music():
    low, high, mixed = (
        measures.histograms([measures.notes_of(score_of(p))]) for p in ([60], [61], [60, 61])
    )
    assert set(measures.overlap(low, low).values()) == {1.0}
    shared = measures.overlap(low, high)
    assert (shared["pitch"], shared["pitch_class"]) == (0, 0)
    assert (shared["duration"], shared["onset_interval"], shared["interval"]) == (1, 1, 1)
    assert measures.overlap(low, mixed)["pitch"] == 0.5
    assert low["duration"].argmax() == 4  # sixteenths
    assert low["onset_interval"].argmax() == 4


# ---- sound and pictures


def test_sound_has_sound(tmp_path):
    pytest.importorskip("midirenderer")
    if sound.find_soundfont() is None:
        pytest.skip(sound.ADVICE)
    score_of([60, 67], bars=1).dump_midi(tmp_path / "a.mid")
    assert sound.write_wav(tmp_path / "a.mid", tmp_path / "a.wav") is None
    import wave

    with wave.open(str(tmp_path / "a.wav")) as file:
        rate, samples = file.getframerate(), np.frombuffer(file.readframes(10**9), np.int16)
        assert 2 < file.getnframes() / rate < 20
    assert (samples[: 2 * rate].astype(float) ** 2).mean() ** 0.5 > 100


def test_without_a_soundfont_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(sound, "find_soundfont", lambda: None)
    said = sound.write_wav(tmp_path / "a.mid", tmp_path / "a.wav")
    assert "timgm6mb-soundfont" in said
    assert not (tmp_path / "a.wav").exists()


def test_the_prompt_has_bars_with_notes():
    remi, score = Remi(), score_of([60, 62], bars=6)
    later = symusic.Score(480)
    later.time_signatures, later.tempos = score.time_signatures, score.tempos
    later.tracks.append(score.tracks[0].shift_time(2 * 4 * 480))
    prompt = generate.first_bars(remi, remi.read(later), 3)
    assert notes(remi.write(prompt)) == [n for n in notes(later) if n[2] < 20]
    assert generate.first_bars(remi, remi.read(score), 99).equal(remi.read(score))


# ---- models and commands


@pytest.mark.parametrize("name", POSITIONS)
def test_models_go_on_from_their_state(name):
    torch.manual_seed(0)
    preset = Preset("", 16, 2, 16, 2, 32, 1, 1, 1e-3, position=name)
    music = model.make_model(preset, 20).eval()
    tokens = torch.randint(20, (2, 12))
    with torch.no_grad():
        whole = music(tokens)
        first, state = music(tokens[:, :7], state=music.initial_state(2))
        second, state = music(tokens[:, 7:8], state=state)
        third, state = music(tokens[:, 8:], state=state)
    assert torch.allclose(torch.cat((first, second, third), 1), whole, atol=1e-5)
    assert state.position == 12


def test_presets_are_the_papers():
    piano, groove = PRESETS["piano"], PRESETS["groove"]
    assert (piano.length, piano.layers, piano.width, piano.heads) == (2048, 24, 512, 8)
    assert (groove.length, piano.sines, groove.sines) == (512, 5, 8)
    assert POSITIONS["paper"].attention(piano)["num_sines"] == 5
    assert POSITIONS["conv"].attention(piano)["kernel_size"] == 128
    assert command.preset_of(command.parse_arguments([])) == PRESETS["chorales"]
    assert set(COMPARED) < set(POSITIONS)


def test_an_interrupted_training_goes_on(tmp_path):
    from music.chorales.model import Encoding

    tokens = torch.arange(400) % data.VOCABULARY
    excerpts = Excerpts([Piece("", tokens)], 16, FourParts(), transpose=1)
    losses = []
    for stop in (None, 3):
        torch.manual_seed(0)
        music = model.make_model(TINY, data.VOCABULARY)
        calls = []

        def objective(net, windows, stop=stop, calls=calls):
            calls.append(0)
            if len(calls) - 1 == stop:
                raise KeyboardInterrupt
            return Objective(None)(net, windows)

        options = {
            "steps": 6, "batch": 2, "lr": 1e-2, "progress": False,
            "checkpoint": tmp_path / f"{stop}.pt", "every": 2,
        }  # fmt: skip
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                train(music, Encoding("", lr=1e-2), excerpts, objective=objective, **options)
            assert (tmp_path / f"{stop}.pt").exists()
            torch.manual_seed(1)
            music = model.make_model(TINY, data.VOCABULARY)
        report = train(music, Encoding("", lr=1e-2), excerpts, objective=Objective(None), **options)
        losses.append(report.losses)
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_from_a_folder_of_midi_to_a_continuation(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command.PRESETS, "small", TINY)
    out = command.main(["--midi", str(folder), "--out", str(tmp_path / "model"), "--pieces", "0"])
    settings = json.loads((out / "settings.json").read_text())
    assert settings["ranges"] == [0, 32, 64, 128]
    assert all(math.isfinite(value) for value in settings["nll"])
    assert not list(out.glob("checkpoint*"))
    monkeypatch.setattr(generate, "write_wav", lambda midi, wav, font: "no sound")
    user = tmp_path / "my tune.v2.mid"
    score_of([50, 57], 24, bars=6).dump_midi(user)
    flags = ["--model", str(out), "--out", str(tmp_path / "out"), "--tokens", "150"]
    (written,) = generate.main([*flags, "--midi", str(user), "--bars", "3"])
    assert written.name == "my tune.v2-continued.mid"
    assert written.with_suffix(".png").stat().st_size > 0
    # The prompt is there as it was, and goes on.
    read = notes(symusic.Score(written))
    prompt = [n for n in notes(score_of([50, 57], 24, bars=6)) if n[2] < 12]
    assert set(prompt) <= set(read)
    assert "no sound" in capsys.readouterr().out
    (held_out,) = generate.main([*flags, "--pieces", "1"])
    assert held_out.exists()
    twice = generate.main([*flags, "--midi", str(user), str(user)])
    assert [file.name for file in twice] == [
        "my tune.v2-continued.mid", "my tune.v2-continued-2.mid"
    ]  # fmt: skip
    with pytest.raises(SystemExit, match=r"--midi: .*broken.mid cannot be read"):
        generate.main([*flags, "--midi", str(folder / "broken.mid")])
    with pytest.raises(SystemExit):
        generate.main(["--model", str(tmp_path)])
    assert "--model: no model in" in capsys.readouterr().err


def test_the_model_of_the_demo_is_taken(tmp_path, monkeypatch, capsys):
    demo = tmp_path / "exact-decay.pt"
    preset = dataclasses.replace(TINY, lr=8e-3)
    torch.manual_seed(0)
    chorale = ChoraleModel(ENCODINGS["exact-decay"])
    trained = {
        "model": "exact-decay", "steps": 2, "batch": 2, "length": 32, "test_length": 128,
        "lr": 8e-3, "seed": 0, "train_nll": 3.0, "tokens_per_second": 1.0,
    }  # fmt: skip
    save_model(demo, chorale, trained)
    parts = [[Piece(f"{i}", torch.arange(200) % 40)] for i in range(3)]
    monkeypatch.setattr(command, "DEMO", demo)
    monkeypatch.setattr(command, "chorales", lambda length: Pieces("", FourParts(), *parts))
    monkeypatch.setitem(command.PRESETS, "chorales", preset)
    flags = ["--out", str(tmp_path / "model"), "--pieces", "0"]
    out = command.main(flags)
    assert f"the demo trained is taken, {demo}" in capsys.readouterr().out
    taken = model.load(out)
    prompt = torch.arange(8)[None]
    new = chorale.eval().generate(prompt, 5, temperature=0)
    assert torch.equal(taken.model.generate(prompt, 5, temperature=0), new)
    assert taken.settings["train_nll"] == 3
    command.main([*flags, "--retrain"])
    assert "is taken" not in capsys.readouterr().out
    assert "demo" not in model.load(out).settings
    pieces = Pieces("", FourParts(), *parts)
    for other in ({"steps": 1}, {"length": 16}, {"lr": 1e-3}, {"position": "rotary"}):
        changed = dataclasses.replace(preset, **other)
        assert command.take_from_demo(changed, pieces, 0, "cpu") is None
    assert command.take_from_demo(preset, pieces, 1, "cpu") is None  # another seed
    monkeypatch.setattr(command, "DEMO", tmp_path / "nothing.pt")
    assert command.take_from_demo(preset, pieces, 0, "cpu") is None


def test_the_comparison(tmp_path, monkeypatch, capsys):
    def piece(seed):
        pattern = np.random.default_rng(seed).integers(10, 30, 16)
        return Piece(f"{seed}", torch.from_numpy(np.resize(pattern, 520)))

    pieces = Pieces(
        "Made up", FourParts(), *([piece(3 * i + j) for j in range(3)] for i in (0, 1, 2))
    )
    monkeypatch.setitem(command.PRESETS, "chorales", TINY)
    monkeypatch.setattr(compare, "load_pieces", lambda options, preset: pieces)
    flags = ["--positions", "fading", "softmax", "--length", "64", "--out", str(tmp_path)]
    compare.main([*flags, "--samples", "1"])
    result = json.loads((tmp_path / "results.json").read_text())
    assert [row["label"] for row in result["rows"]] == [
        POSITIONS["fading"].label, POSITIONS["softmax"].label, compare.HELD_OUT
    ]  # fmt: skip
    for row in result["rows"]:
        assert {len(values) for values in row["music"].values()} == {7}
    assert all(0 <= share <= 1 for share in result["rows"][0]["music"]["in_compass"])
    assert (tmp_path / "music_compared.png").stat().st_size > 0
    assert len((tmp_path / "table.md").read_text().splitlines()) == 5
    # What was run is not run again.
    monkeypatch.setattr(compare, "fit", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr(compare, "draw", lambda *args: None)
    compare.main([*flags, "--samples", "1"])
    assert capsys.readouterr().out.count("| held-out pieces |") == 2
