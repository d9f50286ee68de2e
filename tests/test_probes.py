"""Reconstruction and class probes: targets, least squares, splits, matching, tokens drawn; notebook and commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import run.analyze as analyze
from analysis import class_probes, intervals, probing, reconstruction
from analysis.outliers import SHARED, Rule
from analysis.walk import walk
from models import MergeConfig, UserError
from models.registry import OWN_SIZES

TOY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 10}


def test_targets_are_the_pixels_of_a_patch_in_row_column_channel_order() -> None:
    images = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12).float()
    targets = reconstruction.patch_targets(images, (4, 6))
    assert targets.shape == (2, 4, 4 * 6 * 3)
    patch = targets[1, 3].view(4, 6, 3)  # second row, second column of patches
    for p, q, c in ((0, 0, 0), (3, 5, 2), (1, 4, 1)):
        assert patch[p, q, c] == images[1, c, 4 + p, 6 + q]


def test_fold_inverts_unfold() -> None:
    images = tiny.images(2, (24, 40))
    assert torch.equal(
        reconstruction.fold_targets(reconstruction.patch_targets(images, (8, 4)), (8, 4), (3, 10)), images
    )


def test_standardised_targets_and_a_constant_image() -> None:
    targets = reconstruction.patch_targets(tiny.images(), (8, 8), standardise=True)
    torch.testing.assert_close(targets.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.var(-1), torch.ones(2, 16), atol=1e-4, rtol=0)
    flat = torch.full((1, 3, 16, 16), 0.7)
    assert (reconstruction.patch_targets(flat, (8, 8), standardise=True).abs() < 1e-3).all()
    assert (reconstruction.contrast(flat, (8, 8)) == reconstruction.contrast(flat, (8, 8)).min()).all()


def store_of(tmp_path: Path, images: int = 24, channels: int = 6) -> tuple[probing.Store, torch.Tensor]:
    """Features of which the pixels (2 x 2 patches of 4 x 4 images) are a linear function."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, 4, channels, generator=generator).half().float()
    weight = torch.randn(channels, 12, generator=generator)
    pictures = reconstruction.fold_targets(features @ weight + 0.5, (2, 2), (2, 2))
    store = probing.Store(tmp_path)
    for part in range(0, images, 7):
        norms = torch.arange(part, min(part + 7, images)).float().unsqueeze(1).expand(-1, 4)
        store.add(features[part : part + 7], pictures[part : part + 7], norms)
    return store, weight


def target(images: torch.Tensor) -> torch.Tensor:
    return reconstruction.patch_targets(images, (2, 2))


def test_least_squares_finds_a_linear_map_and_leaves_no_error(tmp_path: Path) -> None:
    store, weight = store_of(tmp_path)
    assert len(store) == 24 and store.norms[:, 0].tolist() == list(range(24))
    folds = probing.Folds.alternate(24)
    probe = probing.fit_linear(store, folds, target, batch=5)
    torch.testing.assert_close(probe.weight.T, weight, atol=5e-3, rtol=0)
    _, x, images = next(store.batches(folds.test, 50))
    assert float((probe(x) - target(images)).detach().square().mean()) < 1e-5
    mean = probing.mean_target(store, folds, target, batch=5)
    torch.testing.assert_close(mean, target(store.read(folds.train)[1]).mean(dim=(0, 1)))


def test_least_squares_is_numpys(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(50, 4)), generator.normal(size=(50, 3))
    equations = probing.LeastSquares(4, 3)
    for part in np.array_split(np.arange(50), 4):
        equations.add(torch.tensor(x[part]), torch.tensor(y[part]))
    probe = equations.solve(ridge=0)
    expected, *_ = np.linalg.lstsq(np.column_stack((x, np.ones(50))), y, rcond=None)
    np.testing.assert_allclose(probe.weight.detach().T, expected[:4], atol=1e-5)
    np.testing.assert_allclose(probe.bias.detach(), expected[4], atol=1e-5)


