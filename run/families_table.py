"""Every family of backbones, checked without public weights: what is exact, what it costs, and where it runs.

    python run/families_table.py --out families
    python run/families_table.py --families DINOv3 "RoPE-ViT, mixed" --no_onnx

One model of timm for each family, cut to two blocks, with random weights, at a small image size. The columns: the
largest difference of logits from timm's own model at r = 0 (fp32, bf16); that of tokens between patches that are there
twice and the same ones merged into tokens of size 2 (fp32); multiply-adds by formula over those that torch counts,
without and with merging; whether it compiles to one graph; the largest difference of logits from the ONNX file in
onnxruntime.
"""

import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import interrupts  # noqa: F401  # isort: skip  # first: Ctrl-C while the rest is imported

import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import options
from models import MergeConfig, MergingViT, apply_merging
from models.export import compare, export_onnx, load_onnx
from models.gmacs import gmacs
from models.tokens import Tokens
from utils import table, write_table

# timm's name, and image size in pixels
FAMILIES: dict[str, tuple[str, int | tuple[int, int]]] = {
    "DeiT": ("deit_tiny_patch16_224", 96),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", 96),
    "DeiT-III": ("deit3_small_patch16_224", 96),
    "DINOv2, registers": ("vit_small_patch14_reg4_dinov2", 84),
    "DINOv3": ("vit_small_patch16_dinov3_qkvb", 96),
    "DINOv3, SwiGLU": ("vit_small_plus_patch16_dinov3", 96),
    "LingBot": ("vit_small_patch16_lingbot", 96),
    "EVA": ("eva_giant_patch14_clip_224", 56),
    "EVA-02": ("eva02_tiny_patch14_224", 84),
    "EVA-02, q k v apart": ("eva02_base_patch16_clip_224", 96),
    "RoPE, registers, gap": ("vit_betwixt_patch16_rope_reg4_gap_256", 96),
    "RoPE-ViT": ("vit_small_patch16_rope_ape_224", 96),
    "RoPE-ViT, mixed": ("vit_small_patch16_rope_mixed_224", 96),
    "Perception Encoder, core": ("vit_pe_core_tiny_patch16_384", 96),
    "Perception Encoder, spatial": ("vit_pe_spatial_tiny_patch16_512", 96),
    "Sapiens2": ("vit_large_patch16_sapiens2", (96, 64)),
}
MERGE = MergeConfig(r=4)


def build(family: str) -> Any:
    """timm's model of a family with two blocks, in evaluation mode, whose LayerScale and head are of a trained size."""
    name, size = FAMILIES[family]
    grouped = {"num_kv_heads": (16, 8)} if family == "Sapiens2" else {}  # of its 24 blocks, too, only some are grouped
    torch.manual_seed(0)
    vit = timm.create_model(name, depth=2, img_size=size, num_classes=10, **grouped).eval().requires_grad_(False)
    for key, parameter in vit.named_parameters():
        if "gamma" in key:
            parameter.fill_(0.5)
        elif key.startswith("head") and key.endswith("weight"):
            parameter.normal_(std=0.1)
    return vit


def example(model: MergingViT, batch: int = 2) -> Tensor:
    """Random images (B,3,H,W) of the model's size."""
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def from_timm(vit: Any, dtype: torch.dtype) -> float:
    """The largest difference of logits at r = 0."""
    vit = vit.to(dtype)
    model = apply_merging(vit, MERGE).eval()
    x = example(model).to(dtype)
    return float((model(x, r=0) - vit(x)).abs().max())


@torch.no_grad()
def from_duplicates(model: MergingViT) -> float:
    """The largest difference between tokens of size 2 and what two equal patches in the same place become."""
    tokens = model.embed(example(model))
    index = torch.arange(0, tokens.x.shape[1] - 1, 2)
    double, single = (taken(tokens, which) for which in (index.repeat_interleave(2), index))
    single = single._replace(size=2 * single.size, sizes_differ=True)
    after = []
    for state in (double, single):
        for layer in model.layers(state, model.plan(0, state.x.shape[1])):
            state = layer.after
        after.append(state.x)
    prefix = model.num_prefix_tokens
    apart = torch.cat((after[0][:, :prefix], after[0][:, prefix::2]), dim=1)
    return float((apart - after[1]).abs().max())


def taken(tokens: Tokens, index: Tensor) -> Tokens:
    """Some patches with their positions."""
    positions = None if tokens.positions is None else tokens.positions.take(index)
    return tokens._replace(x=tokens.x[:, index], size=tokens.size[:, index], positions=positions)


@torch.no_grad()
def formula_over_count(model: MergingViT, r: Any) -> float:
    """Multiply-adds by formula over those that torch counts; matching and merging are in the count alone."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        model(example(model, 1), r=r)
    return 2e9 * gmacs(model, r) / counter.get_total_flops()


@torch.no_grad()
def compiles(model: MergingViT) -> bool:
    """Whether the model is one graph for torch.compile, with the same logits."""
    torch._dynamo.reset()
    x = example(model)
    return torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(x), model(x), atol=1e-4)


def from_onnx(model: MergingViT) -> float:
    """The largest difference of logits from the ONNX file, over two batches."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export_onnx(model, example(model, 2), file)
        rows = compare(model, load_onnx(file), [example(model, batch) for batch in (1, 3)])
    return max(row.difference for row in rows)


def measure(args: Namespace) -> list[dict[str, Any]]:
    """One row per family."""
    rows: list[dict[str, Any]] = []
    for family in args.families or FAMILIES:
        model = apply_merging(build(family), MERGE).eval()
        row = {"family": family, "model": FAMILIES[family][0]}
        row |= {f"r0_{name}": from_timm(build(family), getattr(torch, name)) for name in ("float32", "bfloat16")}
        row |= {"duplicates": from_duplicates(model), "one_graph": compiles(model)}
        row["onnx"] = None if args.no_onnx else from_onnx(model)
        row |= {"macs": formula_over_count(model, 0), "macs_merging": formula_over_count(model, None)}
        print(row, file=sys.stderr)
        rows.append(row)
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table in markdown."""
    headers = (
        "family",
        "r = 0, fp32",
        "r = 0, bf16",
        "duplicates",
        "MACs, r = 0",
        "MACs, merging",
        "one graph",
        "ONNX",
    )
    texts = []
    for row in rows:
        exact = [f"{row[key]:.1g}" for key in ("r0_float32", "r0_bfloat16", "duplicates")]
        costs = [f"{row[key]:.4f}" for key in ("macs", "macs_merging")]
        onnx = "" if row["onnx"] is None else f"{row['onnx']:.1g}"
        texts.append([row["family"], *exact, *costs, "yes" if row["one_graph"] else "no", onnx])
    return table(headers, texts) + "\n"


def build_parser() -> options.Parser:
    parser = options.Parser(prog="families_table.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--families", nargs="+", choices=tuple(FAMILIES), metavar="NAME", help=", ".join(FAMILIES))
    parser.add_argument("--no_onnx", action="store_true", help="leave the slowest column out")
    parser.add_argument("--out", help="file to write, with .json and .md")
    return parser


def run(argv: Sequence[str]) -> None:
    """Measure, print and write the table."""
    args = build_parser().parse(argv)
    rows = measure(args)
    if args.out:
        write_table(args.out, {"rows": rows}, markdown(rows))
    print(markdown(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0, or 2 after the user's mistake."""
    return options.exit_status("families_table.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
