"""Report: one HTML page that gathers the figures and tables of several instruments for one or two models.

Command: run/analyze.py report. It runs the other commands and reads the files they write, so there is nothing to
measure here.
"""

import json
import shlex
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models import UserError

from . import merged_tokens
from .html import EmbeddedPng, Section, Table, render

if TYPE_CHECKING:
    from .command import Loaded

Columns = tuple[tuple[str, str], ...]  # name of a line of the table, path of its value in a model's row


def lookup(content: Any, path: str) -> Any:
    """A value deep in nested dictionaries, by a path such as outliers/shared/share; None where it is missing.

    A path that ends in *100 gives the value in %.
    """
    path, _, factor = path.partition("*")
    for key in path.split("/"):
        if not isinstance(content, dict) or key not in content:
            return None
        content = content[key]
    return content * float(factor) if factor and content is not None else content


# Tables of single instruments, from their json


def _attention_table(content: dict[str, Any]) -> tuple[Table, ...]:
    """Metrics of class token and registers in the last block."""
    names = {
        "entropy": "entropy (1: even)",
        "top_patch": "top patch's share",
        "registers": "mass on registers",
        "patches": "mass on patches",
    }
    rows = []
    for row in content["models"]:
        for token_type, metrics in row["per_block"].items():
            last = [metrics[name][-1] if metrics.get(name) else None for name in names]
            rows.append((row["label"], row["n_images"], token_type, *last))
    return (Table(("model", "images", "token", *names.values()), tuple(rows), "last block, mean over heads"),)


def _similarity_table(content: dict[str, Any]) -> tuple[Table, ...]:
    neighbours = (
        ("outlier", "neighbours/outlier_mean"),
        ("normal", "neighbours/normal_mean"),
        ("AUC", "neighbours/auc"),
    )
    first = tuple((row["label"], *(lookup(row, path) for _, path in neighbours)) for row in content["models"])
    title = "cosine of a patch embedding to its neighbours; AUC: chance that an outlier's is larger"
    tables = [Table(("model", *(name for name, _ in neighbours)), first, title)]
    pairs = list(dict.fromkeys(name for row in content["models"] for name in row["cosines_centred"]))
    if pairs:
        rows = tuple((name, *(row["cosines_centred"].get(name) for row in content["models"])) for name in pairs)
        labels = (row["label"] for row in content["models"])
        tables.append(Table(("", *labels), rows, "cosines of tokens, less the mean token"))
    return tuple(tables)


def _lost_table(content: dict[str, Any]) -> tuple[Table, ...]:
    rows = tuple((row["label"], row["n_images"], row["corloc"], row["dino_seg"]) for row in content["models"])
    if all(row[2] is None for row in rows):
        return ()
    return (Table(("model", "images", "CorLoc, LOST (%)", "CorLoc, DINO-seg (%)"), rows),)


def _dynamics_table(content: dict[str, Any]) -> tuple[Table, ...]:
    columns = {
        "label": "model",
        "R": "R",
        "r": "r",
        "rule": "rule",
        "n_images": "images",
        "agree": "agree %",
        "agree_minus_protected": "minus protected",
        "agree_minus_protected_se": "± (paired)",
        "kl": "KL, nats",
        "registers_alone_last": "registers alone at the end",
    }
    rows = tuple(tuple(row[key] for key in columns) for row in content["rows"])
    return (Table(tuple(columns.values()), rows, "± one standard error over images"),)


def _probes_table(content: dict[str, Any]) -> tuple[Table, ...]:
    columns = ("model", "train images", "test images", "token", "linear", "± std", "nearest neighbours", "± std")
    keys = ("linear", "linear_std", "knn", "knn_std")
    rows = tuple(
        (row["label"], row["n_train"], row["n_test"], token_type, *(accuracies[key] for key in keys))
        for row in content["models"]
        for token_type, accuracies in row["kinds"].items()
    )
    return (Table(columns, rows, "std over draws of the token"),)


def _ttr_table(content: dict[str, Any]) -> tuple[Table, ...]:
    ranked = zip(content["ranked"], content["scores"], content["scores_elsewhere"], strict=True)
    rows = tuple((f"{block}: {unit}", at, elsewhere) for (block, unit), at, elsewhere in ranked)
    caption = f"{content['n_images_with_outliers']} of {content['n_images']} images have outliers"
    return (Table(("block: unit", "mean |activation| at outliers", "elsewhere"), rows, caption),)


# What is on the page