def test_a_trained_probe_learns_and_keeps_its_best_weights(tmp_path: Path) -> None:
    store, _ = store_of(tmp_path)
    folds = probing.Folds.alternate(24)
    torch.manual_seed(0)
    probe = probing.mlp_probe(6, 12)
    square = probing.squared_error(target)
    before = probing.mean_loss(probe, store, folds.val, square, 64)
    lines: list[str] = []
    probing.train_probe(probe, store, folds, square, epochs=300, patience=20, batch=4, report=lines.append)
    after = probing.mean_loss(probe, store, folds.val, square, 64)
    assert after < 0.5 * before
    assert after == pytest.approx(min(float(line.split()[3]) for line in lines), abs=1e-4)


def test_folds_do_not_overlap() -> None:
    folds = probing.Folds.alternate(25)
    everything = [*folds.train, *folds.val, *folds.test]
    assert sorted(everything) == list(range(25)) and folds.val and len(folds.test) == 12
    with pytest.raises(UserError, match="at least 8"):
        probing.Folds.alternate(7)


def test_split_means_recombine_to_the_total() -> None:
    generator = torch.Generator().manual_seed(0)
    errors, outlier = torch.rand(9, 16, generator=generator), torch.rand(9, 16, generator=generator) > 0.8
    split = probing.Split()
    split.add(errors[:4], outlier[:4])
    split.add(errors[4:], outlier[4:])
    found = split.summary()
    assert found["outlier"] == pytest.approx(float(errors[outlier].mean()))  # over patches, not over images
    assert found["normal"] == pytest.approx(float(errors[~outlier].mean()))
    k, n = found["outlier_patches"], found["normal_patches"]
    assert found["all"] == pytest.approx((k * found["outlier"] + n * found["normal"]) / (k + n))
    assert found["all"] == pytest.approx(float(errors.mean()))
    low, high = found["ratio_ci95"]
    assert low < found["ratio"] < high and found["ratio_n"] == int(outlier.any(dim=1).sum())


def test_no_interval_below_five_images_nor_of_one() -> None:
    """The review's case: all outliers are in one of fifteen images, and the bootstrap made an interval of no width."""
    errors, outlier = torch.rand(15, 16), torch.zeros(15, 16, dtype=torch.bool)
    outlier[3, :11] = True
    split, matched = probing.Split(), probing.Matched()
    split.add(errors, outlier)
    matched.add(errors, outlier, torch.rand(15, 16))
    found = split.summary()
    assert found["ratio_ci95"] is None and found["outlier_ci95"] is None and found["ratio_n"] == found["outlier_n"] == 1
    assert found["normal_ci95"] is not None and found["normal_n"] == 15
    assert matched.summary()["ratio_ci95"] is None and matched.summary()["ratio_n"] == 1
    same = intervals.mean(np.ones(50))
    assert same.value == 1 and same.ci95 is None and same.shown  # all agree, which is no certainty


def test_intervals_cover_and_pair() -> None:
    """Over 200 draws of 40 normal numbers the interval misses the mean 5 % of the time, and pairing narrows it."""
    generator = np.random.default_rng(0)
    missed = 0
    for _ in range(200):
        low, high = intervals.mean(generator.normal(size=40)).ci95 or (0, 0)
        missed += not low < 0 < high
    assert 3 <= missed <= 24
    table = generator.gamma(2.0, size=(40, 4)) + np.array([0, 1, 0, 1])
    other = table * np.array([1.3, 1, 1, 1])  # a third more error at outliers in every image: no doubt about that
    all_images = np.ones(40, dtype=bool)
    change = intervals.paired(table, other, probing.outlier_ratio, (all_images, all_images))
    alone = intervals.estimate(table, probing.outlier_ratio)
    assert change.value == pytest.approx(0.3 * alone.value) and change.ci95 and alone.ci95
    assert change.ci95[0] > 0 and np.ptp(change.ci95) < 0.4 * np.ptp(alone.ci95)
    few = np.arange(40) < 3
    assert intervals.paired(table, other, probing.outlier_ratio, (all_images, few)).ci95 is None
    first = generator.normal(size=60)
    second = first + 0.1 * generator.normal(size=60) + 0.05
    low, high = intervals.difference(first, second).ci95 or (0, 0)
    assert high - low < 0.1 and low < 0.05 < high


