"""torch_spe.hf: models for transformers, their cache, and Llama-like models made linear."""

import copy
import os
import re
from pathlib import Path

import pytest
import torch
from helpers import assert_close

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="needs transformers 5.24 or later")

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    LlamaConfig,
)

import torch_spe  # noqa: E402
import torch_spe.hf.cache as caches  # noqa: E402
from torch_spe.hf import (  # noqa: E402
    SPECache,
    SPEConfig,
    SPEForCausalLM,
    linearize,
    load_linearized,
)
from torch_spe.models import ModelConfig, SPECausalLM  # noqa: E402

pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures("one_thread")]
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def make_config(**options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return SPEConfig(**{"vocab_size": 50, **sizes, **options})


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(make_config(**options)).eval()


def make_llama(config=LlamaConfig, attention=None, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None}
    model = AutoModelForCausalLM.from_config(config(**sizes, **heads, **options)).eval()
    return model if attention is None else linearize(model, **attention)


def make_tokens(*shape):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(1))


def assert_greedy(model, prompt, new):
    """Every token is the likeliest one after those before, in one pass over all."""
    with torch.no_grad():
        logits = model(new, use_cache=False).logits
    assert torch.equal(logits[:, prompt.shape[1] - 1 : -1].argmax(-1), new[:, prompt.shape[1] :])


def test_the_package_imports_no_transformers():
    package = Path(torch_spe.__file__).parent
    for file in package.rglob("*.py"):
        if file.parent != package / "hf":
            found = re.search(
                r"^\s*(from|import) (transformers|torch_spe\.hf)", file.read_text(), re.M
            )
            assert not found, file


KINDS = [{}, {"position": "sine"}, {"position": "conv"}, {"position": "paper", "decay": "data"}]
KINDS.append({"position": "rotary", "num_key_value_heads": 1})


@pytest.mark.parametrize("attention", KINDS, ids=str)
def test_greedy_generation_is_what_the_whole_predicts(attention):
    model, prompt = make_model(attention=attention), make_tokens(2, 7)
    assert_greedy(model, prompt, model.generate(prompt, **GREEDY))


def test_models_of_both_kinds_are_the_same():
    torch.manual_seed(0)
    config = ModelConfig(50, d_model=32, num_layers=2, num_heads=2, attention={"position": "exact"})
    spe = SPECausalLM(config).eval()
    model, prompt = SPEForCausalLM.from_spe(spe, eos_token_id=3), make_tokens(2, 9)
    assert torch.equal(model(prompt).logits, spe(prompt))
    assert torch.equal(model.to_spe()(prompt), spe(prompt))
    assert model.lm_head.weight is model.model.embedding.weight
    assert model.config.eos_token_id == 3
    new = model.generate(prompt, eos_token_id=None, **GREEDY)
    assert torch.equal(new[:, 9:], spe.generate(prompt, 12, temperature=0))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    model, tokens = make_model(attention={"position": "sine"}), make_tokens(1, 6)
    padded, mask = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)
    padded[0], mask[0] = make_tokens(9), 1
    place = slice(3, 9) if side == "left" else slice(0, 6)
    padded[1, place], mask[1, place] = tokens[0], 1
    alone = model(tokens).logits
    for options in ({"use_cache": False}, {}):
        both = model(padded, attention_mask=mask, **options).logits
        assert_close(both[1:, place], alone, torch.float32)
    if side == "left":
        new = model.generate(padded, attention_mask=mask, **GREEDY)
        assert torch.equal(new[1:, 9:], model.generate(tokens, **GREEDY)[:, 6:])
        unused = model.generate(padded, attention_mask=mask, use_cache=False, **GREEDY)
        assert torch.equal(unused, new)


@pytest.mark.parametrize("linear", [False, True])
def test_a_mask_of_one_token_at_a_time(linear):
    attention = {"position": "sine"}
    model = make_llama(attention=attention) if linear else make_model(attention=attention)
    tokens, mask = make_tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :3] = 0
    outs, cache = [], SPECache(model.config)
    with torch.no_grad():
        for n in range(9):
            outs.append(
                model(tokens[:, n : n + 1], attention_mask=mask[:, : n + 1], cache=cache).logits
            )
        out = torch.cat(outs, 1)
        assert_close(out[:1], model(tokens[:1], use_cache=False).logits, torch.float32)
        assert_close(out[1:, 3:], model(tokens[1:, 3:], use_cache=False).logits, torch.float32)
    state = cache.layers[1].recurrent_states[2]
    assert state.tolist() == [9, 6]


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"num_beams": 2, "do_sample": 1}]
)
def test_beams_and_draws_are_those_without_a_cache(options):
    model, prompt = make_model(), make_tokens(2, 5)
    options["do_sample"] = bool(options.get("do_sample"))
    news = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        news.append(model.generate(prompt, max_new_tokens=8, use_cache=use_cache, **options))
    assert torch.equal(*news)


