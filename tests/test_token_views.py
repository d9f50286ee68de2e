"""Views of single images: PCA of patch features, cosine maps, token fate; against slow computations."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

import run.analyze as analyze
from analysis import cosine_maps, patch_pca, token_fate
from models import MergeConfig, UserError
from models.registry import OWN_SIZES

PICTURES = np.zeros((3, 32, 32, 3))


def final_patches(model: Any, images: torch.Tensor) -> np.ndarray:
    """Features of every patch after the final norm, (B,n,C): of the token that it ended in."""
    out = model(images, trace=True)
    prefix = model.num_prefix_tokens
    rows = [out.tokens[b, prefix + out.group[b]] for b in range(len(images))]
    return torch.stack(rows).detach().numpy()


# PCA


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    model, images = tiny.ours(MergeConfig(r=3), num_registers=1), tiny.images(3)
    result = patch_pca.measure(model, images, PICTURES, layers=[-1])
    rows = final_patches(model, images).reshape(-1, 24)
    np.testing.assert_allclose(result.features[0].reshape(-1, 24), rows, atol=1e-5)
    (found,) = patch_pca.colours(result)
    centred = rows - rows.mean(axis=0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ directions[:3].T / np.sqrt((centred**2).sum(axis=1).mean())
    ours = found.components[0].reshape(-1, 3)
    for axis in range(3):  # a component has no sign
        sign = np.sign((ours[:, axis] * expected[:, axis]).sum())
        np.testing.assert_allclose(sign * ours[:, axis], expected[:, axis], atol=1e-4)
    assert found.explained[0] == pytest.approx((values[:3] ** 2).sum() / (values**2).sum(), rel=1e-4)
    assert found.rgb.min() == 0 and found.rgb.max() == 1 and found.foreground.all()


def test_models_of_one_width_share_their_components_and_merged_patches_a_colour() -> None:
    images = tiny.images(3)
    first = patch_pca.measure(tiny.ours(), images, PICTURES, layers=[0, 2])
    merging = tiny.ours(MergeConfig(r=5), seed=0)
    second = patch_pca.measure(merging, images, PICTURES, layers=[-1], label="merged")
    one, two = patch_pca.colours([first, second])
    assert one.joint and one.rgb.shape == (2, 3, 4, 4, 3) and two.rgb.shape == (1, 3, 4, 4, 3)
    group = merging(images, trace=True).group[0].numpy()
    for token in np.unique(group):
        assert np.ptp(two.rgb[0, 0].reshape(16, 3)[group == token], axis=0).max() < 1e-6
    same = patch_pca.colours([first, first])
    np.testing.assert_allclose(same[0].rgb, same[1].rgb)  # the same features have the same colours
    wider = patch_pca.measure(tiny.ours(embed_dim=48), images, PICTURES)
    assert not patch_pca.colours([first, wider])[0].joint
    assert len(patch_pca.draw([first, wider]).axes) == 3 * (1 + 2 + 1)


def test_the_foreground_is_what_was_planted_in_the_middle() -> None:
    features = np.random.default_rng(0).normal(size=(1, 6, 8, 8, 5)) * 0.3
    planted = np.zeros((8, 8), dtype=bool)
    planted[2:6, 3:6] = True
    features[:, :, planted, 0] += 6
    result = patch_pca.PcaResult("planted", [0], np.zeros((6, 8, 8, 3)), features)
    (found,) = patch_pca.colours(result, foreground=True)
    assert (found.foreground == planted).all() and (found.rgb[..., ~planted, :] == 0).all()
    assert patch_pca.summarise(result, found)["foreground_share"] == [planted.mean()]


# Cosine


def test_cosine_maps_are_torchs() -> None:
    model, images = tiny.ours(MergeConfig(r=3), num_registers=2), tiny.images(3)
    result = cosine_maps.measure(model, images, PICTURES, patches=[(1, 2), (3, 0)])
    rows = torch.tensor(final_patches(model, images))
    for image in range(3):
        for query, patch in enumerate((6, 12)):
            expected = F.cosine_similarity(rows[image, patch], rows[image], dim=-1).view(4, 4)
            np.testing.assert_allclose(result.maps[image, query], expected, atol=1e-5)
        pairs = F.cosine_similarity(rows[image][:, None], rows[image][None], dim=-1)
        assert result.mean[image] == pytest.approx(float(pairs.mean()), abs=1e-5)
    assert result.maps[0, 0, 1, 2] == pytest.approx(1, abs=1e-5)
    figure = cosine_maps.draw([result, result])
    assert len({ax.images[0].get_clim() for ax in figure.axes[1:3]}) == 1 and len(figure.axes) == 3 * 2 * 3 + 1
    with pytest.raises(UserError, match="4 x 4 patches"):
        cosine_maps.measure(model, images, PICTURES, patches=[(4, 0)])


# Fate


def test_fate_is_that_of_the_forward() -> None:
    model, images = tiny.ours(MergeConfig(r=4), num_registers=1), tiny.images(3)
    result = token_fate.measure(model, images, PICTURES, patches=[(0, 1)])
    out = model(images, trace=True)
    assert (result.groups[0] == np.arange(16)).all() and np.array_equal(result.groups[1:], np.stack(out.groups))
    for block in range(-1, 3):
        group = result.groups[block + 1, 2]
        assert np.array_equal(result.members(block, 2, (0, 1)).ravel(), group == group[1])
    rows = token_fate.summarise(result)["blocks"]
    assert [row["tokens"] for row in rows] == [16, 12, 8, 4] and rows[0]["patches_alone"] == 1
    slow = []
    for group in result.groups[-1]:
        total = 0.0
        for patch in range(16):
            mates = [p for p in range(16) if group[p] == group[patch]]
            centre = np.mean([divmod(p, 4) for p in mates], axis=0)
            total += float(((np.array(divmod(patch, 4)) - centre) ** 2).sum())
        slow.append((total / 16) ** 0.5)
    assert rows[-1]["spread"] == pytest.approx(np.mean(slow)) and rows[0]["spread"] == 0


def test_lines_of_the_tree_meet_and_do_not_cross() -> None:
    model, images = tiny.ours(MergeConfig(r=4)), tiny.images(1)
    result = token_fate.measure(model, images, PICTURES[:1], label="mine")
    figure = token_fate.draw_tree(result)
    collections = figure.axes[1].collections
    assert [len(lines.get_segments()) for lines in collections] == [16, 12, 8, 4]
    for lines, after in itertools.pairwise(collections):
        segments = lines.get_segments()
        ends = {round(float(segment[-1, 1]), 6) for segment in segments}
        assert ends == {round(float(segment[0, 1]), 6) for segment in after.get_segments()}
        by_start = sorted(segments, key=lambda segment: segment[0, 1])
        assert all(a[-1, 1] <= b[-1, 1] + 1e-9 for a, b in itertools.pairwise(by_start))
    assert len(token_fate.draw([result, result]).axes) == 2 * 4


# Commands


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 10}
    monkeypatch.setitem(OWN_SIZES, "deit_digits", size)
    return ["--dataset", "DIGITS", "--limit", "12", "--device", "cpu", "--show", "2"]


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (["pca", "--layers", "0", "-1"], {"pca.png", "pca_foreground.png", "pca.json", "pca.npz"}),
        (["cosine", "--patches", "1,1;0,3"], {"cosine.png", "cosine.json", "cosine.npz"}),
        (["fate"], {"fate_strip.png", "fate_tree_b.png", "fate_tree_a.png", "fate.json", "fate.npz"}),
    ],
)
def test_commands(toy: list[str], words: list[str], files: set[str], tmp_path: Path) -> None:
    specs = ["deit_digits,r=3,label=a", "deit_digits,r=5,label=b"]
    assert analyze.main([*words, "--models", *specs, *toy, "--out", str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == files
    content = json.loads((tmp_path / f"{words[0]}.json").read_text())
    assert [row["n_images"] for row in content["models"]] == [2, 2] and "12 images" not in content["run"]["data"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["pca", "--layers", "9"], "--layers is 9"),
        (["pca", "--show", "0"], "--show"),
        (["cosine", "--patches", "9,9"], "4 x 4 patches"),
        (["cosine", "--patches", "7"], "row,column;row,column"),
        (["fate"], "--r 16"),
    ],
)
def test_mistakes(
    toy: list[str], words: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = toy if "--show" not in words else toy[:-2]
    assert analyze.main([*words, "--model", "deit_digits", *flags, "--out", str(tmp_path / "o")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and reason in err and not (tmp_path / "o").exists()
