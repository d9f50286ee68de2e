"""The formula of multiply-adds (models/gmacs.py): published anchors, and torch's own counter."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from models import MergeConfig, MergingViT, UserError, apply_merging, create_model
from models.gmacs import gmacs

pytestmark = pytest.mark.filterwarnings("ignore:r=.* is more than")
FAST = MergeConfig(method="mctf", r=0.35, activate_layers=(3, 6, 9))


@pytest.mark.parametrize(
    ("name", "merge", "expected"),
    [
        ("deit_tiny", MergeConfig(method="none"), 1.254),
        ("deit_small", MergeConfig(method="none"), 4.599),
        ("deit_tiny", MergeConfig(method="mctf", r=16), 0.704),
        ("deit_small", MergeConfig(method="mctf", r=16), 2.592),
        ("deit_tiny", MergeConfig(method="mctf", r=13), 0.801),
        ("deit_tiny", FAST, 0.749),
        ("deit_small", FAST, 2.758),
        ("deit_tiny", MergeConfig(method="tome", r=8), 0.924),
        ("deit_tiny", MergeConfig(method="tome", r=13), 0.731),
        ("deit_tiny", MergeConfig(method="tome", r=16), 0.622),
        ("deit_tiny", MergeConfig(method="tome", r=20, dense_layers=3), 0.805),
    ],
)
def test_anchors(name: str, merge: MergeConfig, expected: float) -> None:
    with torch.device("meta"):
        model = create_model(name, merge=merge)
    assert gmacs(model) == pytest.approx(expected, abs=0.00055)


def test_registers_anchors() -> None:
    model = MergingViT(num_classes=10, dim=384, heads=6, mlp_dim=1536, num_registers=4)
    found = [gmacs(model, r) for r in (0, 16, "(16,-1)")]
    assert found == pytest.approx([4.698, 2.384, 1.629], abs=0.00055)


def test_plan_image_and_schedule_agree() -> None:
    model = create_model("deit_digits", merge=MergeConfig(method="tome", r=8), dynamic_img_size=True)
    assert gmacs(model) == gmacs(model, 8) == gmacs(model, model.plan(8)) == gmacs(model, img=(32, 32))
    assert gmacs(model, img=64) > 4 * gmacs(model)
    with pytest.raises(UserError):
        gmacs(model, -1)


MERGES = {
    "none": MergeConfig(method="none"),
    "tome": MergeConfig(r=16),
    "tome-attention": MergeConfig(r=16, pooling="attention", bidirectional=True),
    "lgtm": MergeConfig(method="lgtm", r=8),
    "on": MergeConfig(method="mctf", r=16),
    "fast": MergeConfig(method="mctf", r=0.35, activate_layers=(3, 6, 9)),
    "off": MergeConfig(method="mctf", r=16, one_step_ahead="off"),
    "precise": MergeConfig(method="mctf", r=16, one_step_ahead="precise"),
    "max": MergeConfig(method="mctf", r=16, pooling="max"),
    "pitome": MergeConfig(method="pitome", r=16),
    "regtome": MergeConfig(method="regtome", r=16),
}


def counted(model: MergingViT, side: int) -> float:
    for block in model.blocks:
        block.attn.fused_attn = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_formula_is_what_runs(merge: MergeConfig) -> None:
    model = create_model("deit_tiny", num_registers=3, merge=merge).eval()
    # the formula leaves matching out: PiToMe compares all pairs of tokens, RegToMe in full width, ToMe a quarter
    rel = {"pitome": 0.03, "regtome": 0.06}.get(merge.method, 0.02)
    assert gmacs(model, inference=True) == pytest.approx(counted(model, 224), rel=rel)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224), trace=True)
    assert gmacs(model) == pytest.approx(counter.get_total_flops() / 2e9, rel=rel)


@pytest.mark.parametrize(
    "options",
    [
        {"register_layer": 4, "class_layer": 8, "num_registers": 4},
        {"mlp_dim": 300, "num_registers": 0},
        {"distilled": True, "class_layer": 3},
    ],
    ids=["late", "mlp", "distilled"],
)
def test_formula_follows_the_model(options: dict[str, int]) -> None:
    model = MergingViT(224, 16, 100, dim=192, depth=12, heads=3, **({"mlp_dim": 768} | options), r=9).eval()
    assert gmacs(model, inference=True) == pytest.approx(counted(model, 224), rel=0.02)


def test_attention_pooling_head() -> None:
    vit = VisionTransformer(img_size=64, patch_size=8, embed_dim=96, depth=2, num_heads=3, global_pool="map")
    model = apply_merging(vit.eval().requires_grad_(False), MergeConfig(r=4))
    model.attn_pool.fused_attn = False
    assert gmacs(model) == pytest.approx(counted(model, 64), rel=0.02)