ASSISTED = {
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 3},
    "another": lambda: {"assistant_model": make_model(seed=1)},
    "the same": lambda: {"assistant_model": make_model()},
    "Llama": lambda: {"assistant_model": make_llama()},
    "a linear Llama": lambda: {"assistant_model": make_llama(attention={})},
}


@pytest.mark.parametrize("kind", ASSISTED)
@pytest.mark.parametrize("linear", [False, True])
def test_assisted_decoding_gives_the_greedy_tokens(kind, linear, monkeypatch):
    monkeypatch.setattr(caches, "KEPT", 25)
    model = make_llama(attention={"position": "sine"}) if linear else make_model()
    prompt = make_tokens(1, 10).repeat(1, 2)
    options = {"do_sample": False, "max_new_tokens": 25}
    new = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, **options, **ASSISTED[kind]()), new)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 24}, {"assistant_model": None}])
def test_drafts_may_be_longer_than_what_is_kept_of_a_prompt(options, monkeypatch):
    monkeypatch.setattr(caches, "KEPT", 4)
    model, prompt = make_model(), make_tokens(1, 9).repeat(1, 4)
    plain = {"do_sample": False, "max_new_tokens": 40}
    if "assistant_model" in options:
        draft = make_model(seed=1)
        draft.generation_config.num_assistant_tokens = 12
        draft.generation_config.assistant_confidence_threshold = 0
        options = {"assistant_model": draft}
        with pytest.raises(
            ValueError, match=r"between -4 and 0.* cache=SPECache\(config, kept=n\)"
        ):
            model.generate(prompt, **plain, **options)
        options["cache"] = SPECache(model.config, kept=14)
    new = model.generate(prompt, **plain, **options)
    assert torch.equal(new, model.generate(prompt, **plain))


def test_a_cropped_cache_is_that_of_the_tokens_that_are_left(monkeypatch):
    monkeypatch.setattr(caches, "KEPT", 6)
    model, tokens = make_model(attention={"position": "sine"}), make_tokens(2, 20)

    def read(*lengths, cache=None, start=0):
        cache = SPECache(model.config) if cache is None else cache
        for length in lengths:
            out = model(tokens[:, start : start + length], cache=cache).logits
            start += length
        return cache, out

    with torch.no_grad():
        cache = SPECache(model.config)
        cache.activate_past_recording()
        read(10, 1, cache=cache)  # of the 10 the last 6 are kept
        cache.crop(-2)
        cache.crop(-3)
        assert cache.get_seq_length() == 6
        cache, out = read(5, cache=cache, start=6)
        assert_close(out, read(6, 5)[1], torch.float32)
        with pytest.raises(ValueError, match="tokens_to_remove must be between -5 and 0"):
            cache.crop(-6)
        with pytest.raises(ValueError, match="tokens_to_remove"):
            cache.crop(1)
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 1]))
        out = model(tokens[1:, 10:].expand(2, -1), cache=cache).logits
        assert_close(out, read(10, 10)[1][1:].expand(2, -1, -1), torch.float32)
        cache.crop(0)
        with pytest.raises(ValueError, match="between 0 and 0"):
            cache.crop(-1)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert_close(read(20, cache=cache)[1], read(20)[1], torch.float32)
        plain = DynamicCache()  # becomes one of states
        read(10, 1, cache=plain)
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            plain.crop(-1)


def states_of(layer):
    return layer.recurrent_states.values()


def test_the_cache_has_one_size_and_place():
    model, cache, sizes, addresses = make_model(), None, set(), set()
    with torch.inference_mode():
        for length in (1, 40, 7):
            cache = model(make_tokens(1, length), cache=cache).cache
            sizes.add(sum(s.numel() for x in cache.layers for s in states_of(x)))
            addresses.add(tuple(s.data_ptr() for x in cache.layers for s in states_of(x)))
            assert not any(x._window for x in cache.layers)
    assert len(sizes) == len(addresses) == 1
    assert cache.get_seq_length() == 48


