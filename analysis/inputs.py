"""The inputs of all instruments: a model, images and results, each in the forms that are handy in a notebook."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models import MergeConfig, MergingViT, apply_merging

BATCH_SIZE = 16  # images of a tensor that are run at once: maps of attention are large

# (B,3,H,W), or batches of them: tensors, or tuples that begin with one, as a DataLoader yields them
ImageBatches = Tensor | Iterable[Any]
Result = TypeVar("Result")


@contextmanager
def evaluation(model: VisionTransformer) -> Iterator[MergingViT]:
    """Give a model in evaluation mode, and put its mode back afterwards.

    A plain timm ViT is wrapped into a `MergingViT` that merges nothing and shares its weights; the timm model itself is
    left as it is.

    Raises:
        UserError: a form of timm's models that merging does not support.
    """
    wrapped = model if isinstance(model, MergingViT) else apply_merging(model, MergeConfig(method="none"))
    training = wrapped.training
    wrapped.eval()
    try:
        yield wrapped
    finally:
        wrapped.train(training)


def batches(images: ImageBatches, model: MergingViT) -> Iterator[Tensor]:
    """Yield batches (B,3,H,W) on the model's device; a single tensor is split into batches of 16.

    Where an instrument passes over the images several times it iterates `images` as often: give it a list or a
    DataLoader, not a generator.
    """
    device = next(model.parameters()).device
    for batch in images.split(BATCH_SIZE) if isinstance(images, Tensor) else images:
        yield (batch if isinstance(batch, Tensor) else batch[0]).to(device)


def labelled_batches(images: Iterable[Any], model: MergingViT) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images (B,3,H,W) and targets (B,), the first two of every batch, on the model's device."""
    device = next(model.parameters()).device
    for batch in images:
        yield batch[0].to(device), torch.as_tensor(batch[1], device=device)


def as_list(results: Result | Sequence[Result]) -> list[Result]:
    """Make a list of one result or several."""
    return list(results) if isinstance(results, Sequence) else [results]
