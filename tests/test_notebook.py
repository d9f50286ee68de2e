"""Instruments on a model in memory, as in a notebook: no command line, no files, plain tensors."""

import re
import runpy
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from analysis import attention, norms, similarity
from analysis.outliers import Rule
from models import MergeConfig, UserError

INSTRUMENTS: tuple[Any, ...] = (norms, attention, similarity)


def seen_by_hooks(model: torch.nn.Module, names: list[str], images: Tensor) -> dict[str, Tensor]:
    """Outputs of modules of timm's own model, with dots in their names."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name in names
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return seen


def test_norms_are_those_that_hooks_on_timms_model_see() -> None:
    model, images = tiny.timm_vit(), tiny.images(5)
    result = norms.measure(model, images, label="plain")
    seen = seen_by_hooks(model, [*(f"blocks.{index}" for index in range(3)), "norm"], images)
    assert result.stages == ["input", "0", "1", "2", "final norm"] and result.images == 5
    for stage, name in enumerate(("blocks.0", "blocks.1", "blocks.2", "norm"), start=1):
        lengths = seen[name].norm(dim=-1)
        assert result.patches[stage].mean == pytest.approx(float(lengths[:, 1:].mean()), rel=1e-6)
        assert result.patches[stage].largest == pytest.approx(float(lengths[:, 1:].max()), rel=1e-6)
        assert result.prefix[stage]["class"].mean == pytest.approx(float(lengths[:, 0].mean()), rel=1e-6)
    np.testing.assert_allclose(result.at_layer, seen["blocks.2"].norm(dim=-1)[:, 1:].numpy(), rtol=1e-5)
    maps = norms.norm_maps(model, images)
    assert np.array_equal(maps.reshape(5, -1), result.at_layer) and maps.shape == (5, 4, 4)


def test_numbers_of_norms_by_hand() -> None:
    model, images = tiny.ours(MergeConfig(r=3), num_registers=2), tiny.images(6)
    first, second = norms.measure(model, images, layer=1), norms.measure(model, images * 2, layer=1)
    rule = Rule("ratio", 1.2)
    row = norms.summarise(second, rule, baseline=first)["outliers"]
    cut = 1.2 * first.judged.quantile(0.5)
    assert row["shared"]["cut"] == pytest.approx(cut) and row["ratio:1.2"]["cut"] == rule.cut(second.judged)
    above = second.at_layer > cut
    assert row["shared"]["share"] == pytest.approx(above.mean())
    assert row["shared"]["per_image"] == pytest.approx(above.sum(axis=1).mean())
    assert row["shared"]["images_without"] == pytest.approx((above.sum(axis=1) == 0).mean())
    np.testing.assert_allclose(norms.outlier_frequency(second, cut), above.mean(axis=0).reshape(4, 4))
    assert norms.summarise(first, rule)["outliers"]["shared"] == norms.summarise(first, rule)["outliers"]["ratio:1.2"]


def test_attention_is_timms() -> None:
    model, images = tiny.timm_vit(), tiny.images(4)
    result, heads = attention.measure(model, images), 3
    seen = seen_by_hooks(model, ["blocks.1.attn.qkv"], images)["blocks.1.attn.qkv"]
    query, key, _ = seen.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    maps = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(dim=-1)  # (B,H,N,N)
    means = result.means()
    assert list(means) == ["class", "mean of patches"]
    np.testing.assert_allclose(means["class"]["class"][1], maps[:, :, 0, 0].mean(dim=0), rtol=1e-5)
    np.testing.assert_allclose(
        means["mean of patches"]["patches"][1], maps[:, :, 1:, 1:].sum(-1).mean((0, 2)), rtol=1e-5
    )
    share = maps[:, :, 0, 1:] / maps[:, :, 0, 1:].sum(dim=-1, keepdim=True)
    entropy = -(share * share.log()).sum(dim=-1) / np.log(tiny.PATCHES)
    np.testing.assert_allclose(means["class"]["entropy"][1], entropy.mean(dim=0), rtol=1e-5)
    np.testing.assert_allclose(means["class"]["top_patch"][1], share.amax(dim=-1).mean(dim=0), rtol=1e-5)
    taken = attention.attention_maps(model, images, np.zeros((4, 32, 32, 3)), layer=1, patches=[(0, 1)])
    np.testing.assert_allclose(taken.rows[:, :, 0].reshape(4, heads, -1), maps[:, :, 0, 1:], rtol=1e-4)
    np.testing.assert_allclose(taken.patches[:, :, 0].reshape(4, heads, -1), maps[:, :, 2, 1:], rtol=1e-4)


def test_similarity_is_that_of_all_pairs() -> None:
    model, images = tiny.timm_vit(), tiny.images(3)
    result = similarity.measure(model, images, rule=Rule("quantile", 0.8))
    tokens = seen_by_hooks(model, ["blocks.2"], images)["blocks.2"][:, 1:]
    outlier = tokens.norm(dim=-1) > result.cut
    cosines = F.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1)
    pairs = (outlier[:, :, None] & outlier[:, None]) & ~torch.eye(tiny.PATCHES, dtype=torch.bool)
    assert result.raw.means()["outlier-outlier"] == pytest.approx(float(cosines[pairs].mean()), abs=1e-5)
    torch.testing.assert_close(result.mean, tokens.mean(dim=(0, 1)))
    assert result.neighbours.counts.sum() == 3 * 4 * 4 * 3
    assert result.cka.shape == (5, 5) and np.allclose(np.diag(result.cosine), 1, atol=1e-5)


def plain(value: Any) -> Any:
    """Numbers in one flat list, to be compared."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in plain(item)]
    if isinstance(value, list):
        return [number for item in value for number in plain(item)]
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize("instrument", INSTRUMENTS)
def test_images_come_in_several_forms(instrument: Any) -> None:
    model, images = tiny.ours(MergeConfig(r=3), num_registers=1), tiny.images(20)
    whole = plain(instrument.summarise(instrument.measure(model, images)))
    loader = DataLoader(TensorDataset(images, torch.zeros(20)), batch_size=7)
    for batches in ([images[:3], images[3:]], loader):
        numbers = plain(instrument.summarise(instrument.measure(model, batches)))
        np.testing.assert_allclose(numbers, whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("instrument", INSTRUMENTS)
def test_measuring_changes_no_model(instrument: Any) -> None:
    merging = tiny.ours(MergeConfig(r=3), num_registers=1, drop_path_rate=0.5)
    plain_vit = tiny.timm_vit(drop_path_rate=0.5)
    for model in (merging, plain_vit):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.train()
        state = torch.get_rng_state()
        first, second = (instrument.summarise(instrument.measure(model, tiny.images(3))) for _ in range(2))
        np.testing.assert_array_equal(plain(first), plain(second))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training for module in model.modules())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("instrument", INSTRUMENTS)
