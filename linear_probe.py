"""A new classifier starts as a linear probe of the pretrained features, so that finetuning does not have to find it.

A head that starts at random sends random gradients into the pretrained weights, and a short run on few images ends
before it is of use. Probing first and finetuning then is LP-FT (Kumar et al., arXiv 2202.10054). The probe is a
logistic regression on the features in front of the head, for one pass over at most 4096 training images.
"""

import math
import time
from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from datasets import Data, ImageSet, build_eval_loader, build_transform
from distributed import Distributed, broadcast_object
from engine import Precision
from models import MergingViT, UserError
from models.weights import HEADS
from sharding import assign, is_sharded
from utils import log

SMALL = 10_000  # training images up to which a new head is probed without being asked
MAX_IMAGES = 4096  # that a probe sees


def init_head(
    model: MergingViT, fresh: Sequence[str], data: Data, args: Namespace, precision: Precision, dist: Distributed
) -> None:
    """Fit the classifiers that no weights were found for, if --head_init asks for it; all ranks must call it.

    The backbone must have weights: a probe of random features is worth nothing, and costs a pass over the images.

    Args:
        fresh: parameters that no weights were found for.

    Raises:
        UserError: --head_init is given, and there is no such classifier.
    """
    assert data.train is not None, "a head is fitted in training"
    heads = [name for name in HEADS if f"{name}.weight" in fresh and isinstance(getattr(model, name), nn.Linear)]
    if args.head_init and not heads:
        raise UserError("--head_init has no effect: only a new head on pretrained weights is made; leave it out")
    kind = args.head_init or ("probe" if len(data.train) <= SMALL else "random")
    if not heads or kind == "random" or data.num_classes < 2:
        return
    took_part = dist.is_main or is_sharded(model)  # which the first rank cannot call alone
    fitted = _fit_heads(model, heads, data, args, precision, dist) if took_part else None
    for name, (weight, bias) in (broadcast_object(fitted) or {}).items():
        head = getattr(model, name)
        assign(head.weight, weight)
        assign(head.bias, bias)


def _fit_heads(
    model: MergingViT, heads: Sequence[str], data: Data, args: Namespace, precision: Precision, dist: Distributed
) -> dict[str, tuple[Tensor, Tensor]]:
    began = time.monotonic()
    features, targets = _features(model, heads, data, args, precision, dist.device)
    fitted = {}
    for name in heads if dist.is_main else ():
        weight, bias = fit_probe(features[name].numpy(), targets.numpy(), data.num_classes)
        fitted[name] = (weight, bias)
        hits = (features[name] @ weight.T + bias).argmax(1) == targets
        log(
            f"{name}: starts as a linear probe of {len(targets)} training images ({time.monotonic() - began:.0f} s), "
            f"which classifies {100 * hits.float().mean():.1f} % of them; --head_init random leaves it random"
        )
    return fitted


@torch.no_grad()
def _features(
    model: MergingViT, heads: Sequence[str], data: Data, args: Namespace, precision: Precision, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the inputs (n,D) of each head and the labels (n,), of training images prepared as in evaluation."""
    train = data.train
    assert train is not None
    step = math.ceil(len(train) / MAX_IMAGES)
    indices = range(train.indices.start, train.indices.stop, train.indices.step * step)
    images = ImageSet(train.source, build_transform(args, data.config, train=False), data.config.input_size, indices)
    collected: dict[str, list[Tensor]] = {name: [] for name in heads}
    hooks = [
        getattr(model, name).register_forward_pre_hook(
            lambda _, inputs, name=name: collected[name].append(inputs[0].float().cpu())
        )
        for name in heads
    ]
    valid, targets = [], []
    model.eval()
    try:
        for batch in build_eval_loader(args, images, rank=0, world=1):
            with precision.autocast():
                model(batch.images.to(device))
            valid.append(batch.valid)
            targets.append(batch.targets)
    finally:
        for hook in hooks:
            hook.remove()
    keep = torch.cat(valid)
    return {name: torch.cat(parts)[keep] for name, parts in collected.items()}, torch.cat(targets)[keep]


def fit_probe(features: np.ndarray, targets: np.ndarray, num_classes: int) -> tuple[Tensor, Tensor]:
    """Fit a multinomial logistic regression with scikit-learn's penalty, on standardised features.

    Args:
        features: (n,D). targets: (n,) class numbers, of which some may be missing.

    Returns:
        Weight (C,D) and bias (C,) of a linear layer on the features as they are; classes without an image have zero
        weights and a bias below all others.
    """
    from sklearn.linear_model import LogisticRegression  # half a second, and only here

    present = np.unique(targets)
    weight, bias = np.zeros((num_classes, features.shape[1])), np.zeros(num_classes)
    if len(present) > 1:
        mean, scale = features.mean(0), features.std(0) + 1e-6
        probe = LogisticRegression(max_iter=500).fit((features - mean) / scale, targets)
        rows, offsets = probe.coef_, probe.intercept_
        if len(present) == 2:  # scikit-learn keeps one row, of the second class against the first
            rows, offsets = np.concatenate((-rows, rows)) / 2, np.concatenate((-offsets, offsets)) / 2
        weight[present] = rows / scale
        bias[present] = offsets - weight[present] @ mean
    absent = np.setdiff1d(np.arange(num_classes), present)
    bias[absent] = (offsets.min() if len(present) > 1 else 0) - 10
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()
