"""Instruments on timm's Eva: maps are those of the blocks, the slicing baseline, test-time registers, rules."""

import pytest
import torch
from evas import every_family, merging_eva, timm_eva
from tiny import images

from analysis import norms, register_dynamics
from analysis.ideal import ideal_model
from analysis.merged_tokens import has_token_scores, token_scores
from analysis.register_neurons import hidden_activations, hidden_width, shift_neurons
from analysis.walk import allow_any_size, attention, qkv, walk
from models import MergeConfig
from models.blocks import join_heads, project_out

pytestmark = pytest.mark.filterwarnings("ignore:r=.* is more than")


@every_family
def test_maps_and_activations_are_those_of_the_blocks(family: str) -> None:
    model = merging_eva(family, MergeConfig(r=3))
    x = images(2, tuple(model.patch_embed.img_size))
    for layer in walk(model, x):
        maps, block = attention(layer), layer.block
        torch.testing.assert_close(maps.sum(dim=-1), torch.ones(maps.shape[:3]))
        normed = block.norm1(layer.before.x)
        mixed = project_out(block.attn, normed, join_heads(maps @ qkv(layer)[2]))
        torch.testing.assert_close(mixed, block.attn(normed, **layer.attention_inputs), atol=1e-5, rtol=1e-4)
        if has_token_scores(layer.rule):
            assert token_scores(layer)
    for layer in walk(model, x, r=0):
        assert hidden_activations(layer).shape[-1] == hidden_width(layer.block.mlp)


@every_family
@pytest.mark.parametrize("method", ["tome", "mctf"])
def test_the_slicing_baseline_has_the_same_tokens(family: str, method: str) -> None:
    model = merging_eva(family, MergeConfig(method, 3))
    x = images(2, tuple(model.patch_embed.img_size))
    baseline = ideal_model(model)
    assert baseline(x).isfinite().all()
    counts = [layer.after.x.shape[1] for layer in baseline.layers(baseline.embed(x), baseline.plan())]
    assert tuple(counts) == model.plan().counts
    assert torch.equal(baseline(x, r=0), model(x, r=0))


@every_family
def test_images_of_any_size_for_an_instrument(family: str) -> None:
    model = merging_eva(family, MergeConfig(r=2))
    own = images(2, tuple(model.patch_embed.img_size))
    before = model(own)
    allow_any_size(model)
    torch.testing.assert_close(model(own), before)
    assert model(images(1, (50, 37)), trace=True).group.shape == (1, 7 * 5)


def test_a_timm_model_is_measured_and_shifted_and_its_registers_follow_every_rule() -> None:
    vit = timm_eva("dinov3-swiglu")
    result = norms.measure(vit, images(4))
    assert result.label == "model"
    model = merging_eva("dinov3-swiglu", MergeConfig(r=2))
    shifted = shift_neurons(model, [(1, 3)])
    assert shifted.num_registers == 5 and shifted(images()).isfinite().all()
    protected = register_dynamics.forward_under(model, images(), "protected")
    torch.testing.assert_close(protected.logits, model(images()))
    for rule in register_dynamics.RULES:
        assert register_dynamics.forward_under(model, images(), rule).logits.isfinite().all()
