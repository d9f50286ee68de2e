"""Pictures of merged tokens: colours, outlines, layout, and the command on models of several kinds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import run.visualize as visualize
from models import MergeConfig, MergingViT
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
    colours = visualize.mean_colours(images, group, (3, 2))
    for b in range(2):
        for patch in range(6):
            members = [m for m in range(6) if group[b, m] == group[b, patch]]
            pixels = [images[b, :, m // 2 * 4 : m // 2 * 4 + 4, m % 2 * 4 : m % 2 * 4 + 4] for m in members]
            torch.testing.assert_close(colours[b, patch], torch.stack(pixels).mean(dim=(0, 2, 3)))


def test_outlines_run_between_groups_and_nowhere_else() -> None:
    group = np.array([[0, 0, 1], [2, 2, 1]])
    picture = visualize.draw_groups(np.full((2, 3, 3), 0.8), group, cell=10)
    dark = picture.max(axis=2) < 100
    expected = np.zeros((20, 30), dtype=bool)
    expected[9:11, :20] = True  # between the rows, not inside group 1
    expected[:, 19:21] = True
    assert picture.shape == (20, 30, 3)
    assert (dark == expected).all()
    assert set(np.unique(picture[~dark])) == {204}


def test_outlines_show_on_black() -> None:
    picture = visualize.draw_groups(np.zeros((1, 2, 3)), np.array([[0, 1]]), cell=8)
    assert picture[0, 0, 0] == 0 and picture[0, 7, 0] > 60


def test_input_panel_fits_the_groups() -> None:
    assert visualize.to_picture(torch.rand(3, 32, 48), (4, 6), 42).shape == (4 * 42, 6 * 42, 3)


def test_layout_is_one_picture_of_equal_panels() -> None:
    panel = np.full((30, 40, 3), 7, dtype=np.uint8)
    canvas = visualize.lay_out([[panel] * 3] * 2, [("a", "b")] * 3, ["first", "second"])
    pixels = np.asarray(canvas)
    assert (pixels == 7).all(axis=2).sum() == 6 * 30 * 40
    assert (pixels[:, -5:] == 255).all() and (pixels[-3:] == 255).all()


@pytest.mark.parametrize("flags", [[], ["--num_registers", "3"], ["--num_registers", "2", "--register_layer", "1"]])
def test_any_prefix(toy: list[str], flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "tokens.png"
    words = [*toy, "--r", "4", *flags, "--num_images", "2", "--blocks", "0,2", "--out", str(out)]
    assert visualize.main(words) == 0, capsys.readouterr().err
    panel = 84 * 4  # four patches a side
    assert Image.open(out).width == 3 * panel + 4 * visualize.GAP


def test_titles_count_the_groups_that_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MergingViT(image_size=32, patch_size=8, dim=24, depth=3, heads=3, mlp_dim=48, num_registers=2, r=4).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        out = model(images, trace=True)
    titles: list[tuple[str, str]] = []
    monkeypatch.setattr(visualize, "lay_out", lambda rows, given, *_: titles.extend(given))
    pictures = visualize.Pictures(images, visualize.DataConfig(), ("a", "b"))
    visualize.draw_merged(images, out.groups, (0, 1, 2), (4, 4), pictures)
    assert titles == [("input", "16 patches"), *((f"after block {i}", f"{12 - 4 * i} patch tokens") for i in range(3))]
    assert [count - 3 for count in out.counts] == [12, 8, 4]
    assert MergeConfig(r=4) == model.merge


def test_folder_of_images_at_another_resolution(toy: list[str], photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens.png"
    words = [*toy, "--r", "0.3", "--images", str(photos), "--input_size", "48", "--out", str(out)]
    assert visualize.main(words) == 0
    cell = round(visualize.PANEL / 6)
    picture = Image.open(out)
    assert picture.width == 4 * 6 * cell + 5 * visualize.GAP  # input and all three blocks
    assert picture.height > 2 * 6 * cell


def test_weights_are_loaded(toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = dict(image_size=32, patch_size=8, dim=24, depth=3, heads=3, mlp_dim=96, num_classes=10)
    torch.save(MergingViT(**sizes, num_registers=2).state_dict(), tmp_path / "w.pth")
    words = [*toy, "--r", "4", "--weights", str(tmp_path / "w.pth"), "--out", str(tmp_path / "o.png")]
    assert visualize.main(words) == 0
    assert "2 registers, weights: " + str(tmp_path / "w.pth") in capsys.readouterr().out


def test_class_names_are_readable() -> None:
    assert visualize.class_name("n01440764") == "tench"
    assert visualize.class_name("7") == "7"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "--out"),
        (["--out", "o.png"], "--r 16"),
        (["--out", "o.png", "--r", "4", "--blocks", "1,3"], "blocks 0..2"),
        (["--out", "o.png", "--r", "4", "--blocks", "x"], "--blocks"),
        (["--out", "o.png", "--r", "4", "--num_images", "0"], "--num_images"),
        (["--out", "o.nothing", "--r", "4"], "o.nothing"),
        (["--out", "o.png", "--r", "4", "--images", "nowhere"], "nowhere"),
        (["--out", "o.png", "--r", "4", "--blokcs", "1"], "--blokcs"),
        (["--out", "o.png", "--r", "4", "--weights", "nowhere.pth"], "nowhere.pth"),
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
    assert visualize.main([*words, str(photos)]) == 2
    assert "a.jpg" in capsys.readouterr().err
    (photos / "empty").mkdir()
    assert visualize.main([*words, str(photos / "empty")]) == 2
    assert "holds no image" in capsys.readouterr().err


@pytest.mark.skipif(not DATA.is_dir(), reason="no real images here")
def test_real_images(tmp_path: Path) -> None:
    out = tmp_path / "tokens.png"
    words = ["merged", "--model", "deit_tiny", "--weights", str(DATA / "deit_tiny_imagenet.safetensors"), "--r", "16"]
    words += ["--images", str(DATA / "imagenette" / "val"), "--num_images", "1", "--device", "cpu", "--out", str(out)]
    assert visualize.main(words) == 0
    assert Image.open(out).width == 5 * 336 + 6 * visualize.GAP
