"""Pictures of merged tokens: colours, outlines, layout, and the command on models of several kinds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import run.visualize as visualize
from analysis import merged_tokens, panels
from analysis import walk as walking
from analysis.walk import attention, walk
from models import MergeConfig, MergingViT, UserError
from models.registry import OWN_SIZES

TOY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 10}
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line that draws a model of 16 patches."""
    monkeypatch.setitem(OWN_SIZES, "deit_digits", TOY)
    return ["merged", "--model", "deit_digits", "--dataset", "DIGITS", "--device", "cpu"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "my photos"
    (folder / "below").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "b.png")
    Image.fromarray(noise).convert("L").save(folder / "below" / "c.jpg")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_a_groups_colour_is_the_mean_of_its_pixels() -> None:
    images = torch.rand(2, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    group = torch.tensor([[0, 1, 1, 2, 0, 2], [0, 0, 0, 0, 0, 1]])
    colours = panels.mean_colours(images, group, (3, 2))
    for b in range(2):
        for patch in range(6):
            members = [m for m in range(6) if group[b, m] == group[b, patch]]
            pixels = [images[b, :, m // 2 * 4 : m // 2 * 4 + 4, m % 2 * 4 : m % 2 * 4 + 4] for m in members]
            torch.testing.assert_close(colours[b, patch], torch.stack(pixels).mean(dim=(0, 2, 3)))


def test_outlines_run_between_groups_and_nowhere_else() -> None:
    group = np.array([[0, 0, 1], [2, 2, 1]])
    picture = panels.draw_groups(np.full((2, 3, 3), 0.8), group, cell=10)
    dark = picture.max(axis=2) < 100
    expected = np.zeros((20, 30), dtype=bool)
    expected[9:11, :20] = True  # between the rows, not inside group 1
    expected[:, 19:21] = True
    assert picture.shape == (20, 30, 3)
    assert (dark == expected).all()
    assert set(np.unique(picture[~dark])) == {204}


def test_outlines_show_on_black() -> None:
    picture = panels.draw_groups(np.zeros((1, 2, 3)), np.array([[0, 1]]), cell=8)
    assert picture[0, 0, 0] == 0 and picture[0, 7, 0] > 60


def test_input_panel_fits_the_groups() -> None:
    assert panels.to_picture(torch.rand(3, 32, 48), (4, 6), 42).shape == (4 * 42, 6 * 42, 3)


def test_layout_is_one_picture_of_equal_panels() -> None:
    panel = np.full((30, 40, 3), 7, dtype=np.uint8)
    canvas = panels.lay_out([[panel] * 3] * 2, [("a", "b")] * 3, ["first", "second"])
    pixels = np.asarray(canvas)
    assert (pixels == 7).all(axis=2).sum() == 6 * 30 * 40
    assert (pixels[:, -5:] == 255).all() and (pixels[-3:] == 255).all()


@pytest.mark.parametrize("flags", [[], ["--num_registers", "3"], ["--num_registers", "2", "--register_layer", "1"]])
def test_any_prefix(toy: list[str], flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "tokens.png"
    words = [*toy, "--r", "4", *flags, "--num_images", "2", "--blocks", "0,2", "--out", str(out)]
    assert visualize.main(words) == 0, capsys.readouterr().err
    panel = 84 * 4  # four patches a side
    assert Image.open(out).width == 3 * panel + 4 * panels.GAP


def test_titles_count_the_groups_that_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MergingViT(image_size=32, patch_size=8, dim=24, depth=3, heads=3, mlp_dim=48, num_registers=2, r=4).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        out = model(images, trace=True)
    titles: list[tuple[str, str]] = []
    monkeypatch.setattr(merged_tokens, "lay_out", lambda rows, shown, *_: titles.extend(shown))
    merged_tokens.draw(merged_tokens.measure(model, images), blocks=(0, 1, 2))
    assert titles == [("input", "16 patches"), *((f"after block {i}", f"{12 - 4 * i} patch tokens") for i in range(3))]
    assert [count - 3 for count in out.counts] == [12, 8, 4]
    assert MergeConfig(r=4) == model.merge


def test_folder_of_images_at_another_resolution(toy: list[str], photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens.png"
    words = [*toy, "--r", "0.3", "--images", str(photos), "--input_size", "48", "--out", str(out)]
    assert visualize.main(words) == 0
    cell = round(merged_tokens.PANEL / 6)
    picture = Image.open(out)
    assert picture.width == 4 * 6 * cell + 5 * panels.GAP  # input and all three blocks
    assert picture.height > 2 * 6 * cell


def test_weights_are_loaded(toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = dict(image_size=32, patch_size=8, dim=24, depth=3, heads=3, mlp_dim=96, num_classes=10)
    torch.save(MergingViT(**sizes, num_registers=2).state_dict(), tmp_path / "w.pth")
    words = [*toy, "--r", "4", "--weights", str(tmp_path / "w.pth"), "--out", str(tmp_path / "o.png")]
    assert visualize.main(words) == 0
    assert "2 registers, weights: " + str(tmp_path / "w.pth") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "--out"),
        (["--out", "o.png", "--r", "4", "--blocks", "1,3"], "blocks 0..2"),
        (["--out", "o.png", "--r", "4", "--blocks", "x"], "--blocks"),
        (["--out", "o.png", "--r", "4", "--num_images", "0"], "--num_images"),
        (["--out", "o.nothing", "--r", "4"], "o.nothing"),
        (["--out", "o.png", "--r", "4", "--images", "nowhere"], "nowhere"),
        (["--out", "o.png", "--r", "4", "--blokcs", "1"], "--blokcs"),
        (["--out", "o.png", "--r", "4", "--weights", "nowhere.pth"], "nowhere.pth"),
        (["--out", "o.png", "--r", "4", "--views", "groups", "criteria"], "--merge mctf"),
        (["--out", "o.png", "--r", "4", "--merge", "lgtm", "--views", "criteria"], "not lgtm"),
        (["--out", "o.png", "--r", "4", "--views", "beauty"], "--views"),
        (["--out", "o.png", "--r", "4", "--gif", "o.mp4"], "o.mp4"),
        (["--out", "o.png", "--r", "4", "--data_out", "o.csv"], "o.csv"),
    ],
)
def test_mistakes_are_one_line(
    toy: list[str],
    flags: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert visualize.main([*toy, *flags]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith("visualize.py: error: ") and reason in err
    assert not list(tmp_path.iterdir())


def test_torn_and_absent_images_are_named(toy: list[str], photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "a.jpg").write_bytes(b"\xff\xd8 torn")
    words = [*toy, "--r", "4", "--out", str(photos / "o.png"), "--images"]
    assert visualize.main([*words, str(photos)]) == 0
    assert f"unreadable, left out: {photos}/a.jpg" in capsys.readouterr().out
    (photos / "empty").mkdir()
    assert visualize.main([*words, str(photos / "empty")]) == 2
    assert "holds no image" in capsys.readouterr().err


def build(**options: Any) -> tuple[MergingViT, torch.Tensor]:
    """A model with weights large enough that tokens differ, and three images."""
    torch.manual_seed(0)
    options = {"num_registers": 2, "merge": MergeConfig(r=3), **options}
    model = MergingViT(image_size=32, patch_size=8, dim=24, depth=3, heads=3, mlp_dim=48, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, torch.rand(3, 3, 32, 32)


METHODS = [
    MergeConfig("tome", 3),
    MergeConfig("tome", 4, bidirectional=True),
    MergeConfig("mctf", 4, min_tokens=0),
    MergeConfig("mctf", 4, min_tokens=0, one_step_ahead="off"),
    MergeConfig("lgtm", 3, dense_layers=0, global_layer=1),
    MergeConfig("pitome", 3),
]


@pytest.mark.parametrize("config", METHODS, ids=lambda config: f"{config.method} {config.one_step_ahead}")
def test_groups_are_those_of_the_forward(config: MergeConfig) -> None:
    model, images = build(merge=config, register_layer=1)
    blocks = merged_tokens.block_merges(model, images)
    with torch.no_grad():
        out = model(images, trace=True)
    for block, group in zip(blocks, out.groups, strict=True):
        assert (block.group == group).all()
        same = group.unsqueeze(1) == group.unsqueeze(2)
        assert (block.size == same.sum(dim=2)).all()
    assert any(block.pairs.shape[1] for block in blocks)


@pytest.mark.parametrize("config", METHODS, ids=lambda config: f"{config.method} {config.one_step_ahead}")
def test_pairs_explain_the_groups(config: MergeConfig) -> None:
    """Joining the pairs of a block, and nothing else, turns its incoming groups into the outgoing ones."""
    for block in merged_tokens.block_merges(*build(merge=config)):
        for i, group in enumerate(block.group_in):
            joined = group.clone()
            for merged, target in block.pairs[i].tolist():
                joined[joined == merged] = target
            expected = block.group[i].unsqueeze(0) == block.group[i].unsqueeze(1)
            assert ((joined.unsqueeze(0) == joined.unsqueeze(1)) == expected).all()


def test_many_images_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = build(merge=MergeConfig("mctf", 4, min_tokens=0))
    whole = merged_tokens.block_merges(model, images, range(3))
    monkeypatch.setattr(walking, "MAP_BYTES", 1)
    for at_once, in_parts in zip(whole, merged_tokens.block_merges(model, images, range(3)), strict=True):
        assert (at_once.group == in_parts.group).all() and (at_once.pairs == in_parts.pairs).all()
        assert list(at_once.criteria) == ["attention", "informativeness", "size", "similarity"]
        for name, values in at_once.criteria.items():
            torch.testing.assert_close(values, in_parts.criteria[name])


def test_criteria_by_hand() -> None:
    model, images = build(merge=MergeConfig("mctf", 4, min_tokens=0, tau_sim=0.5, tau_info=3, tau_size=2))
    layer = list(walk(model, images))[2]
    found = merged_tokens.token_scores(layer)
    received = attention(layer).mean(dim=(1, 2))
    prefix, count = layer.num_prefix_tokens, layer.before.x.shape[1]
    torch.testing.assert_close(found["attention"], received[:, prefix:] * count)
    least = received.amin(dim=1, keepdim=True)
    torch.testing.assert_close(found["informativeness"], (least / received[:, prefix:]) ** (1 / 3))
    torch.testing.assert_close(found["size"], layer.before.size[:, prefix:] ** -0.5)  # prefix tokens have size 1
    x = torch.nn.functional.normalize(layer.before.x, dim=-1)
    cosine = x @ x.transpose(1, 2)
    for i in range(prefix, count):
        others = [j for j in range(prefix, count) if (i - j) % 2]
        expected = ((cosine[:, i, others].amax(dim=1) + 1) / 2) ** 2
        torch.testing.assert_close(found["similarity"][:, i - prefix], expected)


def test_criteria_without_looking_ahead_compare_what_leaves_the_block() -> None:
    config = MergeConfig("mctf", (0, 4, 0), min_tokens=0, one_step_ahead="off")
    model, images = build(merge=config)
    plain = list(walk(model, images, r=0))[1]
    x = torch.nn.functional.normalize(plain.after.x[:, 3:], dim=-1)
    expected = (x @ x.transpose(1, 2))[:, 0, 1::2].amax(dim=1)
    found = merged_tokens.token_scores(list(walk(model, images))[1])["similarity"][:, 0]
    torch.testing.assert_close(found, (expected + 1) / 2)


def test_lines_colour_what_merges_and_nothing_else() -> None:
    group = np.array([[0, 0, 1], [2, 3, 4], [5, 5, 6]])
    picture = np.full((60, 60, 3), 120, dtype=np.uint8)
    drawn = panels.draw_pairs(picture, group, np.array([[0, 1]]), cell=20).astype(int)
    assert abs(drawn[23:] - 120).max() <= 2
    saturation = np.ptp(drawn, axis=2)
    assert saturation[1, 1] > saturation[1, 58] > 20  # merged, then joined
    assert drawn[10, 25].min() > 200  # on the line
    nothing = panels.draw_pairs(picture, group, np.zeros((0, 2), dtype=int), cell=20)
    assert (nothing == picture).all()


def test_colour_scales() -> None:
    scale = panels.Scale(1.0, 100.0, log=True)
    np.testing.assert_allclose(scale.position(np.array([0.5, 1, 10, 100, 200])), [0, 0, 0.5, 1, 1], atol=1e-9)
    assert scale.ticks() == [1, 2, 5, 10, 20, 50, 100]
    assert panels.Scale(0.71, 0.98).ticks() == pytest.approx([0.75, 0.8, 0.85, 0.9, 0.95])
    same = panels.Scale(1.0, 1.0)
    assert same.ticks() == [1.0] and not same.position(np.ones(2)).any()


def test_all_views_with_film_and_data(toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, film, data = tmp_path / "t.png", tmp_path / "new" / "t.gif", tmp_path / "other" / "t.npz"
    words = [*toy, "--merge", "mctf", "--r", "4", "--min_tokens", "0", "--num_registers", "1", "--num_images", "2"]
    words += ["--blocks", "1,2", "--views", *merged_tokens.VIEWS, "--out", str(out)]
    assert visualize.main([*words, "--gif", str(film), "--data_out", str(data)]) == 0, capsys.readouterr().err
    width = 3 * 336 + 4 * panels.GAP + panels.LEGEND
    assert Image.open(out).width == width and Image.open(out).height > 2 * 6 * 336
    with Image.open(film) as frames:
        assert frames.n_frames == 4 and frames.info["loop"] == 0  # type: ignore[attr-defined]
        assert frames.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    said = json.loads(out.with_suffix(".json").read_text())
    assert [block["patch_tokens"] for block in said["blocks"]] == [16, 12, 8]  # the first block merges nothing
    for block in said["blocks"]:
        assert [sum(int(size) * count for size, count in table.items()) for table in block["sizes"]] == [16, 16]
        assert [sum(table.values()) for table in block["sizes"]] == [block["patch_tokens"]] * 2
    arrays = np.load(data)
    assert arrays["size"].shape == arrays["group"].shape == (3, 2, 16)
    assert arrays["pairs/0"].shape == (2, 0, 2) and arrays["pairs/1"].shape == (2, 4, 2)
    assert (arrays["attention/2"] > 0).all()


def test_a_picture_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = build()
    result = merged_tokens.measure(model, images)
    monkeypatch.setattr(merged_tokens, "FRAME_IMAGES", 2)
    two = list(merged_tokens.draw_frames(result, blocks=(0, 2)))
    monkeypatch.setattr(merged_tokens, "FRAME_IMAGES", 9)
    assert len(two) == 3 and two[0].height < next(merged_tokens.draw_frames(result, blocks=(0, 2))).height
    monkeypatch.setattr(merged_tokens, "MAX_PIXELS", 9 * 336**2 - 1)
    with pytest.raises(UserError, match="num_images"):
        merged_tokens.draw(result, blocks=(0, 2))


@pytest.mark.skipif(not DATA.is_dir(), reason="no real images here")
def test_real_images(tmp_path: Path) -> None:
    out = tmp_path / "tokens.png"
    words = ["merged", "--model", "deit_tiny", "--weights", str(DATA / "deit_tiny_imagenet.safetensors"), "--r", "16"]
    words += ["--images", str(DATA / "imagenette" / "val"), "--num_images", "1", "--device", "cpu", "--out", str(out)]
    assert visualize.main(words) == 0
    assert Image.open(out).width == 5 * 336 + 6 * panels.GAP


# From a notebook


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_in_memory(wrapped: bool) -> None:
    model, images = build(merge=MergeConfig("mctf", 4, min_tokens=0))
    result = merged_tokens.measure(
        model, [(images[:2], None), (images[2:], None)] if wrapped else images, criteria=range(3)
    )
    picture = merged_tokens.draw(result, views=merged_tokens.VIEWS, blocks=(1,))
    assert picture.width == 2 * 336 + 3 * panels.GAP + panels.LEGEND
    assert (
        result.captions == ("image 1", "image 2", "image 3") and 0 <= result.pictures.min() < result.pictures.max() <= 1
    )
    assert [block["patch_tokens"] for block in merged_tokens.summarise(result)["blocks"]] == [16, 12, 8]
    assert merged_tokens.arrays(result)["group"].shape == (3, 3, 16)
    assert len(list(merged_tokens.draw_frames(result))) == 1 + 3


def test_any_method_that_scores_tokens_draws_them() -> None:
    model, images = build(merge=MergeConfig("pitome", 3))
    result = merged_tokens.measure(model, images, criteria=range(3))
    assert merged_tokens.draw(result, views=("criteria",)).height < 4 * 336 + 200  # one row, of the energy, per image
    assert len(list(merged_tokens.draw_frames(result, views=("groups", "criteria")))) == 4