def test_mistakes(instrument: Any) -> None:
    model = tiny.ours(num_registers=1)
    with pytest.raises(UserError, match="none of the images"):
        instrument.measure(model, [])
    if instrument is not attention:
        with pytest.raises(UserError, match=r"layer is 3, but mine has blocks 0\.\.2"):
            instrument.measure(model, tiny.images(1), layer=3, label="mine")


def test_two_passes_need_more_than_a_generator() -> None:
    with pytest.raises(UserError, match="not a generator"):
        similarity.measure(tiny.ours(), (images for images in [tiny.images(2)]))


def test_a_figure_of_one_result_and_of_several() -> None:
    model, images = tiny.ours(MergeConfig(r=3), num_registers=2), tiny.images(4)
    plain_result, merged = norms.measure(model, images, label="a"), norms.measure(tiny.timm_vit(), images, label="b")
    figure = norms.draw([plain_result, merged])
    assert isinstance(figure, Figure) and len(figure.axes) == 3  # two models and the colour bar
    labels = [line.get_label() for line in figure.axes[0].lines if not line.get_label().startswith("_")]
    assert labels == ["patches, median", "class, mean", "registers, mean of each"]
    first_register = figure.axes[0].lines[-1].get_ydata()
    assert first_register[-1] == pytest.approx(plain_result.prefix[3]["register 2"].mean)
    assert figure.axes[1].get_title(loc="left") == "b  (4 images)"
    assert len(norms.draw(merged).axes) == 2
    for draw in (norms.draw_histogram, norms.draw_token_types, norms.draw_positions):
        assert isinstance(draw([plain_result, merged]), Figure)
    pictures = np.zeros((4, 32, 32, 3))
    maps = norms.norm_maps(model, images)
    assert len(norms.draw_images(plain_result, pictures, maps).axes) == 4 * 2


def test_figures_of_attention() -> None:
    model, images = tiny.ours(MergeConfig(r=3), num_registers=2), tiny.images(2)
    results = [attention.measure(model, images, label=label) for label in "abc"]
    figure = attention.draw(results)
    assert [len(ax.lines) for ax in figure.axes[3:]] == [2 * 3 + 1] * 3  # a mean and a dotted line per model
    maps = attention.attention_maps(model, images, np.zeros((2, 32, 32, 3)), label="mine")
    assert maps.layers.shape == (2, 3, 4, 4) and maps.rollout.shape == (2, 4, 4)
    titles = [ax.get_title() for ax in attention.draw_maps(maps).axes[:7]]
    assert titles == ["input", "class, raw", "class", "register 1", "register 2", "mean of patches", "rollout"]
    assert len(attention.draw_heads(maps).axes) == 2 * (1 + 3)
    assert len(attention.draw_patches(maps).axes) == 2 * (1 + 3)
    assert len(attention.draw_layers(maps).axes) == 2 * (1 + 3)
    assert len(attention.draw_compare([maps, maps]).axes) == 2 * (1 + 2)


def test_figures_of_similarity() -> None:
    model, images = tiny.ours(MergeConfig(r=3), num_registers=2), tiny.images(4)
    result = similarity.measure(model, images, label="mine")
    rows = [label.get_text() for label in similarity.draw(result).axes[0].get_yticklabels()]
    assert {"normal-normal", "normal-class", "normal-registers", "normal-normal across images"} <= set(rows)
    assert similarity.draw_neighbours(result).axes[0].get_title(loc="left").startswith("mine: AUC")
    assert len(similarity.draw_layers([result, result]).axes) == 2 * 2 * 2  # each with its colour bar
    assert len(similarity.draw_maps(result).axes[0].texts) == 3 * 3


def test_the_documented_example_runs(repo: Path, tmp_path: Path) -> None:
    text = (repo / "docs" / "analysis.md").read_text()
    example = re.search(r"## From a notebook\n\n(.+?)\n\n`measure`", text, re.S)
    assert example
    images = tiny.images(6)
    names: dict[str, Any] = {"model": tiny.timm_vit(), "another": norms.measure(tiny.ours(), images), "images": images}
    file = tmp_path / "example.py"
    file.write_text(textwrap.dedent(example[1]))
    runpy.run_path(str(file), {**names, "loader": [images], "pictures": np.zeros((4, 32, 32, 3))})
