"""What a training run needs of memory in each process, told before anything of that size is built.

Weights, gradients, optimizer and average are counted. Activations are estimated from what a block keeps for its
backward (0.6 to 1.6 times that, in the tests): of N tokens that enter a block and M that leave it

    N C (input and output of the first norm, q, k, v, product: 6) + M C (of the second norm: 2) + M H (of the MLP: 2)
"""

import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distributed import Distributed
from engine import Learner, Precision, build_optimizer
from models import MergingViT, UserError
from models.gmacs import linear_macs
from models.parameters import part_of
from sharding import local
from utils import log

GIB = 2**30
# of what a block keeps, if it trains itself, or only lets gradients pass to tokens and norms
_PASSING = 0.6


@dataclass(frozen=True)
class Need:
    """Bytes in each process."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def fixed(self) -> int:
        """What does not depend on the batch."""
        return self.weights + self.gradients + self.optimizer + self.average

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in vars(self).items() if size)
        return f"{_gib(self.fixed + self.activations)} GiB ({parts})"


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}"


def check_memory(args: Namespace, model: MergingViT, dist: Distributed, precision: Precision, name: str) -> None:
    """Print what the run needs and what there is; a warning, or a refusal, where that is less.

    Args:
        model: with its trainable parameters marked; it may lie on the meta device.
        name: of the model, for people.

    Raises:
        UserError: there is not enough for the model alone, without any image.
    """
    need, free = estimate(args, model, dist.world, precision), available(dist.device)
    if free is None:
        return
    log(f"memory per process: about {need}; {_gib(free)} GiB are free")
    if need.fixed > free:
        ways = "--lora 8" if args.fsdp else "--fsdp on several processes, --lora 8"
        more = "more processes, " if args.fsdp else ""
        raise UserError(
            f"{name} needs {_gib(need.fixed)} GiB in each process before the first image, and {_gib(free)} GiB are "
            f"free; give {more}{ways}, or --no_model_ema"
        )
    if need.fixed + need.activations > free:
        ways = "a smaller --batch_size with --accumulation_steps"
        ways = ways if args.grad_checkpointing else f"--grad_checkpointing, or {ways}"
        log(f"warning: a batch of {args.batch_size} will hardly fit into {_gib(free)} GiB; give {ways}")


def estimate(args: Namespace, model: MergingViT, world: int, precision: Precision) -> Need:
    """Estimate the need of each process of a run."""
    parts = world if args.fsdp else 1
    size = sum(_bytes(p) for p in model.parameters())
    trained = sum(_bytes(p) for p in model.parameters() if p.requires_grad)
    gathered = 0
    if args.fsdp:  # a block that runs, and the one after it, which is fetched meanwhile
        half = 2 if precision.dtype else 1
        gathered = 2 * max(sum(map(_bytes, block.parameters())) for block in model.blocks) // half
    average = (size if args.fsdp else trained) if args.model_ema else 0  # frozen weights are their own average
    return Need(
        weights=size // parts + gathered,
        gradients=trained // parts,
        optimizer=int(trained * state_share(args)) // parts,
        average=average // parts,
        activations=activations(args, model, precision),
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def state_share(args: Namespace) -> float:
    """Bytes of an optimizer's states for a byte of parameters: 2 for AdamW."""
    parameter = nn.Parameter(torch.zeros(64, 64))
    group: dict[str, Any] = {"params": [parameter], "weight_decay": 0.0}
    optimizer = build_optimizer(args, [group], 1)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(map(_bytes, states)) / _bytes(parameter)


def activations(args: Namespace, model: MergingViT, precision: Precision) -> int:
    """Estimate the bytes that the blocks keep for the backward of one batch."""
    trains = {part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    if trains <= {"head"}:
        return 0
    share = 1.0 if trains & {"backbone", "lora"} else _PASSING
    width, size = model.embed_dim, 2 if precision.dtype else 4
    entering = [model.patch_embed.num_patches + model.prefixes()[0], *model.plan().counts[:-1]]
    blocks, needs_map = [], model.merge.rule.needs_score()
    for block, before, after in zip(model.blocks, entering, model.plan().counts, strict=True):
        hidden = linear_macs(block.mlp) // (2 * width)  # of two layers; of gated ones, half of the sum of three
        kept = before * (6 * width + needs_map * block.attn.num_heads * before) + after * 2 * (width + hidden)
        blocks.append(share * kept * size)
    inputs = [4 * width * tokens for tokens in entering]
    total = sum(inputs) + max(blocks) if args.grad_checkpointing else sum(blocks)
    passes = bool(args.merged_weight or args.consistency_weight) + bool(args.full_weight)
    return int(total) * args.batch_size * passes


def held(learner: Learner) -> int:
    """Bytes of weights, gradients, optimizer and average in this process, each tensor once."""
    tensors = [tensor for p in learner.module.parameters() for tensor in (p, p.grad) if tensor is not None]
    tensors += [value for state in learner.optimizer.state.values() for value in state.values()]
    tensors += [] if learner.ema is None else learner.ema.module.parameters()
    parts = [local(tensor) for tensor in tensors if torch.is_tensor(tensor)]
    return sum(_bytes(part) for part in {part.data_ptr(): part for part in parts}.values())


# What there is


def available(device: torch.device) -> int | None:
    """Bytes that this process may use of a GPU, or its share of the machine's memory; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [size for size in (_unused(), _cgroup()) if size is not None]
    return min(free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" and free else None


def _unused() -> int | None:
    """MemAvailable of Linux."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup() -> int | None:
    """What the limit of this process's control group leaves, of version 2 or 1; None without a limit."""
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in (limit, usage))
        except OSError:
            continue
        if most != "max":
            return max(0, int(most) - int(used))
    return None