def test_generation_goes_on_from_a_cache():
    model, prompt = make_model(attention={"position": "conv"}), make_tokens(1, 9)
    whole = model.generate(prompt, do_sample=False, max_new_tokens=20)
    first = model.generate(
        prompt,
        do_sample=False,
        max_new_tokens=8,
        return_dict_in_generate=True,
        prefill_chunk_size=4,
    )
    assert first.cache.get_seq_length() == 16
    for cache in (copy.deepcopy(first.cache), first.cache):
        new = model.generate(first.sequences, do_sample=False, max_new_tokens=12, cache=cache)
        assert torch.equal(new, whole)


def test_saved_models_load(tmp_path):
    model = make_model(attention={"position": "exact", "decay": "fixed", "num_sines": 3})
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert AutoConfig.from_pretrained(tmp_path).attention == model.config.attention
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    prompt = make_tokens(2, 9)
    assert torch.equal(loaded.eval()(prompt).logits, model(prompt).logits)
    for (name, one), two in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert one.shape == two.shape, name  # states of optimizers fit
    body = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(body(prompt)[0], model.model(prompt)[0])
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert half.model.layers[0].self_attn.position.freqs.dtype == torch.float32
    assert half.generate(prompt, **GREEDY).shape == (2, 21)
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert classifier.score.weight.std() > 0.01
    assert torch.equal(classifier.model.embedding.weight, model.lm_head.weight)


def test_initialization_is_that_of_the_library():
    torch.manual_seed(0)
    spe = SPECausalLM(ModelConfig(50, d_model=32, num_layers=1, num_heads=2))
    model = make_model(num_hidden_layers=1)
    for name, parameter in spe.named_parameters():
        if name != "head.weight":
            other = model.model.get_parameter(name)
            stds = [x.std(unbiased=False).item() for x in (other, parameter)]
            assert stds == pytest.approx([stds[1]] * 2, rel=0.6), name


