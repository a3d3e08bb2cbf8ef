"""The chorale example: tokens, windows, bins, and a training loop that learns."""

import dataclasses
import json
import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from music.chorales import data
from music.chorales.model import DEMO, ENCODINGS, ChoraleModel, load_model
from music.chorales.training import bin_means, evaluate, nll, train

# Soprano to bass, onset, end and pitch; a repeated note, a rest between notes and at the end.
VOICES = [
    [(0, 4, 72), (4, 8, 72), (8, 12, 74)],
    [(0, 2, 67), (2, 4, 65), (6, 12, 64)],
    [(0, 12, 60)],
    [(0, 1, 36), (1, 8, 48)],
]


def piece(length, seed=0):
    """A made-up chorale in which each voice repeats a pattern of four sixteenths."""
    pattern = np.random.default_rng(seed).integers(1, data.VOCABULARY, 16)
    tokens = torch.from_numpy(np.resize(pattern, length))
    return data.Chorale(f"piece {seed}", tokens, seed)


def test_tokens_go_back_to_notes():
    tokens = data.encode(VOICES)
    assert tokens.shape == (12 * 4,)
    assert data.decode(tokens) == VOICES
    first, second = tokens[:4], tokens[4:8]
    # Three voices hold; the bass strikes a new note.
    assert first.tolist() == [data.FIRST_PITCH + p - data.LOWEST for p in (72, 67, 60, 36)]
    assert second.tolist() == [data.HOLD] * 3 + [data.FIRST_PITCH + 12]
    assert tokens[4 * 4 + 1] == data.REST


def test_times_off_the_grid_are_sampled():
    triplet = [(Fraction(0), Fraction(4, 3), 60), (Fraction(4, 3), Fraction(8, 3), 62)]
    short = [(Fraction(0), Fraction(1), 60), (Fraction(5, 4), Fraction(7, 4), 61)]
    voices = data.decode(data.encode([triplet, short, [], []]))
    assert voices == [[(0, 2, 60), (2, 3, 62)], [(0, 1, 60)], [], []]


def test_pitch_outside_the_compass_is_refused():
    with pytest.raises(ValueError, match=r"pitch must be within 36\.\.81, got 82"):
        data.encode([[(0, 1, 82)], [], [], []])


def test_a_score_becomes_its_notes():
    m21 = pytest.importorskip("music21")
    tune = "4/4 c'4 d'8~ d'16 e'16 r4 f'4"
    score = m21.stream.Score([m21.converter.parse(f"tinyNotation: {tune}") for _ in range(4)])
    notes = data.notes_of(score)
    assert notes[0] == [(0, 4, 72), (4, 7, 74), (7, 8, 76), (12, 16, 77)]
    assert data.decode(data.encode(notes)) == notes


def test_a_chorale_of_the_corpus():
    corpus = pytest.importorskip("music21").corpus
    path = next(p for p in corpus.getComposer("bach") if p.name == "bwv269.mxl")
    tokens = data.parse(str(path))
    soprano = data.decode(tokens)[0]
    # "Aus meines Herzens Grunde", an upbeat: G, then G D B A, the half note dotted.
    assert [pitch for _, _, pitch in soprano[:5]] == [67, 67, 74, 71, 69]
    again = data.encode(data.decode(tokens))
    assert (again == tokens[: len(again)]).all()


def test_load_parses_once(tmp_path, monkeypatch):
    pytest.importorskip("music21")
    from music21 import corpus

    chosen = [p for p in corpus.getComposer("bach") if p.name in ("bwv269.mxl", "bwv1.6.mxl")]
    monkeypatch.setattr(corpus, "getComposer", lambda name: chosen)
    first = data.load(tmp_path, processes=1)
    monkeypatch.setattr(corpus, "getComposer", lambda name: pytest.fail("parsed again"))
    second = data.load(tmp_path)
    # bwv1.6 is left out: horns double the voices.
    assert [p.name for p in first] == [p.name for p in second] == ["bwv269.mxl"]
    assert torch.equal(first[0].tokens, second[0].tokens)


def test_transposed_pieces_are_a_family():
    generator = np.random.default_rng(0)
    melody = [generator.integers(45, 70, 20).tolist() for _ in range(8)]

    def tokens(four, shift=0):
        return data.encode(
            [[(4 * i, 4 * i + 4, p + shift) for i, p in enumerate(voice)] for voice in four]
        )

    family = data.families([tokens(melody[:4]), tokens(melody[4:]), tokens(melody[:4], 3)])
    assert family[0] == family[2] != family[1]


def test_split_keeps_families_together_and_tests_long_pieces():
    pieces = [piece(100 if i % 2 else 40, seed=i) for i in range(60)]
    for i in range(0, 60, 6):
        pieces[i + 1].family = pieces[i].family = pieces[i + 3].family
    parts = data.split(pieces, length=64, held_out=8)
    family = {name: {p.family for p in part} for name, part in parts.items()}
    assert not family["train"] & family["test"]
    assert not family["train"] & family["valid"]
    assert not family["valid"] & family["test"]
    for name in ("valid", "test"):
        assert len(parts[name]) == 8
        assert all(len(p.tokens) > 64 for p in parts[name])
    assert [p.name for p in parts["test"]] == [p.name for p in data.split(pieces, 64, 8)["test"]]
    with pytest.raises(ValueError, match="too few pieces of more than 99 tokens"):
        data.split(pieces, length=99, held_out=30)