@dataclass(frozen=True)
class Chapter:
    """An instrument on the page.

    Attributes:
        text: what to look for.
        flags: more flags of its command.
        draws_images: whether its command has --show.
        json: name of the file with its numbers; "" for the name of the command.
        columns: lines of the table with a column per model, where there are no `tables` of its own.
        tables: makes them of the json.
        captions: start of a picture's file name -> caption. Pictures come in this order; others are left out.
    """

    title: str
    text: str
    flags: tuple[str, ...] = ()
    draws_images: bool = True
    json: str = ""
    columns: Columns = ()
    tables: Callable[[dict[str, Any]], tuple[Table, ...]] | None = None
    captions: tuple[tuple[str, str], ...] = ()


CHAPTERS = {
    "norms": Chapter(
        "Token norms",
        "A few patch tokens may grow far longer than the rest and serve as scratch space. Registers are meant to take "
        "that role over. A quantile always calls its share outliers; whether there are two heaps at all is what the "
        "coefficients of bimodality say.",
        columns=(
            ("images", "n_images"),
            ("shared cut", "outliers/shared/cut"),
            ("above it (%)", "outliers/shared/share*100"),
            ("above mean + 3 std (%)", "outliers/sigma:3/share*100"),
            ("above 3 medians (%)", "outliers/ratio:3/share*100"),
            ("variance between heaps", "bimodality/otsu_between"),
            ("Sarle", "bimodality/sarle"),
        ),
        captions=(
            ("norms_layers", "Norms of patch tokens over the blocks; lines: class token and registers."),
            ("norms_histogram", "Patch norms at the chosen block, all models on the same bins."),
            ("norms_kinds", "Norms by kind of token."),
            ("norms_positions", "Where on the grid outliers sit."),
            ("norms_images", "Single images; outliers outlined in red."),
        ),
    ),
    "attention": Chapter(
        "Attention",
        "Where class token and registers look in the last block, spread back to the patch grid where tokens merged.",
        tables=_attention_table,
        captions=(
            ("attention_metrics", "Concentration of the attention, and what it is spent on, over the blocks."),
            ("attention_compare", "The models side by side."),
            ("attention_layers", "Class token's attention block by block."),
            ("attention_heads", "Head by head."),
            ("attention_patches", "From single patches to all."),
            ("attention_", "Mean over heads."),
        ),
    ),
    "similarity": Chapter(
        "Similarity",
        "Are outliers redundant, are they alike? Cosines of patch embeddings to their neighbours, of tokens among each "
        "other, of layers.",
        draws_images=False,
        tables=_similarity_table,
        captions=(
            ("similarity_neighbours", "Cosine of a patch embedding to its neighbours, outlier and normal patches."),
            ("similarity_outliers", "Cosines among outliers, among normal tokens and across."),
            ("similarity_layers", "Likeness of layers."),
            ("similarity_maps", "Likeness of the attention maps of class token and registers."),
        ),
    ),
    "merged": Chapter(
        "Merged tokens",
        "Every group of patches in its mean colour, after four blocks. Only models that merge are shown.",
        captions=(("merged", "Groups of patches and how many tokens are left."),),
    ),
    "lost": Chapter(
        "Object localisation (LOST)",
        "Boxes found without any label from the keys of the last block. CorLoc is the share of images whose box "
        "overlaps an object by half or more.",
        tables=_lost_table,
        captions=(("lost_", "Boxes found, and where there is a ground truth, that too."),),
    ),
    "reconstruction": Chapter(
        "Patch reconstruction",
        "Can a linear probe read a patch's pixels and place from its token? Outliers against normal patches, and "
        "against normal patches of the same image that match in contrast, likeness to their neighbours or brightness.",
        columns=(
            ("images held back", "n_test"),
            ("MSE, normal", "mse/normal"),
            ("MSE, outlier", "mse/outlier"),
            ("ratio", "mse/ratio"),
            ("ratio, same contrast", "matched/contrast/ratio"),
            ("ratio, same brightness", "matched/brightness/ratio"),
            ("explained, normal", "explained/normal"),
            ("explained, outlier", "explained/outlier"),
            ("place top-1 %, normal", "position/top1/normal"),
            ("place top-1 %, outlier", "position/top1/outlier"),
        ),
        captions=(
            ("reconstruction_errors", "Errors with 95 % intervals over images."),
            ("reconstruction_images", "What the probe makes of the tokens."),
        ),
    ),
    "dynamics": Chapter(
        "Register dynamics",
        "Merging with registers protected, masked as the published code does, and unprotected.",
        flags=("--keys", "0"),
        draws_images=False,
        tables=_dynamics_table,
        captions=(("dynamics", "Agreement with the unmerged model, and registers that still stand alone."),),
    ),
    "probes": Chapter(
        "Class from one token",
        "How well a single token tells the class: logistic regression and nearest neighbours, test top-1 in %. Needs a "
        "data set with labels and a train split.",
        flags=("--draws", "3", "--C", "0.001", "0.01", "0.1", "1"),
        draws_images=False,
        tables=_probes_table,
        captions=(("probes", "Accuracy by kind of token."),),
    ),
    "ttr": Chapter(
        "Test-time registers",
        "Hidden units that are active at outlier patches of the first model, and what becomes of norms and attention "
        "when the first ten are moved to one extra empty token.",
        json="neurons",
        tables=_ttr_table,
        captions=(
            ("neurons", "Where outliers appear, how far they stand apart, and the units found."),
            ("applied", "Single images before and after."),
        ),
    ),
}
DEFAULT = ("norms", "attention", "similarity", "merged", "lost", "reconstruction")