def test_interval_resamples_images_not_patches() -> None:
    """Images that agree inside and differ among each other: the interval is that of ten numbers."""
    errors = torch.arange(10.0).unsqueeze(1).expand(10, 400)
    split = probing.Split()
    split.add(errors, torch.zeros(10, 400, dtype=torch.bool))
    low, high = split.summary()["normal_ci95"]
    assert 2.0 < low < 3.5 and 5.5 < high < 7.0  # 4.5 +- 1.96 * 2.87 / sqrt(10)


def test_nearest_normal_patch_by_hand() -> None:
    prop = torch.tensor([1.0, 5.0, 2.0, 9.0, 4.9])
    outlier = torch.tensor([True, True, False, False, False])
    first, second = probing.nearest_normal(prop, outlier)
    assert first.tolist() == [0, 1] and second.tolist() == [2, 4]
    assert len(probing.nearest_normal(prop, ~torch.zeros(5, dtype=torch.bool))[0]) == 0
    matched = probing.Matched()
    matched.add(torch.tensor([[4.0, 6.0, 1.0, 9.0, 4.0]]), outlier[None], prop[None])
    found = matched.summary()
    assert (found["pairs"], found["outlier"], found["matched_normal"], found["ratio"]) == (2, 5.0, 2.5, 2.0)
    assert probing.Matched().summary() == {"pairs": 0}


def test_cell_distance() -> None:
    assert reconstruction.cell_distance(torch.tensor([[0, 0, 5, 0, 0, 0]]), (2, 3))[0].tolist() == pytest.approx(
        [0, 1, 1, 1, 2**0.5, 5**0.5], rel=1e-15
    )


@pytest.mark.parametrize("text", ["", "raw", "layer", "layer:x"])
def test_unknown_features_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="prenorm"):
        probing.Feature.parse(text)


def test_features_are_those_of_the_token_a_patch_is_in() -> None:
    model, images = tiny.ours(MergeConfig(r=4), num_registers=2), tiny.images()
    out = model(images, trace=True)
    features, norms = probing.patch_features(model, images, probing.Feature("postnorm"))
    for b in range(2):
        for patch in range(16):
            torch.testing.assert_close(features[b, patch], out.tokens[b, 3 + out.group[b, patch]])
    *_, last = walk(model, images)
    assert norms[0, 5] == pytest.approx(float(last.after.x[0, 3 + out.group[0, 5]].norm()))
    prenorm, _ = probing.patch_features(model, images, probing.Feature())
    torch.testing.assert_close(prenorm.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)


def test_tokens_are_drawn_from_their_kind() -> None:
    model, images = tiny.ours(num_registers=2), tiny.images(6)
    *_, last = walk(model, images)
    norms, tokens = last.after.x[:, 3:].norm(dim=-1), model.norm(last.after.x)
    cut = float(norms.flatten().sort().values[-9])  # eight outliers
    bank = class_probes.TokenBank(draws=4)
    bank.add(model, images[:4], torch.arange(4), {SHARED: cut})
    bank.add(model, images[4:], torch.arange(2), {SHARED: cut})
    assert bank.token_types[:3] == ["class", "register 1", "register 2"] and "mean of registers" in bank.token_types
    torch.testing.assert_close(torch.tensor(bank.tokens("class", 3)), tokens[:, 0])
    covered = (norms > cut).any(1)
    assert bank.covered().tolist() == covered.tolist()
    for kind, flags in (("outlier patch", norms > cut), ("normal patch", norms <= cut)):
        for draw in range(4):
            for b, token in enumerate(torch.tensor(bank.tokens(kind, draw))):
                same = [(token - tokens[b, 3 + i]).abs().max() < 1e-5 for i in range(16)]
                assert any(s and f for s, f in zip(same, flags[b], strict=True)) == bool(flags[b].any())
    assert bank.labels.tolist() == [0, 1, 2, 3, 0, 1]