def test_windows_start_at_a_soprano_within_a_piece():
    # Token = 4 * number of the piece + voice; the first piece is too short for a window.
    pieces = [
        data.Chorale("", torch.arange(4).repeat(n // 4) + 4 * i, i)
        for i, n in enumerate((12, 16, 24))
    ]
    windows = data.Windows(pieces, 12)
    assert windows.starts.tolist() == [0, 16, 20, 24]
    batch = windows.sample(64, torch.Generator().manual_seed(0))
    assert batch.shape == (64, 13)
    assert (batch % 4 == torch.arange(13) % 4).all()
    assert (batch // 4 == batch[:, :1] // 4).all()
    assert set(batch[:, 0].tolist()) == {4, 8}
    assert data.beginnings(pieces, 15).shape == (2, 16)
    with pytest.raises(
        ValueError, match="length must be less than the longest piece's tokens, got 24"
    ):
        data.Windows(pieces, 24)


def test_bin_means():
    values = torch.tensor([[1.0, 3.0, 5.0, 7.0, 9.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    assert bin_means(values, [0, 2, 5]) == [1.5, 4.0]
    assert bin_means(values, [4, 5]) == [5.0]
    values[0, 0] = math.nan
    assert bin_means(values, [0, 2, 5]) == [pytest.approx(5 / 3), 4.0]
    for edges in ([0, 6], [2, 1], [0, 0, 5], [-1, 3]):
        with pytest.raises(ValueError, match=r"edges must rise within 0\.\.5"):
            bin_means(values, edges)


def test_nll_is_of_the_next_token():
    table = torch.randn(data.VOCABULARY, data.VOCABULARY).log_softmax(-1)
    tokens = torch.randint(data.VOCABULARY, (2, 7))
    got = nll(lambda x: table[x], tokens)
    assert torch.allclose(got, -table[tokens[:, :-1], tokens[:, 1:]])


@pytest.mark.parametrize("name", ENCODINGS)
def test_models_are_causal(name):
    torch.manual_seed(0)
    model = ChoraleModel(ENCODINGS[name]).eval()
    tokens = torch.randint(data.VOCABULARY, (1, 40))
    changed = tokens.clone()
    changed[:, 30:] = (changed[:, 30:] + 1) % data.VOCABULARY
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :30], after[:, :30], atol=1e-5)
    assert not torch.allclose(before[:, 30:], after[:, 30:], atol=1e-5)


@pytest.mark.parametrize("name", ENCODINGS)
def test_training_learns_and_repeats(name):
    encoding = dataclasses.replace(ENCODINGS[name], lr=3e-3)
    windows = data.Windows([piece(200, seed=1)], 32)
    reports = []
    for _ in range(2):
        torch.manual_seed(0)
        model = ChoraleModel(encoding)
        reports.append(train(model, encoding, windows, 6, batch=4, progress=False))
    losses = reports[0].losses
    assert losses == reports[1].losses
    assert losses[0] == pytest.approx(np.log(data.VOCABULARY), abs=0.6)
    assert losses[-1] < losses[0] - 0.3
    assert reports[0].tokens_per_second > 0
    values = evaluate(model, windows.sample(3, torch.Generator().manual_seed(0)))
    assert values.shape == (3, 32)
    assert torch.isfinite(values).all()
    assert values.mean() < losses[0]


def test_the_demo_trains_some_of_the_models():
    from music.chorales.train import parse_arguments

    assert parse_arguments([]).models == list(DEMO)
    assert set(DEMO) < set(ENCODINGS)
    assert parse_arguments(["--models", *ENCODINGS]).models == list(ENCODINGS)


def test_the_command(tmp_path, monkeypatch, capsys):
    from music.chorales import train as command

    monkeypatch.setattr(data, "load", lambda: [piece(100, seed=i) for i in range(60)])
    flags = "--steps 1 --batch 1 --length 16 --test-length 64 --models rotary spe-features"
    command.main([*flags.split(), "--out", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["ranges"] == [0, 16, 32, 64]
    # The second has a row for each number of realizations in the test.
    assert [row["model"] for row in result["rows"]] == ["rotary", "spe-features", "spe-features"]
    assert "R = 256" in result["rows"][2]["label"]
    assert all(len(row["nll"]) == 3 for row in result["rows"])
    assert (tmp_path / "chorales_nll.png").stat().st_size > 0
    assert (tmp_path / "chorales_templates.png").stat().st_size > 0
    assert "SineSPE on the features" in capsys.readouterr().out
    model, settings = load_model(tmp_path / "rotary.pt")
    assert (settings["model"], settings["steps"], settings["seed"]) == ("rotary", 1, 0)
    assert settings["train_nll"] == result["rows"][0]["train_nll"]
    values = evaluate(model, data.beginnings(data.split(data.load(), 64)["test"], 64))
    assert bin_means(values, [0, 16, 32, 64]) == pytest.approx(result["rows"][0]["nll"], rel=1e-4)
    # Templates of layers with a decay show it; a default run has rows for the four models.
    command.main([*flags.split()[:-3], "--out", str(tmp_path / "demo")])
    result = json.loads((tmp_path / "demo" / "result.json").read_text())
    assert [row["model"] for row in result["rows"]] == list(DEMO)
    assert (tmp_path / "demo" / "chorales_templates.png").stat().st_size > 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command.main(["--steps", "0"])
    assert "--steps must be at least 1" in capsys.readouterr().err