def test_from_the_meta_device():
    """What docs/precision.md says of them."""
    config = make_config(vocab_size=500)
    for values in ("init_weights", "tie_weights"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        if values == "init_weights":
            model.to_empty(device="cpu")
        else:
            weights = AutoModelForCausalLM.from_config(config).state_dict()
            model.load_state_dict(weights, assign=True)
        getattr(model, values)()
        assert model.lm_head.weight is model.model.embedding.weight
        assert model.lm_head.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
        for layer in model.model.layers:
            assert torch.equal(layer.self_attn.out_proj.bias, torch.zeros(32))


def test_checkpoints_have_the_same_gradients():
    tokens, gradients = make_tokens(2, 20), []
    model = make_model(attention={"position": "sine"}).train()
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(5)  # of the noise
        out = model(tokens, attention_mask=mask, labels=tokens)
        assert out.cache is None
        gradients.append(torch.autograd.grad(out.loss, list(model.parameters())))
    for one, two in zip(*gradients, strict=True):
        assert_close(one, two, torch.float32)


def test_packed_sequences_do_not_see_each_other():
    tokens = make_tokens(1, 12)
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    for model in (make_model(), make_llama(attention={})):
        alone = [
            model(tokens[:, part], use_cache=False).logits for part in (slice(5), slice(5, 12))
        ]
        for options in ({"position_ids": positions}, {"cu_seq_lens_q": bounds}):
            packed = model(tokens, use_cache=False, **options).logits
            assert_close(packed, torch.cat(alone, 1), torch.float32)
    model = make_model()
    packed = model(tokens, cu_seq_lens_q=bounds)
    assert packed.cache is None
    alone = [model(tokens[:, part]).logits for part in (slice(5), slice(5, 12))]
    assert_close(packed.logits, torch.cat(alone, 1), torch.float32)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        model(tokens, cu_seq_lens_q=bounds, cache=SPECache(model.config))
    with pytest.raises(ValueError, match="cache must be None with sequences packed"):
        model(tokens, position_ids=positions, cache=SPECache(model.config))
    for options in ({"position_ids": positions}, {"cu_seq_lens_q": bounds}):
        with pytest.raises(ValueError, match="use_cache=False"):
            make_llama(attention={})(tokens, **options)


@pytest.mark.parametrize("linear", [False, True])
def test_packed_sequences_with_padding_are_as_alone(linear):
    model = make_llama(attention={}) if linear else make_model()
    tokens, mask = make_tokens(1, 16), torch.ones(1, 16, dtype=torch.int64)
    mask[:, :2] = mask[:, 14:] = 0
    positions = torch.tensor([[0, 0, *range(5), *range(7), 0, 0]])
    with torch.no_grad():
        packed = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for part in (slice(2, 7), slice(7, 14)):
            alone = model(tokens[:, part], use_cache=False).logits
            assert_close(packed[:, part], alone, torch.float32)
        # Positions of one sequence that is padded on the left: no bounds.
        positions = torch.tensor([[0, 0, *range(14)]])
        mask[:, 14:] = 1
        left = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        alone = model(tokens[:, 2:], use_cache=False).logits
        assert_close(left[:, 2:], alone, torch.float32)


def test_the_former_name_of_a_cache():
    model, tokens = make_model(), make_tokens(2, 12)
    cache = SPECache(model.config)
    with torch.no_grad():
        parts = [
            model(tokens[:, p], past_key_values=cache).logits for p in (slice(5), slice(5, 12))
        ]
        assert_close(torch.cat(parts, 1), model(tokens).logits, torch.float32)


def train(model, folder, steps, **options):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    data = [{"input_ids": (torch.arange(24) + i) % 7} for i in range(16)]
    for row in data:
        row["labels"] = row["input_ids"]
    arguments = transformers.TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        logging_steps=5, save_steps=10, report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    return trainer


@pytest.mark.parametrize("linear", [False, True])
def test_a_trainer_trains(linear, tmp_path):
    make = (lambda: make_llama(attention={})) if linear else make_model
    trainer = train(make(), tmp_path, 30, activation_checkpointing=not linear)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.3 < losses[0]
    model = trainer.model.eval()
    prompt = torch.arange(10)[None] % 7
    new = model.generate(prompt, do_sample=False, max_new_tokens=20)
    assert torch.equal(new[0], torch.arange(30) % 7)
    if not linear:  # goes on where a checkpoint was written
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-10")
        again = train(loaded, tmp_path, 12)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
        assert again.state.global_step == 12


@pytest.mark.parametrize("kind", ["model", "linear", "classifier"])
def test_a_trainer_evaluates_and_predicts(kind, tmp_path):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    if kind == "classifier":
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(make_config(num_labels=3)).eval()
    else:
        model = make_llama(attention={}) if kind == "linear" else make_model()
    tokens, mask = make_tokens(5, 8), torch.ones(5, 8, dtype=torch.int64)
    mask[1, :3] = 0
    labels = torch.arange(5) % 3 if kind == "classifier" else tokens.masked_fill(mask == 0, -100)
    data = [
        {"input_ids": x, "attention_mask": m, "labels": y}
        for x, m, y in zip(tokens, mask, labels, strict=True)
    ]
    arguments = transformers.TrainingArguments(
        tmp_path, per_device_eval_batch_size=3, use_cpu=True, report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, eval_dataset=data,
        compute_metrics=lambda found: {"right": (found.predictions.argmax(-1) == 0).mean()},
    )  # fmt: skip
    with torch.no_grad():
        options = {} if kind == "classifier" else {"use_cache": False}
        parts = [
            model(tokens[p], attention_mask=mask[p], labels=labels[p], **options)
            for p in (slice(3), slice(3, 5))
        ]
    metrics = trainer.evaluate()
    expected = (3 * parts[0].loss + 2 * parts[1].loss) / 5
    if kind == "classifier":
        assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-4)
    assert 0 < metrics["eval_loss"] < 10
    assert 0 <= metrics["eval_right"] <= 1
    predicted = trainer.predict(data)
    assert predicted.label_ids.shape == labels.shape
    logits = torch.from_numpy(predicted.predictions)
    expected = torch.cat([part.logits for part in parts])
    kept = torch.ones(5, dtype=torch.bool) if kind == "classifier" else mask.bool()
    assert_close(logits[kept], expected[kept], torch.float32)


def test_a_classifier():
    torch.manual_seed(0)
    config = make_config(num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    tokens, mask = make_tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[1, 5:] = 0
    out = model(tokens, attention_mask=mask, labels=torch.tensor([0, 2]))
    assert_close(out.logits[1:], model(tokens[1:, :5]).logits, torch.float32)
    expected = torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 2]))
    assert_close(out.loss, expected, torch.float32)
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 50
    with torch.no_grad():
        first = [model.model(x, attention_mask=mask)[0][0, 0] for x in (tokens, changed)]
    assert not torch.equal(*first)  # both directions


