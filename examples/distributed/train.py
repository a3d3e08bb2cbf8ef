"""Train a small language model on several ranks: of the batch, of the sequence, or of both.

    torchrun --nproc-per-node 4 examples/distributed/train.py --sequence-ranks 2
    torchrun --nproc-per-node 4 examples/distributed/train.py --parallel fsdp --bfloat16 \\
        --activation-checkpointing --checkpoint /tmp/model --steps 40
    torchrun --nproc-per-node 2 examples/distributed/train.py --parallel fsdp --bfloat16 \\
        --activation-checkpointing --checkpoint /tmp/model --steps 80

Ranks form a mesh, data x sequence: those of a row hold the pieces of the same sequences, and every
row has sequences of its own. Parameters are replicated (DDP) or sharded (FSDP2) over all of them,
and their gradients averaged. Runs on GPUs with NCCL, elsewhere with gloo. A checkpoint is resumed
by any number of ranks (of the same `--parallel`), to the same losses but for rounding. The text is
made up: every sequence repeats itself with a period of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from torch_spe import parameter_groups
from torch_spe.distributed import SPESequenceParallel
from torch_spe.models import ModelConfig, SPECausalLM

VOCABULARY = 32


class Model(SPECausalLM):
    """A causal Transformer."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.activation_checkpointing = options.activation_checkpointing
        super().__init__(
            ModelConfig(
                VOCABULARY, options.width, options.layers, options.heads, dropout=options.dropout,
                activation="relu", attention={"position": options.position},
            )
        )  # fmt: skip

    def make_head(self) -> nn.Module:
        """The output layer, with weights of its own."""
        return nn.Linear(self.config.d_model, VOCABULARY)

    def pass_layer(
        self,
        number: int,
        layer: nn.Module,
        x: Tensor,  # [B, N, width]
        padding: Tensor | None,
        **call: object,
    ) -> Tensor:  # [B, N, width]
        """A layer, computed once more in the backward pass where that was asked for."""
        if not self.activation_checkpointing:
            return super().pass_layer(number, layer, x, padding, **call)
        return checkpoint(layer, x, src_key_padding_mask=padding, use_reentrant=False, **call)


def sequences(step: int, options: argparse.Namespace) -> Tensor:  # [batch, length + 1]
    """The batch of a step, of all ranks."""
    generator = torch.Generator().manual_seed(1000 * options.seed + step)
    shape = options.batch, options.length + 1
    period = torch.randint(3, 20, (options.batch, 1), generator=generator)
    text = torch.randint(VOCABULARY, shape, generator=generator)
    return text.gather(1, torch.arange(shape[1]) % period)


def piece(count: int, rank: int, ranks: int) -> slice:
    """The rank's share of a count; shares differ by one at most."""
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


def wrap(model: Model, options: argparse.Namespace, device: torch.device) -> nn.Module:
    """The model for all ranks. First the style, then what averages gradients."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh(
        device.type, (ranks // options.sequence_ranks, options.sequence_ranks),
        mesh_dim_names=("data", "sequence"),
    )  # fmt: skip
    if options.sequence_ranks > 1:
        equal = options.length % options.sequence_ranks == 0
        parallelize_module(model, mesh["sequence"], SPESequenceParallel(equal_lengths=equal))
    if options.parallel == "ddp":
        return DistributedDataParallel(model)
    everyone = init_device_mesh(device.type, (ranks,))
    for layer in model.layers:
        fully_shard(layer, mesh=everyone)
    return fully_shard(model, mesh=everyone)


class State:
    """Model, optimizer and step, as torch.distributed.checkpoint reads and writes them."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.step = model, optimizer, 0

    def state_dict(self) -> dict[str, object]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, state: dict[str, object]) -> None:
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )  # fmt: skip
        self.step = state["step"]


def train(options: argparse.Namespace) -> list[float]:
    """Train up to the last step; the mean loss of each step made."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks % options.sequence_ranks != 0:
        raise SystemExit(f"{options.sequence_ranks} ranks of a sequence do not divide {ranks}")
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.manual_seed(options.seed)  # all ranks make the same model
    plain = Model(options).to(device)
    model = wrap(plain, options, device)
    # Here they part: dropout is every rank's own. Noise of positions is that of the first rank of
    # a sequence, and so another one for every row of the mesh.
    torch.manual_seed(options.seed + 1 + rank)
    optimizer = torch.optim.AdamW(parameter_groups(model, options.lr), options.lr)
    state, folder = State(model, optimizer), options.checkpoint
    if folder is not None and (folder / ".metadata").exists():
        dcp.load({"training": state}, checkpoint_id=folder)

    data_rank, sequence_rank = divmod(rank, options.sequence_ranks)
    rows = piece(options.batch, data_rank, ranks // options.sequence_ranks)
    columns = piece(options.length, sequence_rank, options.sequence_ranks)
    precision = contextlib.nullcontext()
    if options.bfloat16:
        precision = torch.autocast(device.type, torch.bfloat16)
    losses = []
    while state.step < options.steps:
        text = sequences(state.step, options)[rows].to(device)
        with precision:
            logits = model(text[:, :-1][:, columns])
        loss = F.cross_entropy(
            logits.float().flatten(0, 1), text[:, 1:][:, columns].flatten(), reduction="sum"
        )
        # Gradients are averaged over ranks: with the sum over this one's tokens times the ranks,
        # what comes out is that of the mean over all tokens, whatever the pieces' lengths.
        loss = loss * (ranks / (options.batch * options.length))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        losses.append(mean.item())
        state.step += 1
        if rank == 0 and state.step % options.report == 0:
            print(f"step {state.step}: loss {losses[-1]:.4f}", flush=True)
    if folder is not None:
        dcp.save({"training": state}, checkpoint_id=folder)
    return losses


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--sequence-ranks", type=int, default=1, help="ranks of a sequence")
    parser.add_argument("--bfloat16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument(
        "--checkpoint", type=Path, help="folder to resume from and to write at the end"
    )
    parser.add_argument("--position", default="fading")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step, of all ranks")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--report", type=int, default=10, help="steps between two reports")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    dist.init_process_group("cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo")
    try:
        train(options)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
