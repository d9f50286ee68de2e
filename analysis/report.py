"""Report: one HTML page that gathers the figures and tables of several instruments for up to four models.

Command: run/analyze.py report. It runs the other commands and reads the files they write, so there is nothing to
measure here.
"""

import json
import shlex
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models import UserError

from . import merged_tokens
from .html import EmbeddedPng, Section, Table, render
from .intervals import LEAST
from .outliers import BIMODALITY_REFERENCES, SCALED, SHARED

if TYPE_CHECKING:
    from .command import Loaded

MOST_MODELS = 4


def lookup(content: Any, path: str) -> Any:
    """A value deep in nested dictionaries, by a path such as outliers/shared/share; None where it is missing.

    A path that ends in *100 gives the value in %, and one in *100~ or ~ a text with its interval, if it is there:
    `1.96 [1.19, 3.04]`; ~n adds the number of images that contribute: `1.96 [1.19, 3.04] (n = 30)`.
    """
    path, tilde, count = path.partition("~")
    path, _, factor = path.partition("*")
    scale = float(factor or 1)
    *parents, name = path.split("/")
    for key in parents:
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, dict) or name not in content:
        return None
    if tilde:
        number = content.get(f"{name}_n") if count else None
        text = _with_interval(content, name, scale)
        return text if text is None or number is None or text.endswith(")") else f"{text} (n = {number})"
    value = content[name]
    return value if value is None or scale == 1 else value * scale


def _with_interval(row: Mapping[str, Any], name: str, scale: float) -> str | None:
    """A number of a json as text, with its interval; below five images only how many there are."""
    value, span, number = row[name], row.get(f"{name}_ci95"), row.get(f"{name}_n")
    if number is not None and number < LEAST:
        return f"too few images (n = {number})"
    if value is None:
        return None
    size = max([abs(value), *map(abs, span or ())]) * scale
    digits = 1 if size >= 10 else 2 if size >= 1 else 3
    text = f"{value * scale:.{digits}f}"
    if span is None:
        return text
    return f"{text} [{span[0] * scale:.{digits}f}, {span[1] * scale:.{digits}f}]"


# Tables of single instruments, from their json


def _norms_table(content: dict[str, Any]) -> tuple[Table, ...]:
    """Outliers under both cuts with the paired difference, and bimodality beside its references."""
    models = content["models"]
    of = models[0]["outlier_cut"]
    lines = [
        ("images", "n_images"),
        ("shared cut", f"outliers/{SHARED}/cut"),
        ("patches above it, %", f"outliers/{SHARED}/share*100~"),
        ("less the first model's, %", f"outliers/{SHARED}/share_minus_baseline*100~"),
        ("images that have any", f"outliers/{SHARED}/images_with"),
        ("shared cut scaled by the medians", f"outliers/{SCALED}/cut"),
        ("patches above that, %", f"outliers/{SCALED}/share*100~"),
        ("less the first model's, %", f"outliers/{SCALED}/share_minus_baseline*100~"),
        ("above own mean + 3 std, %", "outliers/sigma:3/share*100~"),
        ("above 3 own medians, %", "outliers/ratio:3/share*100~"),
    ]
    rows = [(title, *(lookup(row, path) for row in models)) for title, path in lines]
    labels = tuple(row["label"] for row in models)
    caption = f"outliers: norm > {of['cut']:.1f}, {of['rule']} of {of['of']}; [95 % over images], differences paired"
    shapes = tuple(
        (name, *(lookup(row, f"bimodality/{key}") for row in models), *(r[key] for r in BIMODALITY_REFERENCES.values()))
        for name, key in (("variance between two heaps (Otsu)", "otsu_between"), ("Sarle's coefficient", "sarle"))
    )
    references = tuple(f"(a {name} distribution)" for name in BIMODALITY_REFERENCES)
    return (
        Table(("", *labels), tuple(rows), caption),
        Table(
            ("", *labels, *references), shapes, "two heaps of norms? only above the references; a tail raises Sarle's"
        ),
    )


