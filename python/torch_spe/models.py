"""Small models of the layers: a causal language model that generates, and a classifier."""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from torch_spe.attention import AttentionState, SPETransformerEncoderLayer
from torch_spe.checks import (
    check_flags,
    check_positive,
    check_tensor,
    is_integer,
)
from torch_spe.initialization import set_reset
from torch_spe.sampling import make_choice, pad_prompts

__all__ = ["ModelConfig", "ModelState", "SPECausalLM", "SPESequenceClassifier"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a model.

    Attributes:
        vocab_size: tokens are 0 ... vocab_size - 1.
        d_model: size of the model.
        num_layers: Transformer layers.
        num_heads: attention heads of each.
        dim_feedforward: size of the hidden layer of the feed-forward parts; default 4 d_model.
        dropout: probability, in the layers.
        activation: of the feed-forward parts, ``"gelu"`` or ``"relu"``.
        tie_embeddings: whether the output layer of a language model is the embedding.
        share_position: whether all layers have one position module.
        attention: everything else that `SPEMultiheadAttention` takes: position, decay ...
        num_classes: of a classifier.
    """

    vocab_size: int
    d_model: int = 256
    num_layers: int = 4
    num_heads: int = 4
    dim_feedforward: int | None = None
    dropout: float = 0.0
    activation: str = "gelu"
    tie_embeddings: bool = True
    share_position: bool = False
    attention: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_classes: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ModelState:
    """What a model remembers of the tokens before; a pytree, of the same size for any length.

    Attributes:
        layers: the state of each layer.
    """

    layers: tuple[AttentionState, ...]

    @property
    def position(self) -> float | Tensor:
        """Position of the next token: a number, of all sequences, or ``[B]``."""
        return self.layers[0].position

    def reorder(self, index: Tensor) -> ModelState:  # [B']
        """Return the states of other sequences; see `AttentionState.reorder`."""
        return self._map(lambda state: state.reorder(index))

    def clone(self) -> ModelState:
        """Return a copy with memory of its own."""
        return self._map(AttentionState.clone)

    def detach(self) -> ModelState:
        """Return the state as a constant for gradients."""
        return self._map(AttentionState.detach)

    def to(self, device: torch.device | str) -> ModelState:
        """Return the state on another device."""
        return self._map(lambda state: state.to(device))

    def _map(self, function: Callable[[AttentionState], AttentionState]) -> ModelState:
        return ModelState(tuple(map(function, self.layers)))


_pytree.register_dataclass(ModelState)
torch.serialization.add_safe_globals([ModelState, ModelConfig])


# Arguments of a layer that are those of the whole model, or that it chooses.
RESERVED = (
    "activation", "batch_first", "d_model", "device", "dim_feedforward", "dropout", "dtype",
    "embed_dim", "kdim", "nhead", "norm_first", "num_heads", "vdim",
)  # fmt: skip


def check_config(owner: str, config: ModelConfig) -> None:
    """Raise unless sizes and options can be; what the layers check is left to them."""
    names = ("vocab_size", "d_model", "num_layers", "num_heads")
    if config.dim_feedforward is not None:
        names += ("dim_feedforward",)
    check_positive(owner, **{name: getattr(config, name) for name in names})
    check_flags(owner, tie_embeddings=config.tie_embeddings, share_position=config.share_position)
    check_attention(owner, config.attention)


def check_attention(owner: str, attention: Mapping[str, object]) -> None:
    """Raise unless `attention` has options of the layers' attention alone."""
    if not isinstance(attention, Mapping):
        raise TypeError(
            f"{owner}: attention must be a mapping of arguments of SPEMultiheadAttention, got "
            f"{attention!r}"
        )
    for name in attention:
        if name in RESERVED:
            raise ValueError(
                f"{owner}: attention must not have {name!r}, which the model has for all of it, "
                f"got {attention[name]!r}"
            )


def check_saved(owner: str, config: ModelConfig) -> None:
    """Raise TypeError for what a file of data cannot hold: functions, classes, modules."""
    values = dataclasses.asdict(dataclasses.replace(config, attention={}))
    for name, value in {**values, **config.attention}.items():
        file = io.BytesIO()
        try:
            torch.save(value, file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except (pickle.PickleError, AttributeError, TypeError):
            raise TypeError(
                f"{owner}: save writes a configuration of data (names, numbers, tensors), got "
                f"{name}={value!r}; write model.state_dict() in its place, and make the model with "
                "the same configuration before loading it"
            ) from None


def ranks_of(layers: Iterable[nn.Module]) -> Any:
    """Return the ranks over which a model's sequences are cut, `SequenceRanks`, or None."""
    attentions = (getattr(layer, "self_attn", None) for layer in layers)
    return next(filter(None, (getattr(x, "_ranks", None) for x in attentions)), None)


def mean_of_tokens(
    layers: Iterable[nn.Module],
    hidden: Tensor,  # [B, N, D]
    kept: Tensor | None,  # [B, N]
) -> Tensor:  # [B, D]
    """Return the mean over a sequence's tokens: those of all ranks where it is cut over some.

    Args:
        layers: of the model, which know the ranks.
        hidden: what the last one gives, normalized.
        kept: False at tokens that are none.
    """
    ranks = ranks_of(layers)
    if kept is None and ranks is None:
        return hidden.mean(1)
    if kept is None:
        kept = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
    kept = kept.unsqueeze(-1)
    hidden = hidden.masked_fill(~kept, 0)
    if ranks is None:
        return hidden.sum(1) / kept.sum(1).clamp(min=1)
    wide = torch.promote_types(hidden.dtype, torch.float32)  # where counts are exact
    total, count = ranks.sum_over_tokens(hidden.sum(1, dtype=wide), kept.sum(1, dtype=wide))
    return (total / count.clamp(min=1)).to(hidden.dtype)


class _Model(nn.Module):
    """Embedding, pre-norm layers and a last norm, to which each model adds its output layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        owner = type(self).__name__
        if not isinstance(config, ModelConfig):
            raise TypeError(f"{owner}: config must be a ModelConfig, got {type(config).__name__}")
        check_config(owner, config)
        self.config = config
        self.embedding: Any = self.make_embedding()
        self.layers: Any = nn.ModuleList(self.make_layers())
        self.norm = nn.LayerNorm(config.d_model)
        self.head = self.make_head()

    def make_embedding(self) -> nn.Module:
        """Make what gives the vectors of tokens; its ``weight`` may be that of the output layer."""
        return nn.Embedding(self.config.vocab_size, self.config.d_model)

    def make_head(self) -> nn.Module:
        """Make the output layer."""
        raise NotImplementedError

    def make_layers(self) -> Iterable[nn.Module]:
        """Make the layers; a subclass may make others, with the same call."""
        config = self.config
        first: Any = None
        for _ in range(config.num_layers):
            layer: Any = SPETransformerEncoderLayer(
                config.d_model, config.num_heads, config.dim_feedforward or 4 * config.d_model,
                config.dropout, config.activation, batch_first=True, norm_first=True,
                **config.attention,
            )  # fmt: skip
            if config.share_position and first is not None:
                layer.self_attn.position = first.self_attn.position
            first = first or layer
            yield layer

    def embed(
        self,
        tokens: Tensor,  # [B, *size]
        start: float | Sequence[float] | Tensor,
    ) -> Tensor:  # [B, *size, d_model]
        """Return the vectors of tokens; a subclass may add to them.

        Args:
            tokens: int64 ``[B, N]``.
            start: position of the first token, or ``[B]``.
        """
        return self.embedding(tokens)

    def hidden(
        self,
        tokens: Tensor,  # [B, N]
        padding: Tensor | None = None,  # [B, N]
        *,
        is_causal: bool = True,
        start: float | Sequence[float] | Tensor = 0,
        **call: Any,
    ) -> Tensor:  # [B, N, d_model]
        """Return what the last layer gives, normalized.

        Args:
            tokens: int64 ``[B, N]``.
            padding: bool ``[B, N]``, True at tokens that are none.
            is_causal: whether a token sees those up to itself only.
            start: position of the first token, or ``[B]``, of each sequence.
            call: ``positions``, ``grid`` or ``cu_seqlens``; see `SPEMultiheadAttention.forward`.
        """
        call |= {"is_causal": is_causal, "start": start}
        return self.norm(self.pass_layers(tokens, padding, **call))

    def pass_layers(
        self,
        tokens: Tensor,  # [B, N]
        padding: Tensor | None,  # [B, N]
        *,
        start: float | Sequence[float] | Tensor = 0,
        **call: object,
    ) -> Tensor:  # [B, N, d_model]
        """Return what the last layer gives, before the last norm; arguments as in `hidden`."""
        x = self.embed(self._check_tokens(tokens), start)
        for number, layer in enumerate(self.layers):
            x = self.pass_layer(number, layer, x, padding, start=start, **call)
        return x

    def pass_layer(
        self,
        number: int,
        layer: nn.Module,
        x: Tensor,  # [B, N, d_model]
        padding: Tensor | None,  # [B, N]
        **call: object,
    ) -> Tensor:  # [B, N, d_model]
        """Pass the input through one layer; a subclass may do it in another way.

        Args:
            number: of the layer, from 0.
            layer: to call.
            x: its input.
            padding: bool ``[B, N]``, True at tokens that are none.
            call: other arguments of `hidden`.
        """
        return layer(x, src_key_padding_mask=padding, **call)

    def _check_tokens(self, tokens: Tensor) -> Tensor:
        owner = type(self).__name__
        check_tensor(owner, "tokens", tokens)
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"{owner}: tokens must be int64 of shape [B, N], got {tokens.dtype} of shape "
                f"{tuple(tokens.shape)}"
            )
        return tokens

    def save(self, path: str | Path) -> None:
        """Write configuration and weights to a file that `load` reads.

        Raises:
            TypeError: the configuration holds a function, a class or a module.
        """
        check_saved(type(self).__name__, self.config)
        config = dataclasses.replace(self.config, attention=dict(self.config.attention))
        torch.save({"config": config, "weights": self.state_dict()}, path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> _Model:
        """Return the model that `save` wrote; nothing but data is read from the file.

        Raises:
            ValueError: the file holds something else.
        """
        saved = torch.load(path, weights_only=True, map_location=device)
        if not isinstance(saved, dict) or saved.keys() != {"config", "weights"}:
            found = f"the keys {list(saved)[:3]}" if isinstance(saved, dict) else type(saved)
            raise ValueError(
                f"{cls.__name__}: path must be a file that save has written, got {path}, which "
                f"holds {found}"
            )
        model = cls(saved["config"]).to(device, saved["weights"]["embedding.weight"].dtype)
        model.load_state_dict(saved["weights"])
        return model


def _tie(head: nn.Linear, embedding: nn.Embedding) -> None:
    """Draw the vectors of tokens so that logits start with a variance of 1; `head` takes them."""
    nn.init.normal_(embedding.weight, std=head.in_features**-0.5)
    head.weight = embedding.weight


class SPECausalLM(_Model):
    """A causal language model: embedding, pre-norm layers, a last norm, logits.

    Args:
        config: sizes and options.

    Raises:
        ValueError, TypeError: a size or an option is not what it must be.

    Example:
        >>> model = SPECausalLM(ModelConfig(vocab_size=100, d_model=64, num_layers=2)).eval()
        >>> tokens = torch.randint(100, (2, 20))
        >>> model(tokens).shape
        torch.Size([2, 20, 100])
        >>> model.generate(tokens, 5).shape
        torch.Size([2, 5])
    """

    def make_head(self) -> nn.Module:
        """Make the output layer."""
        head = nn.Linear(self.config.d_model, self.config.vocab_size, bias=False)
        if self.config.tie_embeddings:
            set_reset(head, _tie, self.embedding)
            _tie(head, self.embedding)
        return head

    def _is_tied(self) -> bool:
        weight = getattr(self.embedding, "weight", None)
        return isinstance(weight, nn.Parameter) and getattr(self.head, "weight", None) is weight

    def _apply(self, *args: Any, **kwargs: Any):
        tied = self._is_tied()
        super()._apply(*args, **kwargs)
        if tied:  # from the meta device each module gets parameters of its own
            self.head.weight = self.embedding.weight
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        names = [f"{prefix}{name}.weight" for name in ("head", "embedding")]
        values = [state_dict[name] for name in names if name in state_dict]
        if values and local_metadata.get("assign_to_params_buffers") and self._is_tied():
            weight = values[0]
            if not isinstance(weight, nn.Parameter):
                weight = nn.Parameter(weight, self.embedding.weight.requires_grad)
            state_dict.update(dict.fromkeys(names, weight))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def forward(
        self,
        tokens: Tensor,  # [B, N]
        padding: Tensor | None = None,  # [B, N]
        *,
        start: float | Sequence[float] | Tensor = 0,
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,  # [S + 1]
    ) -> Tensor | tuple[Tensor, ModelState]:  # [B, N, vocab_size]
        """Compute the logits of the token after each one.

        Args:
            tokens: int64 ``[B, N]``.
            padding: bool ``[B, N]``, True at tokens that are none.
            start: position of the first token, or ``[B]``, of each sequence; see
                `SPEMultiheadAttention.forward`.
            state: of the tokens before, from `initial_state` or an earlier call.
            cu_seqlens: bounds of sequences that are packed in one.

        Returns:
            The logits; with a state, the logits and the next state.
        """
        if state is None:
            return self.head(self.hidden(tokens, padding, start=start, cu_seqlens=cu_seqlens))
        if isinstance(start, (Tensor, Sequence)) or start != 0:
            raise ValueError(
                "SPECausalLM: start must be 0 with a state, which holds the position, got "
                f"{start!r}"
            )
        hidden, state = self._continue(tokens, padding, state, cu_seqlens)
        return self.head(hidden), state

    def _continue(
        self, tokens: Tensor, padding: Tensor | None, state: ModelState, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, ModelState]:
        self._check_state(state)
        x, states = self.embed(self._check_tokens(tokens), state.position), []
        for layer, before in zip(self.layers, state.layers, strict=True):
            x, after = layer(x, src_key_padding_mask=padding, state=before, cu_seqlens=cu_seqlens)
            states.append(after)
        return self.norm(x), ModelState(tuple(states))

    def _check_state(self, state: ModelState) -> None:
        if not isinstance(state, ModelState):
            raise TypeError(
                "SPECausalLM: state must be a ModelState, as initial_state makes it, got "
                f"{type(state).__name__}"
            )
        if len(state.layers) != len(self.layers):
            raise ValueError(
                f"SPECausalLM: state must be one of {len(self.layers)} layers, got "
                f"{len(state.layers)}"
            )

    def initial_state(
        self, batch: int = 1, start: float | Sequence[float] | Tensor = 0
    ) -> ModelState:
        """Return the state before the first token; see `SPEMultiheadAttention.initial_state`."""
        return ModelState(tuple(layer.initial_state(batch, start) for layer in self.layers))

    def shift(self, state: ModelState, by: float | Sequence[float] | Tensor) -> ModelState:
        """Return a state whose tokens lie `by` positions further: a prefix for another place.

        Args:
            state: of this model.
            by: a number of positions, or ``[B]``, of each sequence; see
                `SPEMultiheadAttention.shift`.
        """
        self._check_state(state)
        pairs = zip(self.layers, state.layers, strict=True)
        return ModelState(tuple(layer.shift(before, by) for layer, before in pairs))

    def generate(
        self,
        prompt: Tensor | Sequence[Tensor],  # [B, N], or B of [N_b]
        steps: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        stop: int | None = None,
    ) -> Tensor:  # [B, steps]
        """Continue prompts; see `stream`. Ends early when all sequences have come to `stop`.

        Returns:
            int64, the new tokens, at most `steps` of them; `stop` after a first one.
        """
        options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        new = list(self.stream(prompt, steps, **options, generator=generator, stop=stop))
        return torch.stack(new, dim=1)

    def stream(
        self,
        prompt: Tensor | Sequence[Tensor],  # [B, N], or B of [N_b]
        steps: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        stop: int | None = None,
    ) -> Iterator[Tensor]:  # [B]
        """Continue prompts, in constant time and memory per token.

        The model should be in eval mode, where the noise is fixed.

        Args:
            prompt: int64 ``[B, N]``, or a sequence of 1-D tensors of different lengths, at least
                one token each.
            steps: tokens to generate for each.
            temperature: logits are divided by it; 0 takes the likeliest token.
            top_k: only the k likeliest tokens.
            top_p: only the likeliest tokens whose probabilities together reach p.
            generator: of the draws; default PyTorch's of the device.
            stop: a token that ends a sequence.

        Yields:
            int64 ``[B]``: the next token of each sequence.

        Raises:
            ValueError, TypeError: an argument is not what it must be.
        """
        tokens, lengths = pad_prompts(prompt)
        steps = check_positive("generate", steps=steps)[0]
        if stop is not None and not (is_integer(stop) and 0 <= int(stop) < self.config.vocab_size):
            raise ValueError(
                f"generate: stop must be a token, 0 to {self.config.vocab_size - 1}, got {stop!r}"
            )
        choose = make_choice(temperature, top_k, top_p, generator)
        return self._stream(tokens, lengths, steps, choose, stop)

    @torch.inference_mode()
    def _read(self, tokens: Tensor, lengths: Tensor | None) -> tuple[Tensor, ModelState]:
        """Return the logits after prompts, and the state."""
        padding = None
        if lengths is not None:
            padding = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]
        hidden, state = self._continue(tokens, padding, self.initial_state(len(tokens)), None)
        if lengths is None:
            return self.head(hidden[:, -1]), state
        return self.head(
            hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1]
        ), state

    @torch.inference_mode()
    def _advance(self, token: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        hidden, state = self._continue(token[:, None], None, state, None)
        return self.head(hidden[:, 0]), state

    def _stream(
        self,
        tokens: Tensor,
        lengths: Tensor | None,
        steps: int,
        choose: Callable[[Tensor], Tensor],
        stop: int | None,
    ) -> Iterator[Tensor]:
        logits, state = self._read(tokens, lengths)
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for step in range(steps):
            token = choose(logits)
            if stop is not None:
                token = token.masked_fill(ended, stop)
                ended = ended | (token == stop)
            yield token
            if step + 1 == steps or (stop is not None and bool(ended.all())):
                return
            logits, state = self._advance(token, state)


class SPESequenceClassifier(_Model):
    """Attends in both directions and names the class of a sequence, from the mean over its tokens.

    Where `torch_spe.distributed.SPESequenceParallel` cuts sequences over ranks, the mean is that
    over the tokens of all ranks, and each of them has the same logits.

    Args:
        config: sizes and options; ``num_classes`` is needed.

    Raises:
        ValueError, TypeError: a size or an option is not what it must be.

    Example:
        >>> model = SPESequenceClassifier(ModelConfig(vocab_size=256, d_model=64, num_classes=10))
        >>> model(torch.randint(256, (2, 64))).shape
        torch.Size([2, 10])
    """

    def make_head(self) -> nn.Module:
        """Make the output layer."""
        if self.config.num_classes is None:
            raise ValueError("SPESequenceClassifier: config must have num_classes, got None")
        (classes,) = check_positive("SPESequenceClassifier", num_classes=self.config.num_classes)
        return nn.Linear(self.config.d_model, classes)

    def forward(
        self,
        tokens: Tensor,  # [B, N]
        padding: Tensor | None = None,  # [B, N]
        *,
        start: float | Sequence[float] | Tensor = 0,
        grid: Sequence[int] | None = None,
    ) -> Tensor:  # [B, num_classes]
        """Compute the logits of the classes.

        Args:
            tokens: int64 ``[B, N]``.
            padding: bool ``[B, N]``, True at tokens that are none; or float, -inf there and 0
                elsewhere.
            start: position of the first token, or ``[B]``, of each sequence.
            grid: sizes of an image whose pixels the tokens are; see
                `SPEMultiheadAttention.forward`.
        """
        hidden = self.hidden(tokens, padding, is_causal=False, start=start, grid=grid)
        kept = None if padding is None else padding == 0
        return self.head(mean_of_tokens(self.layers, hidden, kept))
