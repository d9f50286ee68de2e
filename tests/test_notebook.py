"""Instruments on a model in memory, as in a notebook: no command line, no files, plain tensors."""

import json
import re
import runpy
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from analysis import attention, cka, norms, similarity
from analysis.commands import COMMANDS
from analysis.outliers import SCALED, SHARED, Rule, Yardstick
from models import MergeConfig, UserError
from run.notebook import code_cells, execute

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
    scaled = cut * second.judged.quantile(0.5) / first.judged.quantile(0.5)
    assert row["shared_scaled"]["cut"] == pytest.approx(scaled)
    gap = above.mean(axis=1) - (first.at_layer > cut).mean(axis=1)  # paired by image
    assert row["shared"]["share_minus_baseline"] == pytest.approx(gap.mean())
    low, high = row["shared"]["share_minus_baseline_ci95"]
    assert low < gap.mean() < high and high - low < 5 * gap.std()


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
    of_patches = maps[:, :, 1:, 1:] / maps[:, :, 1:, 1:].sum(dim=-1, keepdim=True)  # the average over patches of ...
    of_patch = -(of_patches * of_patches.log()).sum(dim=-1) / np.log(tiny.PATCHES)  # ... each patch's own entropy
    np.testing.assert_allclose(means["mean of patches"]["entropy"][1], of_patch.mean((0, 2)), rtol=1e-5)
    even = maps[:, :, 1:, 1:].mean(dim=2)
    assert of_patch.mean() < -(even * even.log()).sum(-1).mean() / np.log(tiny.PATCHES)  # the averaged map is evener
    np.testing.assert_allclose(result.of_images("class", "class")[:, 1], maps[:, :, 0, 0].mean(dim=1), rtol=1e-5)
    share = maps[:, :, 0, 1:] / maps[:, :, 0, 1:].sum(dim=-1, keepdim=True)
    entropy = -(share * share.log()).sum(dim=-1) / np.log(tiny.PATCHES)
    np.testing.assert_allclose(means["class"]["entropy"][1], entropy.mean(dim=0), rtol=1e-5)
    np.testing.assert_allclose(means["class"]["top_patch"][1], share.amax(dim=-1).mean(dim=0), rtol=1e-5)
    other = attention.measure(tiny.timm_vit(seed=1), images)
    paired = attention.summarise(other, result)["last_block_minus_baseline"]["class"]
    gap = other.of_images("class", "entropy")[:, -1] - result.of_images("class", "entropy")[:, -1]
    assert paired["entropy"] == pytest.approx(gap.mean()) and paired["entropy_ci95"] is None  # four images
    taken = attention.attention_maps(model, images, np.zeros((4, 32, 32, 3)), layer=1, patches=[(0, 1)])
    np.testing.assert_allclose(taken.rows[:, :, 0].reshape(4, heads, -1), maps[:, :, 0, 1:], rtol=1e-4)
    np.testing.assert_allclose(taken.patches[:, :, 0].reshape(4, heads, -1), maps[:, :, 2, 1:], rtol=1e-4)


def test_similarity_is_that_of_all_pairs() -> None:
    model, images = tiny.timm_vit(), tiny.images(3)
    result = similarity.measure(model, images, rule=Rule("quantile", 0.8))
    tokens = seen_by_hooks(model, ["blocks.2"], images)["blocks.2"][:, 1:]
    outlier = tokens.norm(dim=-1) > result.yardstick.cut
    cosines = F.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1)
    pairs = (outlier[:, :, None] & outlier[:, None]) & ~torch.eye(tiny.PATCHES, dtype=torch.bool)
    shared = result.by_cut[SHARED]
    assert shared is result.by_cut[SCALED]  # on the yardstick's own model they are the same
    assert shared.raw.means()["outlier-outlier"] == pytest.approx(float(cosines[pairs].mean()), abs=1e-5)
    torch.testing.assert_close(result.mean, tokens.mean(dim=(0, 1)))
    assert shared.neighbours.counts.sum() == 3 * 4 * 4 * 3
    other = similarity.measure(model, images, yardstick=Yardstick(Rule("quantile", 0.8), "other", 3.0, 2.0))
    assert other.by_cut[SHARED].cut == 3.0 and other.by_cut[SCALED].cut == pytest.approx(
        3.0 * float(lower_median(tokens)) / 2.0, rel=2e-3
    )


