"""Where is a merged token? Rules for the rotary positions of merged tokens, compared on small models trained here.

    python run/rope_study.py --dataset WDS --data_path DATA/tiny_imagenet --classes 10 --epochs 30 --seeds 3 --out table

Trains timm's Eva with DINOv3's rotary positions and four registers from scratch, once for every seed, and runs it with
ToMe at several r under every rule, all with the same images. docs/backbones.md has the outcome, and what each rule
leaves out. `models/rope.py` computes by the rule "mean".

Shapes: B batch, N tokens, D channels of a head.
"""

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import interrupts  # noqa: F401  # isort: skip  # first: Ctrl-C while the rest is imported

import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from torch import Tensor

import options
from datasets import DataConfig, ImageSet, build_data
from models import MergeConfig, MergingViT, apply_merging
from models.blocks import Candidates
from models.merging import Merge, PoolIndex, pool_rows
from models.methods.tome import ToMe
from models.rope import AxialPositions, Positions, rotate
from utils import table, write_table

SIZES: dict[str, Any] = {
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 2,
    "num_reg_tokens": 4,
    "use_abs_pos_emb": False,
    "use_rot_pos_emb": True,
    "rope_type": "dinov3",
    "rope_rotate_half": True,
    "rope_temperature": 100.0,
    "global_pool": "token",
    "init_values": 1e-2,
    "head_init_scale": 1.0,
}
RESOLUTION, PATCH = 64, 8


# Rules


@dataclass(frozen=True)
class RepresentativePositions(AxialPositions):
    """A merged token is where the token is that the others merged into."""

    def merged(self, merge: Merge, by_size: PoolIndex) -> "RepresentativePositions":
        """See `Positions.merged`."""
        table = self.table.expand(len(merge.keep), -1, -1)
        return replace(self, table=table.gather(1, merge.keep.unsqueeze(-1).expand(-1, -1, table.shape[2])))


@dataclass(frozen=True)
class RenormalisedPositions(AxialPositions):
    """The mean of sines and cosines, scaled to a rotation: sin^2 + cos^2 = 1."""

    def angles(self, layer: int) -> Tensor:
        """See `Positions.angles`."""
        sine, cosine = self.table.chunk(2, dim=-1)
        length = (sine.square() + cosine.square()).sqrt().clamp_min(1e-6)
        return torch.cat((sine / length, cosine / length), dim=-1).unsqueeze(1)


@dataclass(frozen=True)
class CoordinatePositions:
    """The mean of coordinates, whose angles are computed anew; prefix tokens are at 0, which turns nothing.

    Attributes:
        moments: (1 or B, N, 4) coordinates and their squares.
        periods: (D/4,) of the sines.
        damped: let waves fade that are short beside the spread of a token, as in a normal distribution of patches.
    """

    moments: Tensor
    periods: Tensor
    damped: bool

    def angles(self, layer: int) -> Tensor:
        """See `Positions.angles`."""
        mean, square = self.moments.chunk(2, dim=-1)
        frequency = 2 * math.pi / self.periods
        angle = (mean.unsqueeze(-1) * frequency).flatten(2).tile(2)
        sine, cosine = angle.sin(), angle.cos()
        if self.damped:
            variance = (square - mean.square()).clamp_min(0).unsqueeze(-1)
            faded = (-variance * frequency.square() / 2).exp().flatten(2).tile(2)
            sine, cosine = faded * sine, faded * cosine
        return torch.cat((sine, cosine), dim=-1).unsqueeze(1)

    def with_prefix(self, count: int) -> "CoordinatePositions":
        """See `Positions.with_prefix`."""
        return replace(self, moments=F.pad(self.moments, (0, 0, count, 0)))

    def merged(self, merge: Merge, by_size: PoolIndex) -> "CoordinatePositions":
        """See `Positions.merged`."""
        return replace(self, moments=pool_rows(self.moments.expand(len(merge.keep), -1, -1), by_size))

    def take(self, index: Tensor | slice) -> "CoordinatePositions":
        """See `Positions.take`."""
        return replace(self, moments=self.moments[:, index])


def coordinates(model: MergingViT, positions: AxialPositions, damped: bool) -> CoordinatePositions:
    """The positions of DINOv3's grid: centres of patches in [-1, 1], rows first."""
    axes = [(torch.arange(side) + 0.5) / side * 2 - 1 for side in model.patch_embed.grid_size]
    place = torch.cartesian_prod(*axes).unsqueeze(0)
    return CoordinatePositions(torch.cat((place, place.square()), dim=-1), model.rope.periods, damped)


RULES: dict[str, Callable[[MergingViT, AxialPositions], Positions]] = {
    "mean": lambda model, positions: positions,
    "renormalised": lambda model, positions: RenormalisedPositions(positions.table),
    "coordinates": lambda model, positions: coordinates(model, positions, damped=False),
    "damped": lambda model, positions: coordinates(model, positions, damped=True),
    "representative": lambda model, positions: RepresentativePositions(positions.table),
}


@dataclass(frozen=True)
class RotatedKeysToMe(ToMe):
    """ToMe that compares keys as attention does, rotated."""

    def scores(self, candidates: Candidates) -> Tensor:
        """Cosines of rotated keys (B,S,T)."""
        assert candidates.keys is not None and candidates.tokens.positions is not None
        rope = candidates.tokens.positions.angles(candidates.plan.layer)
        return super().scores(candidates._replace(keys=rotate(candidates.keys, rope, True, rope.dtype)))


METRICS = {"keys": ToMe(), "rotated keys": RotatedKeysToMe()}


# Training