@pytest.mark.parametrize("config", ["Llama", "Qwen3", "Mistral"])
def test_linearized_models_generate(config, tmp_path):
    options = {"sliding_window": None} if config == "Mistral" else {}
    model = make_llama(getattr(transformers, f"{config}Config"), {"position": "sine"}, **options)
    prompt = make_tokens(2, 9)
    new = model.generate(prompt, **GREEDY)
    assert_greedy(model, prompt, new)
    if config != "Llama":
        return
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[:, :3] = 0
    left = torch.cat((prompt[:, :3], prompt), 1)
    padded = model.generate(left, attention_mask=mask, **GREEDY)
    assert torch.equal(padded[:, 12:], new[:, 9:])
    assert torch.equal(copy.deepcopy(model).generate(prompt, **GREEDY), new)
    model.generation_config.eos_token_id = int(new[0, 12])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_linearized(tmp_path)
    assert loaded.generation_config.eos_token_id == int(new[0, 12])
    assert torch.equal(loaded.generate(prompt, eos_token_id=None, **GREEDY), new)
    model.set_attn_implementation("sdpa")
    plain = make_llama()
    assert torch.equal(model(prompt).logits, plain(prompt).logits)
    assert_greedy(plain, prompt, model.generate(prompt, eos_token_id=None, **GREEDY))


def test_linearized_attention_is_that_of_the_layers():
    attention = make_llama(attention={"position": "fading"}).model.layers[0].self_attn
    layer = make_model(
        hidden_size=32, num_attention_heads=4, attention={"num_key_value_heads": 2}
    ).model.layers[0].self_attn  # fmt: skip
    with torch.no_grad():
        names = ("q_proj", "k_proj", "v_proj")
        weights = [getattr(attention, name).weight for name in names]
        layer.in_proj_weight.copy_(torch.cat(weights))
        layer.in_proj_bias.zero_()
        layer.out_proj.weight.copy_(attention.o_proj.weight)
        layer.out_proj.bias.zero_()
        for name in ("position", "filter", "decay"):
            getattr(layer, name).load_state_dict(getattr(attention.torch_spe, name).state_dict())
        x = torch.randn(2, 11, 32)
        unrotated = torch.ones(1, 11, 8), torch.zeros(1, 11, 8)
        out, _ = attention(x, position_embeddings=unrotated)
        assert_close(out, layer(x, x, x, is_causal=True)[0], torch.float32)


def test_errors(tmp_path):
    model, tokens = make_model(), make_tokens(1, 5)
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="attention_mask must be one of padding"):
        model(tokens, attention_mask=torch.ones(1, 1, 5, 5))
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model()
    with pytest.raises(ValueError, match="cache_implementation must be None"):
        model.generate(tokens, max_new_tokens=3, cache_implementation="static")
    llama = make_llama()
    filled = llama(tokens).cache
    with pytest.raises(TypeError, match="keys and values in layer 0"):
        model(tokens, cache=filled)
    with pytest.raises(TypeError, match="must be an SPECache"):
        model(tokens, cache=transformers.StaticCache(llama.config, max_cache_len=9))
    with pytest.raises(TypeError, match="attention must hold what JSON can"):
        make_config(attention={"feature_map": torch.relu})
    with pytest.raises(TypeError, match="linearize: attention must hold what JSON can"):
        linearize(make_llama(), feature_map=torch.relu)
    for name, value, message in (
        ("position", "exact", "pass attention="),
        ("num_sines", 3, "pass attention="),
        ("kernel_size", 3, "pass attention="),
        ("d_model", 64, "has the name 'hidden_size'"),
        ("hidden_size", 3.5, "hidden_size must be an integer"),
        ("vocab_size", 0, "vocab_size must be an integer"),
        ("attention", {"num_heads": 3}, "must not have 'num_heads'"),
        ("attention", {"device": "cpu"}, "must not have 'device'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_config(**{name: value})
    with pytest.raises(TypeError, match="attention must be a mapping"):
        make_config(attention="exact")
    assert make_config(attention=None).attention == {}
    with pytest.raises(ValueError, match="kept must be an integer"):
        SPECache(model.config, kept=0)
    with pytest.raises(ValueError, match="share_position"):
        SPEConfig.from_model_config(ModelConfig(50, share_position=True))
    with pytest.raises(ValueError, match="is_causal"):
        make_model(is_causal=False)
    with pytest.raises(ValueError, match="attention modules"):
        linearize(model)
    with pytest.raises(ValueError, match="linearized already"):
        linearize(make_llama(attention={}))
    llama.set_attn_implementation("torch_spe")
    with pytest.raises(ValueError, match="needs positions"):
        llama(tokens)
    windowed = make_llama(transformers.MistralConfig, {})
    with pytest.raises(ValueError, match="no sliding_window"):
        windowed(tokens)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a linearized model"):
        load_linearized(tmp_path)