def lower_median(tokens: Tensor) -> Tensor:
    return tokens.norm(dim=-1).flatten().sort().values[tokens[..., 0].numel() // 2 - 1]


def test_cka_of_models_is_that_of_gram_matrices() -> None:
    images = tiny.images(6)
    first, second = cka.measure(tiny.timm_vit(), images), cka.measure(tiny.ours(MergeConfig(r=3), seed=1), images)
    x, y = first.tokens[2].double(), second.tokens[3].double()
    centre = torch.eye(len(x)) - 1 / len(x)
    centre = centre.double()
    kx, ky = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    expected = float((kx * ky).sum() / (kx.norm() * ky.norm()))
    assert cka.between(first, second)[2, 3] == pytest.approx(expected, abs=1e-4)
    assert np.allclose(np.diag(first.within()[0]), 1, atol=1e-5) and first.tokens.shape[:2] == (5, 6 * tiny.PATCHES)
    assert len(cka.draw([first, second]).axes) == 8 and len(cka.draw_between([first, second]).axes) == 2
    with pytest.raises(UserError, match="same patches"):
        cka.between(first, cka.measure(tiny.timm_vit(), images[:5]))


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
    assert labels == ["patches, median", "class", "register 1", "register 2"]
    second_register = next(line for line in figure.axes[0].lines if line.get_label() == "register 2").get_ydata()
    assert second_register[-1] == pytest.approx(plain_result.prefix[3]["register 2"].mean)
    assert figure.axes[1].get_title(loc="left") == "b  (n = 4 images)"
    assert len(norms.draw(merged).axes) == 2
    for draw in (norms.draw_histogram, norms.draw_token_types, norms.draw_positions):
        assert isinstance(draw([plain_result, merged]), Figure)
    pictures = np.zeros((4, 32, 32, 3))
    maps = norms.norm_maps(model, images)
    assert len(norms.draw_images(plain_result, pictures, maps).axes) == 4 * 2 + 1  # and the colour bar


def test_figures_of_attention() -> None:
    model, images = tiny.ours(MergeConfig(r=3), num_registers=2), tiny.images(2)
    results = [attention.measure(model, images, label=label) for label in "abc"]
    figure = attention.draw(results)
    assert all(ax.get_ylim()[0] == 0 for ax in figure.axes) and len(figure.axes) == 6
    assert [len(ax.lines) for ax in figure.axes[3:]] == [2 * 3 + 1] * 3  # a mean and a dotted line per model
    maps = attention.attention_maps(model, images, np.zeros((2, 32, 32, 3)), label="mine")
    assert maps.layers.shape == (2, 3, 4, 4, 4) and maps.rollout.shape == (2, 4, 4)
    titles = [ax.get_title().replace("\n", " ") for ax in attention.draw_maps(maps).axes[:7]]
    assert titles == [
        "input",
        "class, raw",
        "class",
        "register 1",
        "register 2",
        "map averaged over patches",
        "rollout",
    ]
    drawings = (attention.draw_heads, attention.draw_patches, attention.draw_layers)
    for draw in drawings:
        assert len(draw(maps).axes) == 2 * (1 + 3) + 1  # the colour bar
    assert len(draw(maps, own_scale=True).axes) == 2 * (1 + 3)
    for over in ("blocks", "heads"):
        assert len(attention.draw_registers(maps, over).axes) == 2 * 3 * (1 + 3) + 1


def test_models_share_one_colour_scale() -> None:
    images, pictures = tiny.images(2), np.zeros((2, 32, 32, 3))
    one, two = (attention.attention_maps(tiny.ours(seed=seed), images, pictures, label=str(seed)) for seed in (0, 1))
    two.rows, two.layers = 9 * two.rows, 9 * two.layers
    limits = {ax.images[-1].get_clim() for ax in attention.draw_compare([one, two]).axes if len(ax.images) == 2}
    assert len(limits) == 1 and limits == {attention.Scales.common([one, two]).tokens}
    own = attention.draw_compare([one, two], own_scale=True)
    assert len({ax.images[-1].get_clim() for ax in own.axes if len(ax.images) == 2}) == 4
    results = [norms.measure(tiny.ours(seed=seed), images * (1 + 9 * seed)) for seed in (0, 1)]
    maps = [norms.norm_maps(tiny.ours(seed=seed), images * (1 + 9 * seed)) for seed in (0, 1)]
    drawn = norms.draw_images(results, pictures, maps)
    assert len({ax.images[0].get_clim() for ax in drawn.axes if ax.images and ax.images[0].get_array().ndim == 2}) == 1


def test_figures_of_similarity() -> None:
    model, images = tiny.ours(MergeConfig(r=3), num_registers=2), tiny.images(4)
    result = similarity.measure(model, images, label="mine")
    rows = [label.get_text() for label in similarity.draw(result).axes[0].get_yticklabels()]
    assert {"normal-normal", "normal-class", "normal-registers", "normal-normal across images"} <= set(rows)
    assert similarity.draw_neighbours(result).axes[0].get_title(loc="left").startswith("mine, shared cut")
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


def test_the_notebook_runs_and_shows_the_lot(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/analysis.ipynb from its first cell to its last, on the digits, in its own folder."""
    file = repo / "docs" / "analysis.ipynb"
    notebook = json.loads(file.read_text())
    assert file.stat().st_size < 500_000
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr("sys.path", list(sys.path))
    text = "".join("".join(cell["source"]) for cell in notebook["cells"])
    used = {module.__name__.removeprefix("analysis.") for module in COMMANDS} - {"report"}
    assert not {name for name in used if f"{name}." not in text}  # every instrument is there
    shown = [value for _, _, value in execute(notebook)]
    figures = [value for value in shown if isinstance(value, (Figure, Image.Image))]
    assert len(figures) >= len(used) and len(shown) == len(code_cells(notebook))
    stored = [cell["outputs"][-1]["data"] for cell in code_cells(notebook) if cell["outputs"]]
    assert sum("image/png" in data for data in stored) >= len(used)  # made by run/notebook.py
