"""The mathematics of the instruments, against numbers by hand, NumPy, and slow loops."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from analysis.attention import Rollout, mass_by_token_type, patch_rows, spread_metrics
from analysis.cka import layer_tables
from analysis.outliers import BINS, Histogram, Rule, bimodality, bin_edges, norms
from analysis.similarity import CosineHistogram, GroupCosines, map_cosines, neighbour_cosines
from analysis.walk import attention, per_patch, walk
from models import MergeConfig, MergingViT, UserError


def linear_cka(first: torch.Tensor, second: torch.Tensor) -> float:
    """Linear centred kernel alignment (arXiv 1905.00414) of the same S samples: (S,C), (S,D) -> in [0,1]."""
    x = first.double() - first.double().mean(dim=0, keepdim=True)
    y = second.double() - second.double().mean(dim=0, keepdim=True)
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(values: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for part in values.split(7):
        histogram.add(part)
    return histogram


def make(**options: Any) -> tuple[MergingViT, torch.Tensor]:
    torch.manual_seed(0)
    model = MergingViT(32, 4, 5, dim=24, depth=4, heads=3, mlp_dim=48, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model, torch.randn(2, 3, 32, 32)


# Norms and outliers


def test_norms_are_in_fp32() -> None:
    assert norms(torch.tensor([[3.0, 4.0], [300.0, 400.0]])).tolist() == [5, 500]
    big = torch.full((4,), 200.0, dtype=torch.float16)
    assert norms(big).item() == 400 and norms(big * 100).item() == 40000


def test_quantiles_are_right_to_within_one_bin() -> None:
    values = seeded(5000).exp() * 20
    histogram = filled(values)
    width = 10 ** (10 / BINS)
    for q in (0.02, 0.5, 0.9, 0.98, 0.995, 1.0):
        exact = float(np.quantile(values.numpy(), q, method="inverted_cdf"))
        assert exact <= histogram.quantile(q) * (1 + 1e-6) and histogram.quantile(q) <= exact * width
    assert histogram.number == 5000 and histogram.largest == pytest.approx(float(values.max()))
    assert histogram.mean == pytest.approx(float(values.double().mean()))
    assert histogram.std == pytest.approx(float(values.double().std(correction=0)))
    share = histogram.share_above(40.0)
    assert share == pytest.approx(float((values > 40).double().mean()), abs=0.002)
    assert histogram.rebinned(64).sum() == 5000


def test_values_outside_the_bins_are_counted_at_their_ends() -> None:
    histogram = filled(torch.tensor([0.0, 1e9]))
    assert histogram.counts[0] == 1 and histogram.counts[-1] == 1
    assert bin_edges()[0] == pytest.approx(1e-4) and bin_edges()[-1] == pytest.approx(1e6)


def test_cuts_of_every_rule() -> None:
    values = torch.tensor([10.0] * 98 + [100.0] * 2)
    histogram = filled(values)
    assert Rule.parse("quantile:0.98").cut(histogram) == pytest.approx(10, rel=0.002)
    assert Rule.parse("quantile:0.99").cut(histogram) == pytest.approx(100, rel=0.002)
    assert Rule.parse("sigma:3").cut(histogram) == pytest.approx(11.8 + 3 * 12.6)
    assert Rule.parse("ratio:3").cut(histogram) == pytest.approx(30, rel=0.002)
    assert Rule.parse("abs:150").cut(histogram) == 150
    assert str(Rule.parse("sigma:3")) == "sigma:3"
    cuts = [Rule("quantile", q).cut(filled(seeded(999).abs())) for q in (0.1, 0.5, 0.9, 0.98)]
    assert cuts == sorted(cuts)


@pytest.mark.parametrize("text", ["", "sigma", "sigma:x", "quantile:98", "quantile:0", "ratio:-1", "otsu:1", "abs:nan"])
def test_rules_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="quantile:0.98"):
        Rule.parse(text)


def test_bimodality_tells_two_heaps_from_one() -> None:
    one, two = seeded(4000) + 50, torch.cat((seeded(2000) + 50, seeded(2000, seed=1) + 80))
    single, double = bimodality(filled(one)), bimodality(filled(two))
    assert single["otsu_between"] == pytest.approx(0.64, abs=0.03)
    assert single["sarle"] == pytest.approx(1 / 3, abs=0.05)
    assert double["otsu_between"] > 0.98 and double["sarle"] > 0.9
    assert 55 < double["otsu_threshold"] < 75
    assert bimodality(filled(torch.full((9,), 3.0)))["otsu_between"] == 0.0


# Attention


def test_a_map_on_the_grid_keeps_its_mass_under_merging() -> None:
    model, images = make(num_registers=2, r=9)
    for layer in walk(model, images):
        maps = attention(layer)
        grid = per_patch(maps[:, :, : layer.num_prefix_tokens], layer)
        assert grid.shape == (2, 3, 3, 8, 8)
        mass = mass_by_token_type(maps[:, :, : layer.num_prefix_tokens], layer)
        torch.testing.assert_close(grid.sum(dim=(-2, -1)), mass["patches"])
        torch.testing.assert_close(sum(mass.values()), torch.ones(2, 3, 3))
        torch.testing.assert_close(mass["registers"], maps[:, :, :3, 1:3].sum(dim=-1))
        for b, patch in ((0, 5), (1, 60)):
            token = layer.before.group[b, patch]
            members = (layer.before.group[b] == token).sum()
            expected = maps[b, 1, 0, layer.num_prefix_tokens + token] / members
            torch.testing.assert_close(grid[b, 1, 0, patch // 8, patch % 8], expected)


def test_rows_of_single_patches_are_those_of_their_tokens() -> None:
    model, images = make(num_registers=1, r=9)
    layer = list(walk(model, images))[2]
    maps = attention(layer)
    rows = patch_rows(maps, layer, [(0, 0), (3, 7)])
    for b in range(2):
        token = layer.num_prefix_tokens + layer.before.group[b, 3 * 8 + 7]
        assert torch.equal(rows[b, :, 1], maps[b, :, token])


def test_concentration_by_hand() -> None:
    even, spike = torch.full((5, 10), 0.01), torch.zeros(5, 10)
    spike[2, 3] = 0.4  # 40 % of the row's mass is on patches: only its spread counts
    found = spread_metrics(torch.stack((even, spike)))
    torch.testing.assert_close(found["entropy"], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(found["top_patch"], torch.tensor([0.02, 1.0]))
    torch.testing.assert_close(found["top_2_percent"], torch.tensor([0.02, 1.0]))
    assert spread_metrics(torch.zeros(1, 2, 2))["entropy"].isfinite().all()


def test_rollout_without_merging_is_the_product_of_mixed_maps() -> None:
    model, images = make(num_registers=2)
    rollout, product = Rollout(), torch.eye(67)
    for layer in walk(model, images):
        maps = attention(layer)
        rollout.add(layer, maps)
        product = (maps.mean(dim=1) + torch.eye(67)) / 2 @ product
    torch.testing.assert_close(rollout.rows, product)
    torch.testing.assert_close(rollout.to_patches((8, 8)), product[:, 0, 3:].view(2, 8, 8))


@pytest.mark.parametrize(
    "options",
    [
        dict(num_registers=2, register_layer=2, class_layer=1, r=9),
        dict(num_registers=1, merge=MergeConfig(method="mctf", r=9)),
        dict(num_registers=0, r=9, class_token=False, global_pool="avg"),
    ],
)
def test_rollout_shares_out_everything(options: dict[str, Any]) -> None:
    model, images = make(**options)
    rollout, total = Rollout(), 0
    for layer in walk(model, images):
        rollout.add(layer, attention(layer))
        assert rollout.rows is not None
        torch.testing.assert_close(rollout.rows.sum(dim=-1), torch.ones(2, layer.after.x.shape[1]))
        total = layer.num_prefix_tokens + 64
    assert rollout.rows.shape[-1] == total
    assert rollout.to_patches((8, 8)).shape == (2, 8, 8)


def test_late_tokens_enter_the_rollout_in_their_place() -> None:
    model, images = make(num_registers=2, register_layer=0, class_layer=2)
    rollout = Rollout()
    for layer in walk(model, images):
        rollout.add(layer, attention(layer))
        if layer.index == 2:  # before this block the class token held itself only
            mixed = attention(layer).mean(dim=1)[:, 0, 0]
            assert rollout.token_types == ("class", "register 1", "register 2")
            torch.testing.assert_close(rollout.rows[:, 0, 0], (mixed + 1) / 2)


# Similarity


def test_neighbours_by_hand() -> None:
    x = torch.zeros(1, 3, 3, 2)
    x[..., 0] = 1.0
    x[0, 1, 1] = torch.tensor([0.0, 2.0])  # at right angles to all others
    x[0, 0, 1] = torch.tensor([3.0, 3.0])  # 45 degrees to both
    found = neighbour_cosines(x)
    assert (~found.isnan()).sum() == 4 * 3 * 2  # directed pairs of a 3 x 3 grid
    half = 0.5**0.5
    torch.testing.assert_close(found[0, :, 1, 1], torch.tensor([half, 0, 0, 0]))
    torch.testing.assert_close(found[0, 1, 0, 1], torch.tensor(half))
    torch.testing.assert_close(found[0, 2:, 0, 1], torch.tensor([half, half]))
    assert found[0, 0, 0].isnan().all() and found[0, 3, :, 2].isnan().all()
    assert found[0, 1, 1, 0] == 1
    big = neighbour_cosines(seeded(2, 14, 14, 8))
    assert (~big[0].isnan()).sum() == 728


def test_pairs_belong_to_the_patch_in_the_middle() -> None:
    cosines = torch.full((1, 4, 3, 3), 0.5)
    cosines[0, 0, 0] = torch.nan
    outlier = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    outlier[0, 0, 0, 0] = True
    counted = CosineHistogram()
    counted.add(cosines, outlier.expand_as(cosines))
    summary = counted.summary()
    assert (summary["outlier_pairs"], summary["normal_pairs"]) == (3, 30)
    assert summary["auc"] == 0.5 and summary["normal_mean"] == 0.5


def test_the_auc_is_scikit_learns() -> None:
    normal, outlier = torch.tanh(seeded(900)), torch.tanh(seeded(80, seed=1) + 0.7)
    counted = CosineHistogram()
    counted.add(torch.cat((normal, outlier)), torch.arange(980) >= 900)
    expected = roc_auc_score(np.arange(980) >= 900, torch.cat((normal, outlier)).numpy())
    assert counted.summary()["auc"] == pytest.approx(expected, abs=1e-3)
    assert counted.summary()["outlier_mean"] == pytest.approx(float(outlier.mean()), abs=1e-6)
    assert counted.summary()["normal_median"] == pytest.approx(float(normal.median()), abs=1e-3)
    empty = CosineHistogram()
    empty.add(normal, torch.zeros(900, dtype=torch.bool))
    assert np.isnan(empty.summary()["auc"])


def test_mean_cosines_of_sets_are_those_of_all_pairs() -> None:
    x, extra = seeded(3, 10, 6), seeded(3, 6, seed=1)
    outlier = torch.zeros(3, 10, dtype=torch.bool)
    outlier[0, :3], outlier[1, 4] = True, True  # the third image has none
    groups = GroupCosines()
    groups.add(x[:2], outlier[:2], {"class": extra[:2]})
    groups.add(x[2:], outlier[2:], {"class": extra[2:]})
    found = groups.means()
    slow: dict[str, list[float]] = {key: [] for key in found}
    names = {True: "outlier", False: "normal"}
    for (b, i), (c, j) in itertools.permutations(itertools.product(range(3), range(10)), 2):
        kinds = names[bool(outlier[b, i])], names[bool(outlier[c, j])]
        cosine = float(F.cosine_similarity(x[b, i], x[c, j], dim=0))
        if b != c and kinds[0] == kinds[1]:
            slow[f"{kinds[0]}-{kinds[0]} across images"].append(cosine)
        if b == c and "-".join(kinds) in slow:
            slow["-".join(kinds)].append(cosine)
    for b, i in itertools.product(range(3), range(10)):
        cosine = float(F.cosine_similarity(x[b, i], extra[b], dim=0))
        slow[f"{names[bool(outlier[b, i])]}-class"].append(cosine)
    for key, values in slow.items():
        assert found[key] == pytest.approx(np.mean(values), abs=1e-6), key
    alone = GroupCosines()
    alone.add(x, torch.zeros_like(outlier))
    assert alone.means()["outlier-outlier"] is None and alone.means()["outlier-normal"] is None


def test_maps_against_each_other() -> None:
    maps = torch.tensor([[[[1.0, 0], [0, 0]], [[0, 2.0], [0, 0]], [[3.0, 3.0], [0, 0]]]])
    expected = torch.tensor([[1, 0, 0.5**0.5], [0, 1, 0.5**0.5], [0.5**0.5, 0.5**0.5, 1]])
    torch.testing.assert_close(map_cosines(maps)[0], expected)


@pytest.mark.parametrize("samples", [6, 40])
def test_cka_is_that_of_gram_matrices_and_blind_to_rotation_and_scale(samples: int) -> None:
    x, y = seeded(samples, 12), seeded(samples, 9, seed=1)
    centre = torch.eye(samples) - 1 / samples
    kx, ky = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    assert linear_cka(x, y) == pytest.approx(float((kx * ky).sum() / (kx.norm() * ky.norm())), abs=1e-5)
    turned = 3 * x @ torch.linalg.qr(seeded(12, 12, seed=2)).Q + 5
    assert linear_cka(x, turned) == pytest.approx(1.0, abs=1e-5)


def test_tables_of_layers() -> None:
    layers = torch.stack([seeded(30, 8, seed=seed) for seed in range(3)])
    cka, cosine = layer_tables(layers)
    assert cka[2, 0] == pytest.approx(linear_cka(layers[2], layers[0]), abs=1e-5)
    assert np.allclose(np.diag(cosine), 1, atol=1e-6) and np.allclose(cka, cka.T)
    expected = F.cosine_similarity(layers[1], layers[2], dim=-1).mean()
    assert cosine[1, 2] == pytest.approx(float(expected), abs=1e-6)
