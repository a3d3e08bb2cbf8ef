"""Models of torch_spe.models: pieces and generation are the whole, prompts of several lengths."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from helpers import assert_close
from test_reset_parameters import reset_every_module
from torch import nn

from torch_spe import SineSPE
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


def test_a_prefix_serves_at_another_place():
    model = make_model({"position": "exact", "decay": "learned"})
    tokens = torch.randint(50, (2, 12))
    by = torch.tensor([1000, -7])
    with torch.no_grad():
        _, state = model(tokens[:, :9], state=model.initial_state(2))
        moved = model.shift(state, by)
        _, expected = model(tokens[:, :9], state=model.initial_state(2, start=by))
        assert moved.position.tolist() == expected.position.tolist() == [1009, 2]
        for one, two in zip(moved.layers, expected.layers, strict=True):
            assert_close(one.sums, two.sums, torch.float32)
        rest = [model(tokens[:, 9:], state=s)[0] for s in (moved, expected)]
        assert_close(*rest, torch.float32)
        assert_close(rest[0], model(tokens)[:, 9:], torch.float32)
    with pytest.raises(ValueError, match="cannot be moved to other positions"):
        make_model({"position": "sine"}).shift(make_model({"position": "sine"}).initial_state(1), 3)
    with pytest.raises(ValueError, match="state must be one of 2 layers"):
        model.shift(ModelState(state.layers[:1]), 3)


@pytest.mark.parametrize("attention", [{}, {"position": "sine"}, {"position": "conv"}], ids=str)
def test_packed_sequences_with_padding_are_as_alone(attention):
    model, tokens = make_model(attention), torch.randint(50, (1, 20))
    bounds = torch.tensor([0, 8, 13, 20])
    padding = torch.zeros(1, 20, dtype=torch.bool)
    padding[:, 6:8] = padding[:, 17:] = True
    with torch.no_grad():
        packed = model(tokens, padding, cu_seqlens=bounds)
        for part in (slice(0, 6), slice(8, 13), slice(13, 17)):
            assert_close(packed[:, part], model(tokens[:, part]), torch.float32)
        changed = tokens.masked_fill(padding, 3)
        assert torch.equal(model(changed, padding, cu_seqlens=bounds)[~padding], packed[~padding])
        state = model.initial_state(3)
        out, state = model(tokens, state=state, cu_seqlens=bounds)
        assert state.position.tolist() == [8, 5, 7]
        assert_close(out, model(tokens, cu_seqlens=bounds), torch.float32)
    with pytest.raises(ValueError, match="leave padding out of packed"):
        model(tokens, padding, state=state, cu_seqlens=bounds)


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


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"attention": {"feature_map": torch.relu}}, "feature_map"),
        ({"attention": {"position": SineSPE}}, "position"),
        ({"attention": {"position": SineSPE(2, 16, noise="exact")}}, "position"),
        ({"activation": lambda x: x.relu()}, "activation"),
    ],
)
def test_what_cannot_be_saved_says_so(options, name, tmp_path):
    with pytest.raises(TypeError, match=f"data .* got {name}="):
        make_model(**options).save(tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())
    torch.save({"weights": 3}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="path must be a file that save has written"):
        SPECausalLM.load(tmp_path / "other.pt")


def tied_from_meta():
    config = ModelConfig(64, d_model=64, num_layers=1, num_heads=2)
    with torch.device("meta"):
        return config, nn.ModuleDict({"lm": SPECausalLM(config)})


def assert_tied(model, config):
    assert model.head.weight is model.embedding.weight
    keys = SPECausalLM(config).state_dict().keys()
    assert model.state_dict().keys() == keys
    assert len([*model.parameters()]) == len(keys) - 1
    assert model.embedding.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert model.embedding.weight.requires_grad


@pytest.mark.parametrize("recurse", [False, True])
def test_a_tied_embedding_from_the_meta_device(recurse):
    config, models = tied_from_meta()
    if recurse:
        reset_every_module(models.to_empty(device="cpu"))
    else:  # what FSDP1 does
        for part in models.modules():
            if [*part.parameters(recurse=False)]:
                part.to_empty(device="cpu", recurse=False)
                part.reset_parameters()
    assert_tied(models["lm"], config)
    copied = copy.deepcopy(models["lm"])
    assert_tied(copied, config)
    before = models["lm"].embedding.weight.clone()
    copied.head.reset_parameters()
    assert_tied(copied, config)
    assert torch.equal(models["lm"].embedding.weight, before)
    assert_tied(copied.double(), config)


@pytest.mark.parametrize("key", [None, "embedding", "head"])
def test_a_tied_embedding_that_is_assigned(key):
    config, models = tied_from_meta()
    weights = SPECausalLM(config).state_dict()
    if key is not None:  # one of the two names is enough
        weights = {
            name: weight for name, weight in weights.items()
            if not name.startswith(("embedding", "head")) or name.startswith(key)
        }  # fmt: skip
    models.load_state_dict({f"lm.{name}": weights[name] for name in weights}, assign=True)
    assert_tied(models["lm"], config)
    assert torch.equal(models["lm"].head.weight, weights[f"{key or 'head'}.weight"])


def test_an_output_layer_of_ones_own_stays_apart():
    config, models = tied_from_meta()
    model = models["lm"]
    model.head = nn.Linear(64, 64, bias=False, device="meta")
    reset_every_module(models.to_empty(device="cpu"))
    assert model.head.weight is not model.embedding.weight
    model.load_state_dict(SPECausalLM(config).state_dict(), assign=True)
    assert model.head.weight is not model.embedding.weight


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
        floats = torch.zeros(2, 12).masked_fill(padding, -torch.inf)
        assert torch.equal(model(tokens, floats), out)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.generate(torch.zeros(1, 0, dtype=torch.int64), 3), "prompt"),
        (lambda model: model.generate([], 3), "prompt"),
        (lambda model: model.generate(torch.zeros(0, 2, dtype=torch.int64), 3), "prompt"),
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
        (lambda model: make_model(d_model=32.0), "d_model must be an integer >= 1, got 32.0"),
        (lambda model: make_model(num_heads=0), "num_heads"),
        (lambda model: make_model(dim_feedforward=0), "dim_feedforward"),
        (lambda model: SPECausalLM(ModelConfig(50, attention=None)), "attention must be a mapping"),
        (lambda model: make_model({"batch_first": False}), "must not have 'batch_first'"),
        (lambda model: make_model({"dtype": torch.float64}), "must not have 'dtype'"),
        (lambda model: model.shift(3, 3), "state must be a ModelState"),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(make_model())
