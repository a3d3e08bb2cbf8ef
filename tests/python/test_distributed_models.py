"""Models whose sequence is cut over ranks: the mean over tokens, and caches."""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers import error
from ranks import run_on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.functional import cross_entropy

from torch_spe.distributed import SPESequenceParallel
from torch_spe.models import ModelConfig, SPESequenceClassifier

pytestmark = pytest.mark.cpu_only
CUT = (0, 5, 12)  # where the ranks' tokens begin and end


def parallel(module, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(module, mesh, SPESequenceParallel(**options))


def own(tokens):
    """This rank's tokens."""
    return tokens[:, CUT[dist.get_rank()] : CUT[dist.get_rank() + 1]]


def classifier(dtype=torch.float64):
    torch.manual_seed(1)
    config = ModelConfig(16, d_model=16, num_layers=2, num_heads=2, num_classes=3)
    return SPESequenceClassifier(config).to(dtype).eval()


def compare_classifier():
    """Logits of all tokens on every rank; averages over ranks of gradients are those of one."""
    torch.manual_seed(2)
    tokens, labels = torch.randint(16, (2, CUT[-1])), torch.tensor([0, 2])
    padding = torch.arange(CUT[-1]) >= torch.tensor([[CUT[-1]], [3]])  # also all of a rank's
    reference = classifier()
    model = parallel(copy.deepcopy(reference))
    for mask in (None, padding, padding.double().masked_fill(padding, -torch.inf)):
        expected = reference(tokens, mask)
        out = model(own(tokens), None if mask is None else own(mask))
        assert error(out, expected) < 1e-12
        for logits in (expected, out):
            cross_entropy(logits, labels).backward()
        for a, b in zip(model.parameters(), reference.parameters(), strict=True):
            if b.grad is not None:
                dist.all_reduce(a.grad)
                assert error(a.grad / 2, b.grad) < 1e-10
        model.zero_grad()
        reference.zero_grad()
    # One graph, and types in which a count has rounding.
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert error(fast(own(tokens)), reference(tokens)) < 1e-12
    half = parallel(classifier(torch.bfloat16))
    assert error(half(own(tokens)), classifier()(tokens)) < 0.05


def compare_transformers():
    """A default call has no cache; one that is asked for is refused, with what to do."""
    from torch_spe.hf import SPECache, SPEConfig, SPEForCausalLM, SPEForSequenceClassification

    torch.manual_seed(1)
    options = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2}
    config = SPEConfig(**options, num_attention_heads=2, num_labels=3)
    torch.manual_seed(1)
    tokens = torch.randint(16, (2, CUT[-1]))
    reference = SPEForCausalLM(config).eval()
    expected = reference(tokens)
    assert expected.cache is not None
    model = parallel(copy.deepcopy(reference))
    out = model(own(tokens))
    assert out.cache is None
    assert error(out.logits, own(expected.logits)) < 1e-5
    assert error(model(own(tokens), use_cache=False).logits, out.logits) == 0
    for cache in ({"use_cache": True}, {"cache": SPECache(config)}):
        with pytest.raises(ValueError, match="use_cache=False, where a sequence is cut over ranks"):
            model(own(tokens), **cache)
    with pytest.raises(ValueError, match="attention_mask must have no padding where a sequence"):
        model(own(tokens), torch.arange(own(tokens).shape[1]).expand(2, -1) > 0)
    # Labels of a rank's last token are the next rank's. Masked ones count for no rank.
    for labels in (tokens, tokens.masked_fill(tokens > 9, -100)):
        reference.zero_grad()
        expected = reference(tokens, labels=labels)
        expected.loss.backward()
        model.zero_grad()
        loss = model(own(tokens), labels=own(labels)).loss
        loss.backward()
        dist.all_reduce(loss.detach())
        assert error(loss / 2, expected.loss) < 1e-5
        for a, b in zip(model.parameters(), reference.parameters(), strict=True):
            dist.all_reduce(a.grad)
            assert error(a.grad / 2, b.grad) < 1e-4
    reference = SPEForSequenceClassification(SPEConfig(**options, num_labels=3)).eval()
    model = parallel(copy.deepcopy(reference))
    assert error(model(own(tokens)).logits, reference(tokens).logits) < 1e-5


def test_mean_over_the_tokens_of_all_ranks(tmp_path):
    run_on_ranks(compare_classifier, 2, tmp_path)


def test_models_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    run_on_ranks(compare_transformers, 2, tmp_path)
