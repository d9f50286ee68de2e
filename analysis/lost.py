"""LOST: one object box per image from a ViT's last features (Siméoni et al., arXiv 2109.14279), and its measure.

Shapes: N patches of an image, row by row on a grid (gh,gw); C feature channels. A box is (x1,y1,x2,y2) in pixels, the
right and lower sides excluded. Everything is per image and on the CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class LostOptions:
    """What LOST compares patches by; the defaults are the original's.

    Attributes:
        k: patches of lowest degree that may join the seed.
        center: subtract the mean feature first.
        normalize: scale features to unit length.
        bias: added to the Gram matrix.
    """

    k: int = 100
    center: bool = False
    normalize: bool = False
    bias: float = 0.0


@dataclass(frozen=True)
class Found:
    """What LOST found in one image."""

    box: Box
    seed: int  # patch index
    degrees: np.ndarray  # (N,) patches that each one correlates with positively
    expansion: np.ndarray  # (K,) patch indices that joined the seed, with it
    mask: np.ndarray  # (gh,gw) bool: correlates with the expanded seed
    similarity: np.ndarray  # (N,) Gram row of the seed


def lost(
    features: Tensor, grid: tuple[int, int], patch: int, image_size: tuple[int, int], options: LostOptions | None = None
) -> Found:
    """Find one box: seed = the patch least like the others, expanded by what is like it, largest connected part.

    Args:
        features: (N,C), N = gh * gw.
        grid: (gh,gw).
        patch: side in pixels.
        image_size: (height,width) of the image before it was padded to whole patches; boxes end there.
    """
    options = options or LostOptions()
    gram = gram_matrix(features, options)
    positive = gram > 0
    degrees = positive.sum(dim=1) - positive.diagonal().long()  # itself does not count
    order = degrees.argsort(stable=True)  # ties are common, and only a stable sort decides them alike everywhere
    seed = int(order[0])
    potentials = order[: options.k]
    expansion = potentials[gram[seed, potentials] > 0]
    mask = (gram[expansion].sum(dim=0) > 0).view(grid).numpy()
    box = clip_box(component_box(mask, seed, patch), image_size)
    return Found(box, seed, degrees.numpy(), expansion.numpy(), mask, gram[seed].numpy())


def gram_matrix(features: Tensor, options: LostOptions) -> Tensor:
    """Dot products (N,N) of all patches, in fp32."""
    features = features.detach().float().cpu()
    if options.center:
        features = features - features.mean(dim=0, keepdim=True)
    if options.normalize:
        features = F.normalize(features, dim=1)
    return features @ features.T + options.bias


def component_box(mask: np.ndarray, seed: int, patch: int) -> Box:
    """Box of the 4-connected part of a mask (gh,gw) that holds the seed; of the seed's cell if the mask does not."""
    from scipy import ndimage  # importing it sets warning filters

    row, column = divmod(seed, mask.shape[1])
    labels, _ = ndimage.label(mask)
    if labels[row, column] == 0:
        return column * patch, row * patch, (column + 1) * patch, (row + 1) * patch
    return _box_of(labels == labels[row, column], patch)


def _box_of(part: np.ndarray, patch: int) -> Box:
    rows, columns = np.nonzero(part)
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return int(left) * patch, int(top) * patch, int(right) * patch, int(bottom) * patch


def clip_box(box: Box, image_size: tuple[int, int]) -> Box:
    """End a box at the image (height,width)."""
    height, width = image_size
    return box[0], box[1], min(box[2], width), min(box[3], height)


def dino_seg(
    attention: Tensor, grid: tuple[int, int], patch: int, image_size: tuple[int, int], share: float = 0.6
) -> Box:
    """The baseline of the LOST paper: box of the biggest 4-connected part of the patches that hold most attention.

    Args:
        attention: (N,) of the class token to the patches.
        share: part of the mass on patches that is kept, strongest patches first.
    """
    from scipy import ndimage

    mass = attention.detach().double().cpu()
    order = mass.argsort(descending=True, stable=True)
    before = mass[order].cumsum(0) - mass[order]
    mask = torch.zeros(len(mass), dtype=torch.bool)
    mask[order[before < share * mass.sum()]] = True
    labels, count = ndimage.label(mask.view(grid).numpy())
    sizes = ndimage.sum_labels(labels > 0, labels, index=np.arange(1, count + 1))
    return clip_box(_box_of(labels == 1 + int(np.argmax(sizes)), patch), image_size)


def box_iou(box: Sequence[float], others: np.ndarray) -> np.ndarray:
    """Intersection over union of one box with others (n,4): (n,)."""
    first, others = np.asarray(box, dtype=np.float64), np.asarray(others, dtype=np.float64).reshape(-1, 4)
    sides = np.minimum(first[2:], others[:, 2:]) - np.maximum(first[:2], others[:, :2])
    common = np.clip(sides, 0, None).prod(axis=1)
    area, areas = (first[2:] - first[:2]).prod(), (others[:, 2:] - others[:, :2]).prod(axis=1)
    return common / (area + areas - common + 1e-7)


def corloc(overlaps: Sequence[float], least: float = 0.5) -> float:
    """Percentage of images whose box overlaps some object by at least `least`."""
    return 100.0 * float(np.mean(np.asarray(overlaps) >= least)) if len(overlaps) else float("nan")
