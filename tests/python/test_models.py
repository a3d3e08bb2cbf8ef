"""Models of torch_spe.models: pieces and generation are the whole, prompts of several lengths."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from helpers import assert_close

from torch_spe.models import ModelConfig, ModelState, SPECausalLM, SPESequenceClassifier

pytestmark = pytest.mark.cpu_only
CONFIG = ModelConfig(50, d_model=32, num_layers=2, num_heads=2)
KINDS = [{}, {"position": "sine"}, {"position": "rotary"}, {"num_key_value_heads": 1}]


def make_model(attention=None, **options):
    torch.manual_seed(0)
    config = ModelConfig(50, d_model=32, num_layers=2, num_heads=2, attention=attention or {})
    return SPECausalLM(dataclasses.replace(config, **options)).eval()


@pytest.mark.parametrize("attention", KINDS, ids=str)
def test_pieces_are_the_whole(attention):
    model = make_model(attention)
    tokens = torch.randint(50, (3, 20))
    with torch.no_grad():
        whole = model(tokens)
        first, state = model(tokens[:, :13], state=model.initial_state(3))
        second, state = model(tokens[:, 13:], state=state)
    assert state.position == 20
    assert_close(torch.cat((first, second), 1), whole, torch.float32)


@pytest.mark.parametrize("attention", KINDS, ids=str)
def test_greedy_generation_is_what_the_whole_predicts(attention):
    model = make_model(attention)
    prompt = torch.randint(50, (2, 7))
    new = model.generate(prompt, 12, temperature=0)
    with torch.no_grad():
        predicted = model(torch.cat((prompt, new), 1)).argmax(-1)
    assert torch.equal(predicted[:, 6:-1], new)


def test_prompts_of_different_lengths_are_as_alone():
    model = make_model()
    prompts = [torch.randint(50, (n,)) for n in (1, 9, 4)]
    together = model.generate(prompts, 8, temperature=0)
    for one, new in zip(prompts, together, strict=True):
        assert torch.equal(model.generate(one[None], 8, temperature=0)[0], new)


def test_draws_repeat_and_stay_among_the_likeliest():
    model = make_model()
    prompt = torch.randint(50, (4, 5))
    seeded = [
        model.generate(prompt, 6, top_k=3, generator=torch.Generator().manual_seed(7))
        for _ in range(2)
    ]
    assert torch.equal(*seeded)
    with torch.no_grad():
        logits = model(torch.cat((prompt, seeded[0]), 1))[:, 4:-1]
    assert (logits.topk(3).indices == seeded[0][..., None]).any(-1).all()
    assert torch.equal(
        model.generate(prompt, 6, top_p=1e-6), model.generate(prompt, 6, temperature=0)
    )
    few = model.generate(prompt, 200, top_p=0.5)
    with torch.no_grad():
        ordered = model(torch.cat((prompt, few), 1))[:, 4:-1].softmax(-1)
    chosen = ordered.gather(-1, few[..., None])
    more_likely = (ordered * (ordered > chosen)).sum(-1)
    assert (more_likely < 0.5 + 1e-5).all()


def test_sequences_end_at_stop():
    model = make_model()
    prompt = torch.randint(50, (3, 5))
    free = model.generate(prompt, 20, temperature=0)
    stop = int(free[0, 2])
    ended = model.generate(prompt, 20, temperature=0, stop=stop)
    for row, expected in zip(ended, free, strict=True):
        places = (expected == stop).nonzero()
        end = int(places[0]) + 1 if len(places) else len(row)
        assert torch.equal(row[:end], expected[:end])
        assert (row[end:] == stop).all()


def test_state_has_one_size():
    model = make_model()
    state, sizes = model.initial_state(1), set()
    with torch.inference_mode():
        for _ in range(3):
            _, state = model(torch.randint(50, (1, 40)), state=state)
            sizes.add(sum(s.sums.numel() + s.denominators.numel() for s in state.layers))
    assert len(sizes) == 1
    assert isinstance(state.reorder(torch.tensor([0, 0])), ModelState)
    assert state.clone().detach().to("cpu").position == 120


def test_saved_models_load_in_another_process(tmp_path):
    model = make_model({"position": "exact", "decay": "learned"}, share_position=True)
    prompt = torch.arange(5)[None]
    model.save(tmp_path / "model.pt")
    program = (
        "import sys, torch; from torch_spe.models import SPECausalLM\n"
        "model = SPECausalLM.load(sys.argv[1]).eval()\n"
        "print(model.generate(torch.arange(5)[None], 9, temperature=0)[0].tolist())"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "model.pt"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert out.stdout.strip() == str(model.generate(prompt, 9, temperature=0)[0].tolist())


def test_saved_models_keep_their_type(tmp_path):
    model = make_model().bfloat16()
    model.save(tmp_path / "model.pt")
    loaded = SPECausalLM.load(tmp_path / "model.pt").eval()
    assert loaded.embedding.weight.dtype == torch.bfloat16
    prompt = torch.arange(5)[None]
    new = [m.generate(prompt, 5, temperature=1e-40) for m in (model, loaded)]
    assert torch.equal(*new)


def test_models_learn():
    torch.manual_seed(0)
    model = SPECausalLM(CONFIG)
    tokens = torch.arange(64)[None].expand(4, -1) % 7
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]
    new = model.eval().generate(torch.arange(10)[None] % 7, 50, temperature=0)
    assert torch.equal(new[0], torch.arange(10, 60) % 7)


def test_classifier_leaves_padding_out():
    model = SPESequenceClassifier(dataclasses.replace(CONFIG, num_classes=3)).eval()
    tokens = torch.randint(50, (2, 12))
    padding = torch.tensor([[False] * 12, [False] * 5 + [True] * 7])
    with torch.no_grad():
        out = model(tokens, padding)
        assert_close(out[1:], model(tokens[1:, :5]), torch.float32)
        tokens[1, 5:] = 0
        assert torch.equal(model(tokens, padding), out)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.generate(torch.zeros(1, 0, dtype=torch.int64), 3), "prompt"),
        (lambda model: model.generate([], 3), "prompt"),
        (lambda model: model.generate([torch.zeros(2)], 3), "prompt"),
        (lambda model: model.generate(torch.zeros(1, 2, dtype=torch.int64), 0), "steps"),
        (lambda model: model.generate(torch.zeros(1, 2, dtype=torch.int64), 3, top_k=0), "top_k"),
        (lambda model: model.generate(torch.zeros(1, 2, dtype=torch.int64), 3, top_p=0), "top_p"),
        (
            lambda model: model.generate(torch.zeros(1, 2, dtype=torch.int64), 3, temperature=-1),
            "temperature",
        ),
        (lambda model: model(torch.zeros(2, 3)), "tokens"),
        (lambda model: model(torch.zeros(1, 2, dtype=torch.int64), state=3), "state"),
        (
            lambda model: model(
                torch.zeros(1, 2, dtype=torch.int64), start=3, state=model.initial_state(1)
            ),
            "start",
        ),
        (lambda model: model.generate(torch.zeros(1, 2, dtype=torch.int64), 3, stop=50), "stop"),
        (lambda model: model.generate(torch.zeros(1, 2, dtype=torch.int64), 3, stop="a"), "stop"),
        (lambda model: SPESequenceClassifier(CONFIG), "num_classes"),
        (lambda model: SPECausalLM(3), "config"),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(make_model())