# lost takes every image whole, at its own size
LEFT_OUT_FOR_LOST = ("--dataset", "--data_path", "--batch_size", "--input_size", "--eval_crop_ratio")


# Command


def add_parser(subparsers: Any) -> None:
    """Add the command `report`, which runs the commands that `subparsers` has by then, and those added later."""
    from .command import add_command

    text = "one HTML page with norms, attention, similarity, merged tokens, lost and tables for one or two models"
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
    if len(models) > 2:
        raise UserError(f"a report is on one or two models, not {len(models)}")
    if args.show < 1:
        raise UserError(f"--show must be at least 1, not {args.show}")
    number_of_images = len(Images(args, models[0]))  # missing images are a mistake to tell now
    out = Output(args, main_argv, models)
    sections = [_overview(models)]
    for number, name in enumerate(args.sections, start=1):
        log(f"report: {name} ({number} of {len(args.sections)})")
        sections.append(_section(commands, args, main_argv, models, name))
    labels = " against ".join(loaded.label for loaded in models)
    subtitle = f"{labels} · {' '.join(args.data or [models[0].args.dataset])}, {number_of_images} images"
    known = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    footer = f"RegToMe {git_revision() or ''} · {known}. One run is one run: numbers hold for these images."
    page = render(args.title, subtitle, sections, footer)
    (out.folder / "report.html").write_text(page, encoding="utf-8")
    log(f"wrote {out.folder / 'report.html'} ({len(page) / 1e6:.1f} MB)")


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
    return Section("models", "Models", "What is compared.", (Table(columns, tuple(rows)),))


def _section(
    commands: Mapping[str, Any], args: Namespace, main_argv: Sequence[str], models: Sequence["Loaded"], name: str
) -> Section:
    """Run one instrument into its own folder and gather what it wrote; its failure is told on the page."""
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
        return Section(name, chapter.title, chapter.text, problem=str(error), command=command)
    content = _read(folder / f"{chapter.json or name}.json")
    raw = {key: value for key, value in content.items() if key != "run"} or None
    pictures = _pictures(chapter, folder, began)
    return Section(name, chapter.title, chapter.text, _tables(chapter, content), pictures, raw=raw, command=command)


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
        images, shown = Images(args, loaded, title="merged tokens", limit=args.show).load()
        as_tensor = torch.from_numpy(shown).permute(0, 3, 1, 2)
        result = merged_tokens.measure(loaded.model, images, pictures=as_tensor, label=loaded.label)
        merged_tokens.draw(result).save(folder / f"merged_{loaded.slug}.png")


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return content


def _pictures(chapter: Chapter, folder: Path, began: float) -> tuple[EmbeddedPng, ...]:
    """The files of a folder, less those of earlier runs, by the chapter's captions and then as they were written."""
    dated = sorted((file.stat().st_mtime_ns, file) for file in folder.glob("*.png"))
    left = [file for written, file in dated if written >= (began - 1) * 1e9]
    pictures = []
    for start, caption in chapter.captions:
        for file in [file for file in left if file.name.startswith(start)]:
            left.remove(file)
            pictures.append(EmbeddedPng(file.read_bytes(), caption))
    return tuple(pictures)


def _tables(chapter: Chapter, content: dict[str, Any]) -> tuple[Table, ...]:
    if chapter.tables is not None:
        return chapter.tables(content)
    rows = content.get("models", [])
    columns = [(title, path) for title, path in chapter.columns if any(lookup(row, path) is not None for row in rows)]
    if not columns:
        return ()
    cells = tuple((title, *(lookup(row, path) for row in rows)) for title, path in columns)
    return (Table(("", *(row["label"] for row in rows)), cells),)