def test_probes_of_the_class_read_what_is_there() -> None:
    generator = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = generator.normal(size=(120, 5)) + 6 * np.eye(5)[y]
    hits, strength = class_probes.logistic_hits(x[:60], y[:60], x[60:], y[60:], 0, (0.01, 1.0))
    assert hits.mean() > 0.95 and strength in (0.01, 1.0)
    assert class_probes.knn_hits(x[:60], y[:60], x[60:], y[60:], 5).mean() > 0.95
    shuffled = generator.permutation(y)
    assert class_probes.logistic_hits(x[:60], shuffled[:60], x[60:], shuffled[60:], 0, (1.0,))[0].mean() < 0.65


# From a notebook


@pytest.mark.parametrize("probe", ["linear", "mlp"])
def test_reconstruction_of_a_model_in_memory(probe: str) -> None:
    model, images, lines = tiny.ours(MergeConfig(r=2), num_registers=2), tiny.images(24), []
    result = reconstruction.measure(
        model, images, probe=probe, epochs=2, outlier_rule=Rule("quantile", 0.8), label="tiny", report=lines.append
    )
    row = reconstruction.summarise(result)
    assert (row["label"], row["n_fit"], row["n_stop"], row["n_test"]) == ("tiny", 10, 2, 12)
    mse = row["shared"]["mse"]
    assert mse["outlier_patches"] + mse["normal_patches"] == 12 * tiny.PATCHES
    assert result.held_back == list(range(1, 24, 2))  # what is drawn is among them
    assert any(line.startswith("position probe of tiny, epoch 1/2") for line in lines)
    assert len(reconstruction.draw([result, result]).axes) == 3
    shown = reconstruction.reconstruct(model, images[:3], result)
    assert shown.decoded.shape == shown.images.shape == (3, 3, 32, 32) and shown.error.shape == (3, 4, 4)
    figure = reconstruction.draw_images(result, shown, lambda x: x.clamp(0, 1).permute(0, 2, 3, 1).numpy())
    assert len(figure.axes) == 10  # and a colour bar


def test_a_perfect_linear_code_is_read_without_error() -> None:
    """Tokens that are the pixels themselves: what is left is the rounding of the features that are kept in half."""
    model = tiny.identity_blocks(tiny.ours(embed_dim=192, num_heads=3))
    with torch.no_grad():
        model.patch_embed.proj.weight.copy_(torch.eye(192).view_as(model.patch_embed.proj.weight))
        model.patch_embed.proj.bias.zero_()
        model.pos_embed.zero_()
    result = reconstruction.measure(model, tiny.images(64), feature="postnorm", epochs=1)
    assert result.errors["shared"]["explained"]["all"] > 0.999


def test_class_probes_of_a_model_in_memory() -> None:
    labels = torch.arange(60) % 2
    images = tiny.images(60)
    images[torch.arange(60), labels] += 2.0  # red or green
    batches = [(images[:40], labels[:40])], [(images[40:], labels[40:])]
    rule = Rule("quantile", 0.5)
    result = class_probes.measure(tiny.ours(num_registers=1), *batches, outlier_rule=rule, draws=2, strengths=(1.0,))
    kinds = {"class", "register 1", "mean of patches", "normal patch"}
    assert result.classes == 2 and set(result.accuracies["all images"]) == kinds
    assert set(result.accuracies["images with an outlier"]) == {*kinds, "outlier patch"}
    row = class_probes.summarise(result, result)
    assert row["sets"]["all images"]["kinds"]["mean of patches"]["linear"] > 0.9 and row["chance"] == 0.5
    assert len(class_probes.draw([result, result]).axes) == 4
    without = class_probes.measure(tiny.ours(), *batches, outlier_rule=Rule("abs", 1e6), draws=1, strengths=(1.0,))
    assert (
        set(without.accuracies) == {"all images"} and "0 training images" in without.left_out["images with an outlier"]
    )
    with pytest.raises(UserError, match="too few"):
        class_probes.measure(tiny.ours(), [(images[:4], labels[:4])], batches[1])


