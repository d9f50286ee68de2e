"""Whether a data set's labels are the classes that a model tells apart."""

from argparse import Namespace

from datasets import build_data
from utils import log

from .command import Loaded


def labels_fit(own: Namespace, loaded: Loaded) -> bool:
    """False for a folder of images, and for a data set of another number of classes than the model (which is said)."""
    if getattr(own, "data", None) is not None:
        return False
    classes = build_data(loaded.args, loaded.config).num_classes
    if classes != loaded.model.num_classes:
        log(
            f"note: {loaded.args.dataset} has {classes} classes, {loaded.label} {loaded.model.num_classes}: no accuracy"
        )
    return classes == loaded.model.num_classes
