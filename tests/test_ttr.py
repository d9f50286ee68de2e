"""Test-time registers: a planted neuron is found, moved and harmless; the shift is batched; the commands."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from matplotlib.figure import Figure
from timm.layers import SwiGLUPacked
from torch import Tensor, nn

import run.analyze as analyze
from analysis import register_neurons
from analysis import test_time_registers as ttr
from analysis.outliers import Rule
from analysis.walk import walk
from models import MergeConfig, MergingViT, UserError
from models.registry import OWN_SIZES

TOY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 10}
PLANTED = (1, 37)


def planted_model(num_registers: int = 0) -> MergingViT:
    """Blocks that do nothing but for one unit of block 1, which fires on bright patches and writes a long vector."""
    model = tiny.ours(num_registers=num_registers, seed=3)
    tiny.identity_blocks(model)
    with torch.no_grad():
        model.pos_embed.mul_(0.1)
        model.patch_embed.proj.weight.mul_(0.05)
        model.patch_embed.proj.weight[0] = 0.05  # channel 0 is the brightness
        for block in model.blocks:
            block.mlp.fc1.weight.mul_(0.02)
            block.mlp.fc1.bias.fill_(-0.1)
        block, unit = PLANTED
        mlp: Any = model.blocks[block].mlp
        mlp.fc1.weight[unit] = 0
        mlp.fc1.weight[unit, 0], mlp.fc1.bias[unit] = 4.0, -10.0
        mlp.fc2.weight[:, unit] = 30.0
        model.blocks[block].norm2.weight.fill_(1.0)
        model.blocks[block].norm2.bias.zero_()
    return model


def bright_patches(count: int = 6) -> Tensor:
    """Images with one bright patch each (but the last), at different places."""
    images = 0.1 * tiny.images(count, seed=5)
    for i in range(count - 1):
        row, column = divmod(2 * i + 1, 4)
        images[i, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 3.0
    return images


def patch_norms(model: MergingViT, images: Tensor) -> Tensor:
    *_, last = walk(model, images, r=0)
    return last.after.x[:, last.num_prefix_tokens :].norm(dim=-1)


@pytest.mark.parametrize("registers", [0, 2])
def test_a_planted_neuron_is_found_first_and_moved_to_the_token(registers: int) -> None:
    model, images = planted_model(registers), bright_patches()
    table = register_neurons.norm_table(model, images.split(4))
    outliers = table.detection > 3 * table.detection.median()
    assert outliers.sum() == 5 and not outliers[-1].any()
    assert table.top_layer() == PLANTED[0]
    ranking = register_neurons.find_neurons(model, images.split(4), outliers, table.top_layer(), top_k=5)
    assert ranking.neurons[0] == PLANTED
    assert ranking.scores[0] > 3 * ranking.scores[1] and ranking.elsewhere[0] < 0.1 * ranking.scores[0]
    assert (ranking.images_with_outliers, ranking.images, ranking.outliers) == (5, 6, 5)

    shifted = register_neurons.shift_neurons(model, [PLANTED])
    before, after = patch_norms(model, images), patch_norms(shifted, images)
    assert before[:5].amax() > 1000 and after.amax() < 50  # clean: what is left is the bright patch itself
    *_, last = walk(shifted, images, r=0)
    token = last.after.x[:, last.num_prefix_tokens - 1].norm(dim=-1)
    assert (token[:5] > 1000).all() and token[5] < 10  # the token holds the norm, where there is one
    torch.testing.assert_close(after[~outliers], before[~outliers], rtol=0, atol=0.3)


def test_scores_are_the_algorithm_of_the_paper() -> None:
    model, images = tiny.ours(seed=1), tiny.images(5)
    outliers = torch.rand(5, 16, generator=torch.Generator().manual_seed(0)) > 0.7
    outliers[2] = False
    found = register_neurons.find_neurons(
        model, images.split(2), outliers, top_layer=1, top_k=2 * 96, rank_by="activation"
    )
    score = dict(zip(found.neurons, found.scores, strict=True))
    seen: list[Tensor] = []
    hooks = [b.mlp.act.register_forward_hook(lambda m, i, out: seen.append(out)) for b in model.blocks[:2]]
    total = torch.zeros(2, 96)
    for image, mask in zip(images, outliers, strict=True):
        seen.clear()
        model(image[None])
        if mask.any():
            total += torch.stack([act[0, 1:][mask].abs().mean(dim=0) for act in seen])
    for hook in hooks:
        hook.remove()
    expected = total / 4
    assert len(score) == 192 and list(found.scores) == sorted(found.scores, reverse=True)
    for (block, unit), value in score.items():
        assert value == pytest.approx(float(expected[block, unit].detach()), rel=1e-4)


def test_sparse_leaves_out_units_that_are_always_on() -> None:
    model, images = planted_model(), bright_patches()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[5] = 100.0
    outliers = register_neurons.norm_table(model, [images]).detection > 50
    both = [
        register_neurons.find_neurons(model, [images], outliers, 1, 3, sparse, "activation").neurons
        for sparse in (False, True)
    ]
    assert both[0][0] == (0, 5) and both[1][0] == PLANTED and (0, 5) not in both[1]


def test_units_that_are_always_on_rank_last_by_their_ratio() -> None:
    """The review's case: units as active everywhere come high by activation, and are no register neurons."""
    model, images = planted_model(), bright_patches()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[5] = 100.0
    outliers = register_neurons.norm_table(model, [images]).detection > 50
    by_activation = register_neurons.find_neurons(model, [images], outliers, 1, 3, rank_by="activation")
    by_ratio = register_neurons.find_neurons(model, [images], outliers, 1, 3)
    assert by_activation.neurons[0] == (0, 5) and by_activation.ratios[0] == pytest.approx(1, abs=0.05)
    assert by_ratio.neurons[0] == PLANTED and by_ratio.ratios[0] > 5 and by_ratio.neurons[-1] == (0, 5)
    assert list(by_ratio.ratios) == sorted(by_ratio.ratios, reverse=True)