class Images:
    """The images of a few classes, decoded once."""

    def __init__(self, images: ImageSet, classes: int) -> None:
        chosen = [index for index, target in enumerate(images.targets) if int(target) < classes]
        samples = [images[index] for index in chosen]
        self.x = torch.stack([sample.image for sample in samples])
        self.y = torch.tensor([sample.target for sample in samples])


def train(args: Namespace, seed: int, data: Images) -> MergingViT:
    """A small model trained from scratch, in evaluation mode."""
    torch.manual_seed(seed)
    vit = Eva(img_size=RESOLUTION, patch_size=PATCH, num_classes=args.classes, **SIZES)
    model = apply_merging(vit, MergeConfig(r=0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    steps = args.epochs * (len(data.x) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.1)
    for epoch in range(args.epochs):
        for batch in torch.randperm(len(data.x)).split(args.batch_size):
            if len(batch) < args.batch_size:
                continue
            logits = model(augment(data.x[batch]))
            loss = F.cross_entropy(logits, data.y[batch], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(f"seed {seed}: epoch {epoch + 1} of {args.epochs}, loss {loss.item():.3f}", file=sys.stderr)
    return model.eval()


def augment(x: Tensor) -> Tensor:
    """Half of the images mirrored, and all of them moved by up to 6 pixels."""
    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
    padded = F.pad(x, (6, 6, 6, 6), mode="reflect")
    top, left = torch.randint(0, 13, (2,)).tolist()
    return padded[:, :, top : top + x.shape[2], left : left + x.shape[3]]


# Measurement


@torch.no_grad()
def logits_under(model: MergingViT, x: Tensor, r: int, rule: str, metric: str) -> Tensor:
    """Logits (B,classes) of images, merged by ToMe under a rule of positions."""
    tokens = model.embed(x)
    assert isinstance(tokens.positions, AxialPositions)
    plan = model.plan(r, tokens.x.shape[1])
    tokens = tokens._replace(positions=RULES[rule](model, tokens.positions))
    for layer in model.layers(tokens, plan, METRICS[metric]):
        tokens = layer.after
    return model.classify(model.norm(tokens.x), tokens.size)[0]


def scores(model: MergingViT, data: Images, r: int, rule: str, metric: str) -> dict[str, float]:
    """Top-1, and agreement (both in %) and KL (nats) with the model that merges nothing."""
    parts = data.x.split(128)
    merged = torch.cat([logits_under(model, x, r, rule, metric) for x in parts])
    with torch.no_grad():
        dense = torch.cat([model(x, r=0) for x in parts])
    kl = F.kl_div(merged.log_softmax(1), dense.log_softmax(1), log_target=True, reduction="batchmean")
    right, same = merged.argmax(1) == data.y, merged.argmax(1) == dense.argmax(1)
    return {"acc1": 100 * float(right.float().mean()), "agree": 100 * float(same.float().mean()), "kl": float(kl)}


def measure(args: Namespace) -> list[dict[str, Any]]:
    """All rows: the mean over seeds of every score, and the KL of each seed. What is known is printed after each."""
    flags = ["--no_pretrained", "--dataset", args.dataset, "--data_path", args.data_path]
    data = build_data(options.parse_args(flags), DataConfig(input_size=RESOLUTION, crop_pct=1.0))
    assert data.train is not None
    data.train.transform = data.val.transform  # augmentation is our own, on decoded images
    train_set, val_set = Images(data.train, args.classes), Images(data.val, args.classes)
    settings = [(0, "mean", "keys"), *((r, rule, metric) for r in args.r for metric in METRICS for rule in RULES)]
    of_seeds = []
    for seed in range(args.seeds):
        model = train(args, seed, train_set)
        of_seeds.append([scores(model, val_set, *setting) for setting in settings])
        print(markdown(summary(settings, of_seeds)), file=sys.stderr)
    return summary(settings, of_seeds)


def summary(settings: Sequence[tuple[int, str, str]], of_seeds: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows of the means over the seeds so far."""
    rows = []
    for (r, rule, metric), found in zip(settings, zip(*of_seeds, strict=True), strict=True):
        means = {name: sum(score[name] for score in found) / len(found) for name in found[0]}
        rows.append({"r": r, "rule": rule, "metric": metric, **means, "kl_of_seeds": [score["kl"] for score in found]})
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table in markdown."""
    headers = ("r", "compared by", "position", "top-1", "agree", "KL", "KL of each seed")
    texts = []
    for row in rows:
        numbers = [f"{row['acc1']:.2f}", f"{row['agree']:.2f}", f"{row['kl']:.4f}"]
        seeds = " ".join(f"{kl:.4f}" for kl in row["kl_of_seeds"])
        texts.append([str(row["r"]), row["metric"], row["rule"], *numbers, seeds])
    return table(headers, texts) + "\n"


def build_parser() -> options.Parser:
    parser = options.Parser(prog="rope_study.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--dataset", default="WDS")
    parser.add_argument("--classes", type=options.positive_int, default=10, help="only the first so many classes")
    parser.add_argument("--epochs", type=options.positive_int, default=30)
    parser.add_argument("--seeds", type=options.positive_int, default=3)
    parser.add_argument("--batch_size", type=options.positive_int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--r", type=options.positive_int, nargs="+", default=[4, 8, 12])
    parser.add_argument("--out", help="file to write, with .json and .md")
    return parser


def run(argv: Sequence[str]) -> None:
    """Train, measure, print and write the table."""
    args = build_parser().parse(argv)
    rows = measure(args)
    if args.out:
        write_table(args.out, {"images": RESOLUTION, "rows": rows}, markdown(rows))
    print(markdown(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0, or 2 after the user's mistake."""
    return options.exit_status("rope_study.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
