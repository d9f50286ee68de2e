"""Weights, gradients, optimizer states and averages spread over the processes (--fsdp), by torch's FSDP2.

A process holds a slice of every tensor. A block gathers its weights when it runs, in the forward and again in the
backward, and hands the mean gradient back in slices, after every micro-batch: nothing whole is ever kept. Files are
those of a run without --fsdp, gathered for saving and cut into slices at the start, so that a run goes on either way
and with any number of processes.
"""

import copy
import itertools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as c10d
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from distributed import Distributed, distributed_errors


def is_sharded(module: nn.Module) -> bool:
    """Tell whether a module's weights are spread over the processes: then all of them must call it together."""
    return isinstance(module, FSDPModule)


def shard(module: nn.Module, dist: Distributed, dtype: torch.dtype | None = None) -> nn.Module:
    """Spread a model over the processes, each of its blocks for itself; all ranks must call it.

    Args:
        module: rank 0's has the weights; those of the others may lie on the meta device, which holds none.
        dtype: of the weights that the blocks gather, and of their gradients until they are summed, in fp32.

    Returns:
        A second model of that form, spread in the same way, whose weights are not set: for the average.
    """
    # blocks that return a view of their tokens are not written to in place, which this warning is about
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(dist.device.type, (dist.world,))
    whole = dict(_tensors(module)) if dist.is_main else {}
    second = copy.deepcopy(module, {id(tensor): _hollow(tensor) for _, tensor in _tensors(module)})
    for model in (module, second):
        _split(model, mesh, dtype)
    for model in (second,) if dist.is_main else (module, second):
        model.to_empty(device=dist.device)
    with distributed_errors("the distribution of the weights"):
        for name, tensor in _tensors(module):
            _receive(tensor, whole.get(name))
    return second


def _split(module: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None) -> None:
    # inputs are not cast: the residual stream stays in fp32, as under autocast, which casts where it is of use
    policy = MixedPrecisionPolicy(dtype, dtype and torch.float32, cast_forward_inputs=False)
    for block in cast(Any, module).blocks:
        for norm in block.modules() if dtype else ():
            if hasattr(norm, "normalized_shape"):  # autocast leaves norms alone on a CPU, where both must be of a type
                norm.register_forward_pre_hook(_cast_to_weight)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # also the rest, so that outside of a forward and a backward every parameter is its slice
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _cast_to_weight(norm: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs if norm.weight is None else (inputs[0].to(norm.weight.dtype), *inputs[1:])


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and all buffers, also those that no state dict holds."""
    return itertools.chain(module.named_parameters(), module.named_buffers())


def _hollow(tensor: Tensor) -> Tensor:
    meta = tensor.detach().to("meta")
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


@torch.no_grad()
def _receive(target: Tensor, whole: Tensor | None) -> None:
    """Set a tensor of the model from rank 0's whole one, which is None elsewhere."""
    given = torch.empty(target.shape, dtype=target.dtype) if whole is None else whole.detach()
    if isinstance(target, DTensor):
        given = given.to(target.to_local().device)
        target.to_local().copy_(distribute_tensor(given, target.device_mesh, target.placements).to_local())
    else:
        given = given.to(target.device)
        c10d.broadcast(given, src=0)
        target.copy_(given)


@torch.no_grad()
def assign(target: Tensor, whole: Tensor) -> None:
    """Set a tensor from a whole one that all ranks have."""
    target.copy_(sliced_like(target, whole))


def sliced_like(target: Tensor, whole: Tensor) -> Tensor:
    """This process's part of a whole tensor, spread as the target is; without a change where that is whole."""
    if not isinstance(target, DTensor):
        return whole
    whole = whole.to(target.to_local().device)
    parts = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    return DTensor.from_local(  # a slice of its own, which does not keep the whole alive
        parts.to_local().clone(), target.device_mesh, target.placements, shape=whole.shape, stride=whole.stride()
    )


@torch.no_grad()
def copy_tensors(target: nn.Module, source: nn.Module) -> None:
    """Copy parameters and buffers between two models that are spread in the same way."""
    for (_, own), (_, other) in zip(_tensors(target), _tensors(source), strict=True):
        own.copy_(other)


def load_whole(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load whole weights, which all ranks have, into a model that is spread.

    Raises:
        KeyError: names that only one of both has.
    """
    state = module.state_dict()
    if different := sorted(state.keys() ^ weights.keys()):
        raise KeyError(different[0])
    for name, tensor in state.items():
        assign(tensor, weights[name])


def whole(nest: Any, keep: bool) -> Any:
    """A nest of tensors and plain values, with every tensor whole and on the CPU; all ranks must call it.

    Args:
        keep: whether this process wants it; else its tensors are None, so that only one holds them all.
    """
    if isinstance(nest, dict):
        return type(nest)((key, whole(value, keep)) for key, value in nest.items())
    if isinstance(nest, (list, tuple)):
        return type(nest)(whole(value, keep) for value in nest)
    if not isinstance(nest, DTensor):
        return nest
    full = nest.full_tensor()
    return full.cpu() if keep else None


def sliced_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's whole state, which all ranks have, with every tensor that is like its parameter spread like it."""
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))

    def slices(index: int, values: Mapping[str, Any]) -> dict[str, Any]:
        like = parameters.get(index)
        return {
            name: sliced_like(like, value)
            if like is not None and isinstance(value, Tensor) and value.shape == like.shape
            else value
            for name, value in values.items()
        }

    return {**state, "state": {index: slices(index, values) for index, values in state["state"].items()}}


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, the whole of one that is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