def test_the_choice_of_the_block_says_how_sure_it_is() -> None:
    largest = torch.ones(40, 4)
    largest[:, 2], largest[:, 3] = 1.3, 1.3 * 1.29
    largest[:15, 2] = 1.4  # which of two like jumps is the largest hangs on the images
    largest[15:, 3] = 1.9
    table = register_neurons.NormTable(torch.ones(40, 4), largest)
    votes = table.top_layer_votes()
    second, third = (float(largest[:, block].mean()) for block in (2, 3))
    assert table.jumps() == pytest.approx([1.0, second, third / second])
    assert sum(votes.values()) == pytest.approx(1) and set(votes) == {2, 3} and max(votes.values()) < 0.95
    sure = register_neurons.NormTable(torch.ones(40, 4), torch.tensor([1.0, 1, 3, 3.1]).expand(40, 4))
    assert sure.top_layer_votes() == {2: 1.0}


def test_find_warns_where_the_block_is_not_settled(
    toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*toy, "--out", str(tmp_path), "--outlier_rule", "quantile:0.9"]
    assert analyze.main(["ttr", "find", *words]) == 0
    out = capsys.readouterr().out
    assert "warning: no block doubles the largest norm" in out and "1: x" in out
    assert json.loads((tmp_path / "neurons.json").read_text())["top_layer_votes"]


def test_shift_takes_the_peak_of_each_neuron_and_image() -> None:
    hidden = torch.tensor([[[1.0, 2.0, -7.0], [5.0, 3.0, 4.0], [0.0, 0.0, 0.0]]]).repeat(2, 1, 1)
    hidden[1] *= 2
    out = register_neurons.Shift([2, 0], token=2)(hidden)
    assert out[0].tolist() == [[0, 2, 0], [0, 3, 0], [5, 0, -7]]
    assert out[1].tolist() == [[0, 4, 0], [0, 6, 0], [10, 0, -14]]


def test_batched_equals_one_by_one_and_weights_are_shared() -> None:
    model, images = tiny.ours(num_registers=2), tiny.images(4)
    shifted = register_neurons.shift_neurons(model, [(0, 3), (0, 90), (2, 11)])
    single = torch.cat([shifted(image[None]) for image in images])
    torch.testing.assert_close(shifted(images), single)
    assert shifted.num_registers == 3 and model.num_registers == 2
    assert shifted.blocks[1].mlp.fc1.weight is model.blocks[1].mlp.fc1.weight
    assert not torch.allclose(shifted(images), model(images))


def test_no_neurons_is_the_identity() -> None:
    model, images = tiny.ours(num_registers=1), tiny.images()
    assert torch.equal(register_neurons.shift_neurons(model, [])(images), model(images))
    token_only = register_neurons.shift_neurons(model, [], add_token=True)
    assert token_only.num_registers == 2 and (token_only.reg_token[:, -1] == 0).all()


def test_original_and_random_streams_stay_as_they_were() -> None:
    model, images = tiny.ours(), tiny.images()
    before, state = model(images), torch.get_rng_state()
    register_neurons.shift_neurons(model, [(0, 0)])
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(model(images), before)


def test_shifted_models_merge() -> None:
    model = register_neurons.shift_neurons(tiny.ours(MergeConfig(r=4)), [(0, 1)])
    out = model(tiny.images(), trace=True)
    assert out.counts[-1] == 2 + 4 and (out.size[:, :2] == 1).all()


def test_gated_mlps_are_read_after_the_gate() -> None:
    model = tiny.randomise(tiny.ours(mlp_layer=SwiGLUPacked)).eval()
    images, seen = tiny.images(), []
    norms: list[nn.Module] = [block.mlp.norm for block in model.blocks]
    hooks = [norm.register_forward_pre_hook(lambda m, args: seen.append(args[0])) for norm in norms]
    layers = list(walk(model, images))
    for hook in hooks:
        hook.remove()
    for layer, expected in zip(layers, seen, strict=True):
        torch.testing.assert_close(register_neurons.hidden_activations(layer), expected)