def test_class_probes_of_two_models_are_on_the_same_images() -> None:
    labels = torch.arange(60) % 2
    images = tiny.images(60)
    batches = [(images[:40], labels[:40])], [(images[40:], labels[40:])]
    models = tiny.ours(), tiny.ours(seed=3)
    first = class_probes.collect(models[0], *batches, outlier_rule=Rule("quantile", 0.85), draws=1)
    second = class_probes.collect(models[1], *batches, yardstick=first.yardstick, draws=1, label="second")
    results = class_probes.probe([first, second], strengths=(1.0,))
    both = first.train.covered() & second.train.covered()
    assert second.yardstick == first.yardstick and not both.all()
    for result in results:
        if "images with an outlier" in result.numbers:
            assert result.numbers["images with an outlier"][0] == both.sum()
    row = class_probes.summarise(results[1], results[0])["sets"]["all images"]["kinds"]["class"]
    hits = [result.accuracies["all images"]["class"].hits["linear"][0].astype(float) for result in results]
    assert row["linear_minus_baseline"] == pytest.approx((hits[1] - hits[0]).mean())


# The commands


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(OWN_SIZES, "deit_digits", TOY)
    return ["--model", "deit_digits", "--dataset", "DIGITS", "--device", "cpu", "--num_registers", "2"]


@pytest.mark.parametrize("flags", [[], ["--probe", "mlp", "--feat", "layer:1", "--target", "standardised", "--r", "2"]])
def test_reconstruction(toy: list[str], flags: list[str], tmp_path: Path) -> None:
    words = ["reconstruction", *toy, *flags, "--limit", "40", "--epochs", "2", "--show", "2", "--out", str(tmp_path)]
    assert analyze.main([*words, "--outlier_rule", "quantile:0.9"]) == 0
    (row,) = json.loads((tmp_path / "reconstruction.json").read_text())["models"]
    assert row["n_fit"] + row["n_stop"] + row["n_test"] == 40
    errors = row["shared"]
    assert errors["mse"]["images"] == 20 and errors["mse"]["outlier_patches"] > 0
    assert errors["explained"]["all"] == pytest.approx(1 - errors["mse"]["all"] / errors["mse_of_mean_patch"]["all"])
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".npz", ".png"}


def test_probes(toy: list[str], tmp_path: Path) -> None:
    words = ["probes", *toy, "--limit", "120", "--draws", "2", "--C", "0.1", "--out", str(tmp_path)]
    assert analyze.main([*words, "--outlier_rule", "quantile:0.8"]) == 0
    (row,) = json.loads((tmp_path / "probes.json").read_text())["models"]
    kinds = {"class", "register 1", "register 2", "mean of registers", "mean of patches"}
    everything = row["sets"]["all images"]
    assert set(everything["kinds"]) == kinds | {"normal patch"} and everything["n_test"] == 120
    assert everything["kinds"]["mean of patches"]["linear"] > 0.3  # an untrained model keeps much of a digit
    assert everything["kinds"]["class"]["linear_std"] == 0 and row["classes"] == 10 and row["chance"] == 0.1


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["reconstruction", "--feat", "all"], "--feat"),
        (["reconstruction", "--feat", "layer:7"], "0..2"),
        (["reconstruction", "--outlier_layer", "7"], "--outlier_layer"),
        (["reconstruction", "--limit", "5"], "at least 8"),
        (["reconstruction", "--epochs", "0"], "--epochs"),
        (["probes", "--draws", "0"], "--draws"),
        (["probes", "--outlier_rule", "abs:1000000", "--limit", "20"], "too few"),
        (["probes", "--data", "folder"], "--dataset"),
    ],
)
def test_mistakes_are_one_line(
    toy: list[str], flags: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyze.main([flags[0], *toy, *flags[1:], "--out", str(tmp_path / "o")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("analyze.py: error: ") and reason in err