def _attention_table(content: dict[str, Any]) -> tuple[Table, ...]:
    """Metrics of class token and registers in the last block."""
    names = {
        "entropy": "normalised entropy (1: even)",
        "top_patch": "top patch's share",
        "registers": "mass on registers",
        "patches": "mass on patches",
    }
    rows = []
    for row in content["models"]:
        for token_type, metrics in row["per_block"].items():
            spans = row["per_block_ci95"][token_type]
            last = [_last(metrics, spans, name) for name in names]
            paired = lookup(row, f"last_block_minus_baseline/{token_type}/entropy~")
            rows.append((row["label"], row["n_images"], token_type, *last, paired))
    title = "last block, mean over heads; mean of patches: of the patches' own values"
    columns = ("model", "images", "token", *names.values(), "entropy less the first model's (paired)")
    return (Table(columns, tuple(rows), title),)


def _last(metrics: Mapping[str, Any], spans: Mapping[str, Any], name: str) -> str | None:
    if not metrics.get(name):
        return None
    return _with_interval({name: metrics[name][-1], f"{name}_ci95": spans[name][-1]}, name, 1.0)


def _both_cuts(row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The cuts of a model that differ, in words."""
    cuts = [(f"shared, {row[SHARED]['cut']:.1f}", row[SHARED])]
    if abs(row[SCALED]["cut"] - row[SHARED]["cut"]) > 1e-6:
        cuts.append((f"scaled, {row[SCALED]['cut']:.1f}", row[SCALED]))
    return cuts


def _similarity_table(content: dict[str, Any]) -> tuple[Table, ...]:
    series = [(row["label"], name, part) for row in content["models"] for name, part in _both_cuts(row)]
    neighbours = tuple(
        (
            label,
            cut,
            part["images_with"],
            *(
                lookup(part, f"neighbours/{path}~")
                for path in ("outlier_mean", "normal_mean", "auc", "auc_minus_baseline")
            ),
        )
        for label, cut, part in series
    )
    title = (
        "cosine of a patch embedding to its neighbours; AUC: chance that an outlier's is larger (0.5: no difference)"
    )
    columns = ("model", "cut", "images with outliers", "outlier", "normal", "AUC", "less the first model's (paired)")
    tables = [Table(columns, neighbours, title)]
    pairs = list(dict.fromkeys(name for *_, part in series for name in part["cosines_centred"]))
    rows = []
    for name in pairs:
        cells = []
        for *_, part in series:
            row = {
                name: part["cosines_centred"].get(name),
                f"{name}_ci95": part["cosines_centred_ci95"].get(name),
                f"{name}_n": part["cosines_n"].get(name),
            }
            cells.append(_with_interval(row, name, 1.0) if name in part["cosines_centred"] else None)
        rows.append((name, *cells))
    heads = (f"{label}, {cut}" for label, cut, _ in series)
    tables.append(Table(("", *heads), tuple(rows), "cosines of tokens, less the mean token"))
    return tuple(tables)


def _lost_table(content: dict[str, Any]) -> tuple[Table, ...]:
    names = {
        "corloc*100~": "LOST",
        "whole_image*100~": "the whole image as the box",
        "dino_seg*100~": "DINO-seg",
        "corloc_minus_whole_image*100~": "LOST less whole image (paired)",
    }
    rows = tuple((row["label"], row["n_images"], *(lookup(row, path) for path in names)) for row in content["models"])
    if all(row[2] is None for row in rows):
        return ()
    setting = ", ".join(f"{key} {value}" for key, value in content["setting"].items())
    return (Table(("model", "images", *names.values()), rows, f"CorLoc, % [95 % over images]; LOST with {setting}"),)


def _reconstruction_table(content: dict[str, Any]) -> tuple[Table, ...]:
    lines = (
        ("outlier patches of held-back images", "mse/outlier_patches"),
        ("images that have any", "mse/outlier_n"),
        ("MSE, normal", "mse/normal~"),
        ("MSE, outlier", "mse/outlier~"),
        ("ratio", "mse/ratio~"),
        ("ratio less the first model's (paired)", "mse/ratio_minus_baseline~"),
        ("ratio, same contrast", "matched/contrast/ratio~"),
        ("ratio, same likeness to neighbours", "matched/likeness/ratio~"),
        ("ratio, same brightness", "matched/brightness/ratio~"),
        ("place top-1, normal, %", "position/top1/normal*100~"),
        ("place top-1, outlier, %", "position/top1/outlier*100~"),
    )
    series = [(row, name, part) for row in content["models"] for name, part in _both_cuts(row)]
    rows = [("images held back", *(row["n_test"] for row, *_ in series))]
    rows += [(title, *(lookup(part, path) for *_, part in series)) for title, path in lines]
    heads = (f"{row['label']}, {name}" for row, name, _ in series)
    return (
        Table(("", *heads), tuple(rows), f"by the model and the outlier cut; below {LEAST} images nothing is said"),
    )


def _dynamics_table(content: dict[str, Any]) -> tuple[Table, ...]:
    columns = {
        "label": "model",
        "R": "R",
        "r": "r",
        "rule": "rule",
        "n_images": "images",
        "agree*100": "agree %",
        "agree_minus_protected*100": "minus protected",
        "agree_minus_protected_se*100": "± (paired)",
        "kl": "KL, nats",
        "registers_alone_last": "registers alone at the end",
    }
    rows = tuple(tuple(lookup(row, path) for path in columns) for row in content["rows"])
    return (Table(tuple(columns.values()), rows, "± one standard error over images"),)


def _probes_table(content: dict[str, Any]) -> tuple[Table, ...]:
    rows = tuple(
        (
            row["label"],
            name,
            part["n_train"],
            part["n_test"],
            kind,
            lookup(found, "linear*100~"),
            lookup(found, "knn*100~"),
        )
        for row in content["models"]
        for name, part in row["sets"].items()
        for kind, found in part["kinds"].items()
    )
    columns = ("model", "on", "train", "test", "token", "linear, %", "nearest neighbours, %")
    first = content["models"][0]
    chance = f"test top-1; chance {100 * first['chance']:.3g} %, always the largest class "
    chance += f"{100 * first['largest_class']:.3g} %"
    return (Table(columns, rows, f"{chance}; [95 % over test images]"),)


def _changes_table(content: dict[str, Any]) -> tuple[Table, ...]:
    paths = {
        "gmacs": "GMACs",
        "agree*100~": "same top-1 as r=0, %",
        "acc1*100~": "top-1, %",
        "acc1_minus_unmerged*100~": "less r=0 (paired)",
        "kl~": "KL, nats",
    }
    rows = tuple(
        (model["label"], model["method"], row["r"], model["n_images"], *(lookup(row, path) for path in paths))
        for model in content["models"]
        for row in model["rows"]
    )
    return (Table(("model", "method", "r", "images", *paths.values()), rows, "[95 % over images]"),)


def _ttr_table(content: dict[str, Any]) -> tuple[Table, ...]:
    ranked = zip(content["ranked"], content["scores"], content["scores_elsewhere"], content["ratios"], strict=True)
    rows = tuple((f"{block}: {unit}", at, elsewhere, ratio) for (block, unit), at, elsewhere, ratio in ranked)
    caption = f"{content['n_images_with_outliers']} of {content['n_images']} images have outliers"
    if content["top_layer_doubt"]:
        caption += f". Not settled: {content['top_layer_doubt']}"
    return (Table(("block: unit", "mean |activation| at outliers", "elsewhere", "ratio"), rows, caption),)


# The table at the top of the page: section, what, path in a model's row, a reference to read it by
SUMMARY = (
    ("norms", "patches above the shared cut, %", f"outliers/{SHARED}/share*100~n", ""),
    (
        "norms",
        "patches above the cut scaled by the medians, %",
        f"outliers/{SCALED}/share*100~n",
        "shared cut alone misleads",
    ),
    ("norms", "variance between two heaps of norms", "bimodality/otsu_between", "normal 0.637, uniform 0.75"),
    (
        "similarity",
        "outliers resemble their neighbours more: AUC, scaled cut",
        f"{SCALED}/neighbours/auc~n",
        "no difference: 0.5",
    ),
    ("lost", "CorLoc of LOST, %", "corloc*100~n", ""),
    ("lost", "CorLoc of the whole image as the box, %", "whole_image*100~n", "what LOST must beat"),
    ("reconstruction", "MSE of outlier / normal patches, scaled cut", f"{SCALED}/mse/ratio~n", "no difference: 1"),
    (
        "reconstruction",
        "the same against patches of like contrast",
        f"{SCALED}/matched/contrast/ratio~n",
        "no difference: 1",
    ),
    ("probes", "class from the class token, linear, %", "sets/all images/kinds/class/linear*100~n", ""),
    ("probes", "class from a random normal patch, linear, %", "sets/all images/kinds/normal patch/linear*100~n", ""),
)


def _summary(contents: Mapping[str, dict[str, Any]], labels: Sequence[str]) -> Section | None:
    """The table at the top: the main number of every section with its interval."""
    rows = []
    for name, title, path, reference in SUMMARY:
        models = contents.get(name, {}).get("models", [])
        cells = [lookup(row, path) for row in models]
        if len(cells) == len(labels) and any(cell is not None for cell in cells):
            rows.append((CHAPTERS[name].title, title, *cells, reference))
    if not rows:
        return None
    table = Table(
        ("section", "what", *labels, "to read it by"), tuple(rows), "[95 % over images]; n: images that contribute"
    )
    may_not = "Intervals hold for these images and these weights: another training run may differ by more."
    return Section("summary", "Summary", "The main number of every section.", (table,), may_not=may_not)


# What is on the page


@dataclass(frozen=True)
class Chapter:
    """An instrument on the page.

    Attributes:
        text: what to look for.
        may, may_not: what one may conclude, and what not.
        flags: more flags of its command.
        draws_images: whether its command has --show.
        json: name of the file with its numbers; "" for the name of the command.
        tables: makes them of the json.
        captions: start of a picture's file name -> caption. Pictures come in this order; others are left out.
        folded: starts of file names of pictures that are folded away.
    """

    title: str
    text: str
    may: str = ""
    may_not: str = ""
    flags: tuple[str, ...] = ()
    draws_images: bool = True
    json: str = ""
    tables: Callable[[dict[str, Any]], tuple[Table, ...]] | None = None
    captions: tuple[tuple[str, str], ...] = ()
    folded: tuple[str, ...] = ()


CHAPTERS = {
    "norms": Chapter(
        "Token norms",
        "A few patch tokens may grow far longer than the rest and serve as scratch space. Registers are meant to "
        "take over that role.",
        "A model has fewer outliers if its share is lower under both cuts, by more than the intervals of the paired "
        "differences.",
        "A lower share under the shared cut alone may only mean that all norms are smaller. The share of the first "
        "model under its own quantile is what the quantile says.",
        tables=_norms_table,
        captions=(
            ("norms_histogram", "Patch norms at the chosen block, all models on the same bins."),
            ("norms_layers", "Norms of patch tokens over the blocks; lines: class token and registers."),
            ("norms_images", "Single images on one scale; outliers outlined."),
            ("norms_positions", "Where on the grid outliers sit."),
            ("norms_kinds", "Norms by kind of token."),
        ),
        folded=("norms_kinds",),
    ),
    "attention": Chapter(
        "Attention",
        "Where class token and registers look in the last block, spread back to the patch grid where tokens merged.",
        "Maps share one colour scale, so equal colour is equal attention, also across models.",
        "Attention is where a token reads from in one block, not why the model decides. Fresh registers have learned "
        "nothing.",
        tables=_attention_table,
        captions=(
            ("attention_metrics", "Concentration of the attention, and what it is spent on, over the blocks."),
            ("attention_compare", "The models side by side."),
            ("attention_registers_blocks", "Class token and registers, block by block"),
            ("attention_registers_heads", "Class token and registers, head by head"),
            ("attention_layers", "First token's attention block by block"),
            ("attention_heads", "Head by head"),
            ("attention_patches", "From single patches to all"),
            ("attention_", "Mean over heads"),
        ),
        folded=("attention_registers_heads", "attention_layers", "attention_heads", "attention_patches"),
    ),
    "similarity": Chapter(
        "Similarity",
        "Are outliers redundant, are they alike? Cosines of patch embeddings to their neighbours, and of tokens.",
        "An AUC above 0.5 beyond its interval: outliers sit where a patch looks like its neighbours.",
        "Where outliers sit says nothing about what they do there.",
        draws_images=False,
        tables=_similarity_table,
        captions=(
            ("similarity_neighbours", "Cosine of a patch embedding to its neighbours, outlier and normal patches."),
            ("similarity_outliers", "Cosines among outliers, among normal tokens and across."),
            ("similarity_maps", "Likeness of the attention maps of class token and registers."),
        ),
    ),
    "cka": Chapter(
        "Layers and models",
        "Linear CKA of patch tokens: which layers of a model, and of two models, hold the same.",
        "A bright diagonal: the models do alike block by block. A bright square: blocks that change little.",
        "CKA near 1 is no proof that two layers are interchangeable; a few long tokens can dominate it.",
        draws_images=False,
        captions=(("cka_models", "Between models."), ("cka_layers", "Within each model.")),
    ),
    "pca": Chapter(
        "PCA of patch features",
        "Three principal components of the last block's patches as red, green and blue.",
        "Equal colour is equal direction, in all images and, where components are joint, in all models.",
        "Three components hold a part of the variance only (in the titles): what looks alike here may differ.",
        captions=(("pca_foreground", "The foreground alone."), ("pca", "All patches.")),
    ),
    "cosine": Chapter(
        "Cosine maps",
        "How much every patch resembles a chosen one, on one scale for all models.",
        "Sharp maps that end at an object's rim: features tell the object apart.",
        "Under merging all patches of a token resemble each other fully, whatever the model.",
        captions=(("cosine", "The chosen patch is outlined."),),
    ),
    "fate": Chapter(
        "Token fate",
        "Where patches went, block by block. Only models that merge are shown.",
        "Tokens that stay inside of objects: merging follows the image.",
        "A few images are a look, no measurement; the json has numbers over those drawn.",
        captions=(("fate_strip", "Chosen patches and all that their tokens stand for."), ("fate_tree", "All patches")),
    ),
    "changes": Chapter(
        "Prediction changes",
        "Which images and classes decide otherwise under merging, and what accuracy a GMAC buys.",
        "Agreement and accuracy against GMACs hold for the model and these images, with the intervals given.",
        "The classes and images that change most are chosen for it: with others they would be others.",
        tables=_changes_table,
        captions=(
            ("changes_gmacs", "Accuracy, or agreement with r = 0, against GMACs."),
            ("changes_classes", "Classes that change most"),
            ("changes_images", "Images that change most"),
        ),
    ),
    "merged": Chapter(
        "Merged tokens",
        "Every group of patches in its mean colour, after four blocks. Only models that merge are shown.",
        captions=(("merged", "Groups of patches and how many tokens are left"),),
    ),
    "lost": Chapter(
        "Object localisation (LOST)",
        "Boxes found without any label from the features of the last block, beside a box that is the whole image.",
        "Features localise objects if LOST beats the whole image beyond the interval of the paired difference.",
        "At the level of the whole image CorLoc says nothing about features. The setting is that of one study "
        "(regs-small-vits), not tuned to these models.",
        flags=("--preset", "regs-small-vits"),
        tables=_lost_table,
        captions=(("lost_corloc", "CorLoc beside its baselines."), ("lost_", "Boxes found, hits and misses.")),
    ),
    "reconstruction": Chapter(
        "Patch reconstruction",
        "Can a linear probe read a patch's pixels and place from its token? Outliers against normal patches, and "
        "against normal patches of the same image that match in contrast, likeness to their neighbours or brightness.",
        "Outlier tokens hold less of their own patch if the matched ratios are above 1 beyond their intervals.",
        "The unmatched ratio alone mixes what outliers are with where they sit. A linear probe shows what is easy to "
        "read, not all that is there.",
        tables=_reconstruction_table,
        captions=(
            ("reconstruction_errors", "Errors with 95 % intervals over images."),
            ("reconstruction_images", "What the probe makes of the tokens of images it has not seen."),
        ),
    ),
    "dynamics": Chapter(
        "Register dynamics",
        "Merging with registers protected, masked as the published code does, and unprotected.",
        "A rule matters for predictions if the paired difference is beyond two of its errors.",
        "Registers that were never trained say nothing about trained ones.",
        flags=("--keys", "0"),
        draws_images=False,
        tables=_dynamics_table,
        captions=(("dynamics", "Agreement with the unmerged model, and registers that still stand alone."),),
    ),
    "probes": Chapter(
        "Class from one token",
        "How well a single token tells the class: logistic regression and nearest neighbours. Needs a data set with "
        "labels and a train split.",
        "An outlier patch that tells the class better than a normal one holds global information.",
        "Sets of images differ: compare tokens within one set.",
        flags=("--draws", "3", "--C", "0.001", "0.01", "0.1", "1"),
        draws_images=False,
        tables=_probes_table,
        captions=(("probes", "Accuracy by kind of token."),),
    ),
    "ttr": Chapter(
        "Test-time registers",
        "Hidden units that are active at outlier patches of the first model, and what becomes of norms and attention "
        "when the first ten are moved to one extra empty token.",
        "Units with a high ratio are switched on by outliers.",
        "Where the choice of the block is not settled, the list would be another one on other images.",
        json="neurons",
        tables=_ttr_table,
        captions=(
            ("neurons", "Where outliers appear, how far they stand apart, and the units found."),
            ("applied", "Single images before and after."),
        ),
    ),
}
DEFAULT = ("norms", "attention", "similarity", "pca", "merged", "lost", "reconstruction")


# lost takes every image whole, at its own size
LEFT_OUT_FOR_LOST = ("--dataset", "--data_path", "--batch_size", "--input_size", "--eval_crop_ratio")


# Command


def add_parser(subparsers: Any) -> None:
    """Add the command `report`, which runs the commands that `subparsers` has by then, and those added later."""
    from .command import add_command

    text = "one HTML page with norms, attention, similarity, merged tokens, lost and tables for up to four models"
    parser = add_command(subparsers, "report", partial(run, subparsers.choices), text)
    parser.add_argument("--sections", nargs="+", choices=tuple(CHAPTERS), default=list(DEFAULT))
    parser.add_argument("--title", default="What registers and merging do to a ViT")
    parser.add_argument("--voc", type=Path, metavar="FOLDER", help="Pascal VOC tree for lost (else boxes on --data)")
    parser.add_argument("--show", type=int, default=4, metavar="K", help="images drawn per picture")


def run(commands: Mapping[str, Any], args: Namespace, main_argv: Sequence[str]) -> None:
    """Run the instruments one after the other, each into its own folder, and write report.html.

    Args:
        commands: the parser of every command by its name.
    """
    from utils import git_revision, log, versions

    from .command import Images, Output, load_models

    models = load_models(args, main_argv)
    if len(models) > MOST_MODELS:
        raise UserError(f"a report is on one to four models, not {len(models)}")
    if args.show < 1:
        raise UserError(f"--show must be at least 1, not {args.show}")
    if "png" not in args.format:
        raise UserError("a report embeds PNG; give --format png, with others if you like")
    data = Images(args, models[0]).note  # missing images are a mistake to tell now
    out = Output(args, main_argv, models)
    sections, contents, began = [_overview(models)], {}, time.monotonic()
    for number, name in enumerate(args.sections, start=1):
        left = _time_left(began, number - 1, len(args.sections))
        log(f"report: section {number} of {len(args.sections)}, {name}{left}")
        section, contents[name] = _section(commands, args, main_argv, models, name)
        sections.append(section)
    summary = _summary(contents, [loaded.label for loaded in models])
    sections = [*([summary] if summary else []), *sections]
    subtitle = f"{' and '.join(loaded.label for loaded in models)} \N{MIDDLE DOT} {data}"
    known = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    footer = (
        f"RegToMe {git_revision() or ''} \N{MIDDLE DOT} {known}. One run is one run: numbers hold for these images."
    )
    page = render(args.title, subtitle, sections, footer)
    (out.folder / "report.html").write_text(page, encoding="utf-8")
    log(f"wrote {out.folder / 'report.html'} ({len(page) / 1e6:.1f} MB)")


def _time_left(began: float, done: int, total: int) -> str:
    """Time spent, and what the sections left would take at the mean of those done."""
    spent = time.monotonic() - began
    if not done:
        return ""
    left = timedelta(seconds=round(spent / done * (total - done)))
    return f" ({timedelta(seconds=round(spent))} so far, about {left} left)"


def _overview(models: Sequence["Loaded"]) -> Section:
    columns = ("model", "weights", "pixels", "M parameters", "registers", "merges", "tokens per block", "GMACs")
    rows = []
    for loaded in models:
        info = loaded.info()
        row = (
            info["label"],
            Path(info["weights"]).name,
            " x ".join(map(str, info["input_size"])),
            sum(parameter.numel() for parameter in loaded.model.parameters()) / 1e6,
            info["num_registers"],
            "nothing" if info["r"] == "0" else f"{info['merge']} r={info['r']}",
            f"{info['tokens'][0]} … {info['tokens'][-1]}",
            info["gmacs"],
        )
        rows.append(row)
    same = "" if len(models) < 2 else "All of them see the same images; the first one is the baseline."
    return Section("models", "Models", "What is compared.", (Table(columns, tuple(rows)),), may=same)


def _section(
    commands: Mapping[str, Any], args: Namespace, main_argv: Sequence[str], models: Sequence["Loaded"], name: str
) -> tuple[Section, dict[str, Any]]:
    """Run one instrument into its own folder and gather what it wrote, and its numbers; its failure is told there."""
    from utils import RunError, log

    chapter, folder = CHAPTERS[name], Path(args.out) / name
    lines = _command_lines(args, main_argv, name, folder)
    command = "; ".join("python run/analyze.py " + shlex.join(words) for words in lines)
    began = time.time()
    try:
        if name == "merged":
            _draw_merged(args, models, folder)
        for words in lines:
            its_args, its_main_argv = commands[words[0]].parse_known_args(words[1:], Namespace(command=words[0]))
            its_args.run(its_args, its_main_argv)
    except (UserError, RunError) as error:
        log(f"report: {name} left out: {error}")
        return Section(name, chapter.title, chapter.text, problem=str(error), command=command), {}
    content = _read(folder / f"{chapter.json or name}.json")
    raw = {key: value for key, value in content.items() if key != "run"} or None
    pictures = _pictures(chapter, folder, began, models)
    tables = chapter.tables(content) if chapter.tables is not None else ()
    more: dict[str, Any] = {"raw": raw, "command": command, "may": chapter.may, "may_not": chapter.may_not}
    return Section(name, chapter.title, chapter.text, tables, pictures[0], more=pictures[1], **more), content


def _command_lines(args: Namespace, main_argv: Sequence[str], name: str, folder: Path) -> list[list[str]]:
    """The command lines of an instrument, without the program; none for merged tokens, which are drawn here."""
    if name == "merged":
        return []
    words: list[str] = []
    for flag in ("model", "weights"):
        if getattr(args, flag):
            words += [f"--{flag}", str(getattr(args, flag))]
    if args.models:  # test-time registers are found for one model, the baseline
        words += ["--models", *(args.models[:1] if name == "ttr" else args.models)]
    if name == "lost":
        main_argv = _without(main_argv, LEFT_OUT_FOR_LOST)
    if name == "lost" and args.voc:
        words += ["--voc", str(args.voc)]
    elif args.data:
        words += ["--data", *args.data]
    if CHAPTERS[name].draws_images:
        words += ["--show", str(args.show)]
    words += ["--dpi", str(args.dpi), "--format", *args.format]
    words += [*CHAPTERS[name].flags, *main_argv, "--out", str(folder)]
    if name == "ttr":
        return [["ttr", "find", *words], ["ttr", "apply", *words, "--neurons", str(folder / "neurons.json")]]
    return [[name, *words]]


def _without(main_argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Options of main.py less some that take one value."""
    kept: list[str] = []
    is_value = False
    for token in main_argv:
        named = token.partition("=")[0] in flags
        if not named and not is_value:
            kept.append(token)
        is_value = named and "=" not in token
    return kept


def _draw_merged(args: Namespace, models: Sequence["Loaded"], folder: Path) -> None:
    from .command import Images

    merging = [loaded for loaded in models if any(loaded.model.plan().merges)]
    if not merging:
        raise UserError("neither model merges tokens; give --r, for instance --r 16")
    folder.mkdir(parents=True, exist_ok=True)
    for loaded in merging:
        chosen = Images(args, loaded, title="merged tokens", limit=args.show)
        images, shown = chosen.load()
        as_tensor = torch.from_numpy(shown).permute(0, 3, 1, 2)
        options: dict[str, Any] = {"pictures": as_tensor, "captions": chosen.names(), "label": loaded.label}
        result = merged_tokens.measure(loaded.model, images, **options)
        merged_tokens.draw(result).save(folder / f"merged_{loaded.slug}.png")


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return content


def _pictures(
    chapter: Chapter, folder: Path, began: float, models: Sequence["Loaded"]
) -> tuple[tuple[EmbeddedPng, ...], tuple[EmbeddedPng, ...]]:
    """The files of a folder, less those of earlier runs, by the chapter's captions and then as they were written.

    Returns:
        Those that are shown, and those that are folded away. A picture of one model has its name in the caption.
    """
    dated = sorted((file.stat().st_mtime_ns, file) for file in folder.glob("*.png"))
    left = [file for written, file in dated if written >= (began - 1) * 1e9]
    shown: list[EmbeddedPng] = []
    folded: list[EmbeddedPng] = []
    labels = {loaded.slug: loaded.label for loaded in models}
    for start, caption in chapter.captions:
        for file in [file for file in left if file.name.startswith(start)]:
            left.remove(file)
            of = next((label for slug, label in labels.items() if file.stem.endswith(f"_{slug}")), None)
            text = caption if of is None else f"{of}: {caption[0].lower()}{caption[1:].rstrip('.')}."
            where = folded if file.name.startswith(chapter.folded or ("/",)) else shown
            where.append(EmbeddedPng(file.read_bytes(), text))
    return tuple(shown), tuple(folded)