def test_random_neurons_are_others_of_the_same_blocks() -> None:
    chosen = [(0, 1), (0, 2), (2, 5)]
    drawn = register_neurons.random_neurons(tiny.ours(), chosen, seed=1)
    assert sorted(block for block, _ in drawn) == [0, 0, 2] and not set(drawn) & set(chosen)
    assert drawn != register_neurons.random_neurons(tiny.ours(), chosen, seed=2)


@pytest.mark.parametrize("neurons", [[(3, 0)], [(0, 96)], [(0, -1)], [(0, 1), (0, 1)]])
def test_neurons_that_do_not_exist_are_refused(neurons: list[tuple[int, int]]) -> None:
    with pytest.raises(UserError, match="neurons"):
        register_neurons.shift_neurons(tiny.ours(), neurons)


def test_top_layer_is_where_norms_double() -> None:
    table = register_neurons.NormTable(torch.ones(2, 4), torch.tensor([[1.0, 1.5, 4.0, 9.0]] * 2))
    assert table.top_layer() == 2
    assert register_neurons.NormTable(torch.ones(2, 4), torch.tensor([[1.0, 1.1, 1.9, 2.0]] * 2)).top_layer() == 2
    with pytest.raises(UserError, match="nothing to find"):
        register_neurons.find_neurons(tiny.ours(), [], torch.zeros(2, 16, dtype=torch.bool), 0, 1)


# From a notebook


def test_a_planted_neuron_of_a_model_in_memory() -> None:
    model, images = planted_model(), bright_patches()
    found = ttr.find(model, images, outlier_rule=Rule("ratio", 3), top_k=3)
    assert found.ranking.neurons[0] == PLANTED and found.top_layer == 1 and found.top_layer_how == "doubles"
    assert ttr.summarise_neurons(found)["n_images_with_outliers"] == 5
    cut = 2 * found.cut + 50  # above the bright patches themselves
    result = ttr.measure(model, images, found.ranking.neurons, cut, top_k=(1,), controls=1)
    rows = {row["variant"]: row for row in ttr.summarise(result)}
    assert rows["before"]["outlier_share"] > 0 == rows["1 neurons moved"]["outlier_share"]
    assert rows["1 random neurons, draw 1"]["outlier_share"] == rows["before"]["outlier_share"]
    labelled = [(images, torch.zeros(6, dtype=torch.long))]
    assert "acc1" in ttr.summarise(ttr.measure(model, labelled, (), found.cut, labelled=True))[0]
    maps = ttr.compare(model, images, [PLANTED])
    assert maps.norm_before.shape == maps.class_after.shape == (6, 4, 4)
    assert maps.norm_after[:5].max() < 50 < maps.norm_before[:5].max()
    for figure in (
        ttr.draw_neurons(found),
        ttr.draw(result),
        ttr.draw_maps(maps, images.clamp(0, 1).permute(0, 2, 3, 1).numpy(), found.cut, 1),
    ):
        assert isinstance(figure, Figure)


# The commands


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(OWN_SIZES, "deit_digits", TOY)
    return ["--model", "deit_digits", "--dataset", "DIGITS", "--limit", "20", "--device", "cpu"]


def test_find_apply_eval(toy: list[str], tmp_path: Path) -> None:
    file = str(tmp_path / "neurons.json")
    words = [*toy, "--out", str(tmp_path), "--outlier_rule", "quantile:0.9"]
    assert analyze.main(["ttr", "find", *words, "--top_k", "6"]) == 0
    found = json.loads(Path(file).read_text())
    assert len(found["ranked"]) == 6 == sum(map(len, found["neurons"].values()))
    assert analyze.main(["ttr", "apply", *words, "--neurons", file, "--top_k", "3", "--show", "2"]) == 0
    assert analyze.main(["ttr", "eval", *words, "--neurons", file, "--top_k", "0", "4", "--controls", "1"]) == 0
    rows = {row["variant"]: row for row in json.loads((tmp_path / "ttr.json").read_text())["rows"]}
    assert set(rows) == {"before", "empty token only", "0 neurons moved", "4 neurons moved", "4 random neurons, draw 1"}
    assert rows["0 neurons moved"]["max_norm"] == rows["before"]["max_norm"] and "agree" not in rows["before"]
    assert rows["0 neurons moved"]["agree"] == 1 and rows["before"]["token_norm_by_block"] is None
    assert "acc1" in rows["before"]
    assert {"neurons.png", "applied.png", "ttr.png"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["find", "--outlier_rule", "much"], "outlier rule"),
        (["find", "--top_layer", "9"], "--top_layer"),
        (["find", "--detection_layer", "9"], "--detection_layer is 9"),
        (["find", "--outlier_rule", "abs:1000000"], "nothing to find"),
        (["eval"], "--neurons"),
        (["apply", "--neurons", "nowhere.json"], "nowhere.json"),
        (["find", "--top_k", "0"], "--top_k"),
    ],
)
def test_mistakes_are_one_line(
    toy: list[str], flags: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyze.main(["ttr", *flags, *toy, "--out", str(tmp_path / "o")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("analyze.py: error: ") and reason in err
