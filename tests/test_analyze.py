"""run/analyze.py: every command on a toy model and a few images, what it writes, and mistakes in one line."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import analysis.command as program
import run.analyze as analyze
from models import UserError, create_model
from models.registry import OWN_SIZES
from tests.test_lost import write_annotation

TOY = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 10}
FAST = ["--device", "cpu", "--num_workers", "0"]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Weights of a small model that attends to something; a spec of it."""
    monkeypatch.setitem(OWN_SIZES, "deit_digits", TOY)
    torch.manual_seed(0)
    model = create_model("deit_digits", num_registers=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    file = tmp_path / "weights of mine.pth"
    torch.save({"model": model.state_dict()}, file)
    return f"deit_digits:{file}"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five images, one of them torn."""
    folder = tmp_path / "my photos"
    (folder / "below").mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(4):
        noise = random.integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / ("below" if index % 2 else ".") / f"{index}.png")
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    (folder / "notes.txt").write_text("no image")
    return folder


def analyse(command: str, out: Path, *flags: Any) -> dict[str, Any]:
    """Run a command that must succeed; its json."""
    assert analyze.main([command, "--out", str(out), *map(str, flags), *FAST]) == 0
    for file in out.glob("*.png"):
        picture = np.asarray(Image.open(file).convert("L"))
        assert min(picture.shape) > 150 and picture.std() > 5, f"{file.name} is empty"
    return json.loads((out / f"{command}.json").read_text())


def test_norms_of_two_models(toy: str, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    specs = [f"{toy},label=one", f"{toy},num_registers=0,r=[9,0,9],label=two"]
    content = analyse("norms", out, "--models", *specs, "--data", photos, "--show", 2, "--outlier-rule", "sigma:1")
    one, two = content["models"]
    assert (one["label"], one["n_images"]) == ("one", 4)
    assert set(one["stages"]) == {"input", "0", "1", "2", "final norm"}
    assert set(one["stages"]["2"]) == {"patches", "class", "register 1", "register 2"}
    assert set(two["stages"]["2"]) == {"patches", "class"}
    assert one["outliers"]["shared"]["cut"] == two["outliers"]["shared"]["cut"] == one["outliers"]["sigma:1"]["cut"]
    names = {"layers", "histogram", "kinds", "positions", "images"}
    assert {file.stem for file in out.glob("*.png")} == {f"norms_{name}" for name in names}
    values = np.load(out / "norms_one.npy")[:4]
    cut = one["outliers"]["sigma:1"]["cut"]
    assert one["outliers"]["sigma:1"]["share"] == pytest.approx((values > cut).mean())
    assert one["outliers"]["sigma:1"]["token_share"] == pytest.approx((values > cut).mean(), abs=0.01)
    assert one["stages"]["2"]["patches"]["mean"] == pytest.approx(values.mean(), rel=1e-5)
    arrays = np.load(out / "norms_two.npz")
    assert arrays["outlier_frequency"].shape == (8, 8)
    assert arrays["patch_counts"].sum(axis=1).tolist() == [4 * 64, 4 * 55, 4 * 55, 4 * 46, 4 * 46]
    assert content["run"]["models"][1]["tokens"] == [56, 56, 47]


def test_labels_never_share_a_file(toy: str, photos: Path, tmp_path: Path) -> None:
    content = analyse(
        "norms", tmp_path / "out", "--models", toy, toy, f"{toy},label=a b", f"{toy},label=a_b", *one_of(photos)
    )
    assert len({row["label"] for row in content["models"]}) == 4
    assert len(list((tmp_path / "out").glob("*.npz"))) == 4


def one_of(photos: Path) -> list[str]:
    return ["--data", str(photos), "--limit", "1", "--show", "0"]


def test_no_outlier_is_null_in_json(toy: str, photos: Path, tmp_path: Path) -> None:
    flags = ["--data", photos, "--limit", "1", "--outlier_rule", "abs:1000000"]
    content = analyse("similarity", tmp_path / "out", "--models", toy, *flags)["models"][0]["shared"]
    assert content["neighbours"]["auc"] is None and content["cosines"]["outlier-outlier"] is None
    assert content["images_with"] == 0 and content["neighbours"]["auc_n"] == 0
    assert "NaN" not in (tmp_path / "out" / "similarity.json").read_text()


def test_no_image_to_draw(toy: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "torn.jpg").rename(photos / "0 torn.jpg")  # the first one, which --show 1 draws
    flags = ["--models", toy, "--data", str(photos), "--show", "1", "--out", str(tmp_path / "out")]
    assert analyze.main(["norms", *flags, *FAST]) == 2
    assert "none of the 1 images to be drawn can be read" in capsys.readouterr().err


def test_a_models_own_boolean_wins_over_that_of_all() -> None:
    both = program.main_args(["--r", "4", "--prop_attn"], program.parse_spec("deit_digits,prop_attn=false"))
    assert both.prop_attn is False and both.r == "4"
    assert program.main_args(["--r", "4", "--no_prop_attn"], program.parse_spec("deit_digits,prop_attn=true")).prop_attn


def test_weights_that_are_not_finite(
    toy: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(toy.partition(":")[2])
    weights = torch.load(file)["model"]
    weights["blocks.1.mlp.fc2.bias"][3] = torch.nan
    torch.save(weights, file)
    assert analyze.main(["norms", "--models", toy, "--out", str(tmp_path / "out"), *one_of(photos), *FAST]) == 2
    assert "NaN or infinite values in blocks.1.mlp.fc2.bias" in capsys.readouterr().err


def test_norms_are_those_of_the_model(toy: str, photos: Path, tmp_path: Path) -> None:
    content = analyse("norms", tmp_path / "out", "--models", toy, "--data", photos, "--show", 0)
    args = analyze.build_parser().parse_args(["norms", "--models", toy, "--data", str(photos), "--out", "unused"])
    loaded = program.load_models(args, FAST)[0]
    with torch.no_grad():
        tokens = [loaded.model(batch.images, trace=True).tokens for batch in program.Images(args, loaded)]
    lengths = torch.cat(tokens).norm(dim=-1)
    final = content["models"][0]["stages"]["final norm"]
    assert final["patches"]["mean"] == pytest.approx(float(lengths[:, 3:].mean()), rel=1e-5)
    assert final["class"]["mean"] == pytest.approx(float(lengths[:, 0].mean()), rel=1e-5)
    assert final["register 2"]["max"] == pytest.approx(float(lengths[:, 2].max()), rel=1e-5)


def test_attention_with_merging_and_at_another_size(toy: str, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--r", "9", "--input_size", "40", "--show", "1", "--patches", "0,0;9,9", "--batch_size", "3"]
    content = analyse("attention", out, "--models", f"{toy},label=a", f"{toy},r=0,label=b", "--data", photos, *flags)
    table = content["models"][0]["per_block"]
    assert list(table) == ["class", "register 1", "register 2", "mean of patches"]
    assert content["models"][0]["n_images"] == 4
    for metrics in table.values():
        masses = np.array([metrics[name] for name in ("class", "registers", "patches")])
        np.testing.assert_allclose(masses.sum(axis=0), 1, atol=1e-5)
        assert (np.array(metrics["entropy"]) <= 1 + 1e-6).all()
    arrays = np.load(out / "attention_a.npz")
    assert arrays["maps"].shape == (1, 3, 4, 10, 10)
    assert arrays["patch_maps"].shape == (1, 3, 2, 10, 10)
    assert arrays["layer_maps"].shape == (1, 3, 4, 10, 10)
    assert (out / "attention_compare.png").is_file() and (out / "attention_heads_b.png").is_file()


def test_splitting_batches_changes_no_number(
    toy: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = analyse("attention", tmp_path / "a", "--models", toy, "--data", photos, "--show", 0)
    monkeypatch.setattr("analysis.walk.MAP_BYTES", 1)  # one image at a time
    parts = analyse("attention", tmp_path / "b", "--models", toy, "--data", photos, "--show", 0)
    for token_type, metrics in whole["models"][0]["per_block"].items():
        for name, values in metrics.items():
            assert parts["models"][0]["per_block"][token_type][name] == pytest.approx(values, rel=1e-4)


def test_similarity_on_a_data_set_of_ours(toy: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--dataset", "DIGITS", "--limit", "7", "--outlier_rule", "sigma:1"]
    content = analyse("similarity", out, "--models", f"{toy},r=5,label=a", *flags)["models"][0]
    assert content["n_images"] == 7
    neighbours = content["shared"]["neighbours"]
    assert neighbours["normal_pairs"] + neighbours["outlier_pairs"] == 7 * 4 * 8 * 7
    assert -1 <= content["shared"]["cosines"]["outlier-normal"] <= 1
    assert content["map_kinds"] == ["class", "register 1", "register 2"]
    assert np.diag(np.array(content["map_cosines"])) == pytest.approx(1, abs=1e-5)
    assert {file.stem.split("_")[1] for file in out.glob("*.png")} == {"neighbours", "outliers", "maps"}


def test_cka_within_and_between_models(toy: str, tmp_path: Path) -> None:
    flags = ["--dataset", "DIGITS", "--limit", "7", "--format", "png", "svg", "--dpi", "60"]
    content = analyse("cka", tmp_path, "--models", f"{toy},label=a", f"{toy},r=5,label=b", *flags)
    assert np.array(content["models"][0]["cka"]).shape == (5, 5) and content["models"][0]["stages"][-1] == "final norm"
    assert np.array(content["between"]["a / b"])[0, 0] == pytest.approx(1, abs=1e-4)  # before anything merges
    assert {file.name for file in tmp_path.glob("*.svg")} == {"cka_layers.svg", "cka_models.svg"}
    svg = (tmp_path / "cka_models.svg").read_text()
    assert "tome r=5" in svg and "DIGITS val: 7 images, every 52nd of 360" in svg  # figures say what they are of


def test_one_yardstick_for_all_models(toy: str, tmp_path: Path) -> None:
    """The review's case: a model's own quantile finds its share in every model, the first model's cut does not."""
    flags = ["--models", f"{toy},label=a", f"{toy},r=9,label=b", "--dataset", "DIGITS", "--limit", "12"]
    cuts = set()
    for command in ("norms", "similarity"):
        show = ["--show", "0"] if command == "norms" else []
        content = analyse(command, tmp_path / command, *flags, *show)
        cuts |= {row["outlier_cut"]["cut"] for row in content["models"]}
        assert {row["outlier_cut"]["of"] for row in content["models"]} == {"a"}
    assert len(cuts) == 1
    norms = json.loads((tmp_path / "norms" / "norms.json").read_text())["models"][1]["outliers"]
    assert norms["shared"]["share"] != norms["quantile:0.98"]["share"]
    content = analyse("reconstruction", tmp_path / "rec", *flags, "--epochs", "1", "--show", "0")
    one, two = content["models"]
    assert two["shared"]["mse"]["ratio_minus_baseline_n"] <= 6 and "ratio_minus_baseline" not in one["shared"]["mse"]
    assert one["outlier_cut"] == two["outlier_cut"] and one["shared"]["cut"] == two["shared"]["cut"]
    assert two["shared_scaled"]["cut"] != two["shared"]["cut"]


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Four images of different sizes with a bright object each, in the layout of a plain folder."""
    random = np.random.default_rng(0)
    for index in range(4):
        image = random.integers(0, 40, (30 + 3 * index, 44 - index, 3), dtype=np.uint8)
        image[8:20, 12:28] += 180
        (tmp_path / "voc" / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "voc" / "images" / f"{index}.png")
        write_annotation(tmp_path / "voc" / "annotations" / f"{index}.xml", (13, 9, 28, 20, 0, index % 2))
    return tmp_path / "voc"


@pytest.mark.parametrize("view", ["pred", "fms", "seed"])
def test_lost_at_native_resolution(toy: str, voc: Path, tmp_path: Path, view: str) -> None:
    out = tmp_path / "out"
    specs = ["--models", f"{toy},label=a", f"{toy},r=9,label=b"]
    content = analyse("lost", out, *specs, "--voc", voc, "--visualize", view, "--show", 2, "--no-hard")
    assert [row["n_images"] for row in content["models"]] == [2, 2]
    boxes = json.loads((out / "preds.json").read_text())["a"]
    overlaps = np.array([box["iou"] for box in boxes])
    assert content["models"][0]["corloc"] == pytest.approx((overlaps >= 0.5).mean())
    assert content["models"][0]["corloc_ci95"] is None  # two images
    for box, (height, width) in zip(boxes, ((30, 44), (36, 42)), strict=True):
        x1, y1, x2, y2 = box["box"]
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
    assert (out / f"lost_{view}.png").is_file()


def test_lost_sweep_says_that_it_flatters(toy: str, voc: Path, tmp_path: Path) -> None:
    flags = ["--sweep", "--visualize", "none", "--preset", "regs-small-vits", "--bias", "-0.3"]
    content = analyse("lost", tmp_path / "out", "--models", toy, "--voc", voc, *flags)
    expected = {"feat": "v", "layer": -1, "k": 100, "center": True, "normalize": True, "bias": -0.3}
    assert content["setting"] == expected
    row = content["models"][0]
    assert len(row["sweep"]) == 3 * 3 * 11  # the toy has three blocks
    assert row["sweep_best"]["corloc"] == max(entry["corloc"] for entry in row["sweep"])
    assert "flatters" in row["sweep_note"]


def test_lost_without_boxes_draws_only(toy: str, photos: Path, tmp_path: Path) -> None:
    content = analyse("lost", tmp_path / "out", "--models", toy, "--data", photos, "--limit", "3", "--show", "2")
    assert content["models"][0]["corloc"] is None


@pytest.mark.parametrize(
    ("text", "label", "flags"),
    [
        ("deit_small", None, ("--model", "deit_small")),
        ("deit_small:a/b.pth", None, ("--model", "deit_small", "--finetune", "a/b.pth")),
        ("x:https://h/w.pth,label=a b", "a b", ("--model", "x", "--finetune", "https://h/w.pth")),
        ("x,registers=4,r=(16,-1)", None, ("--model", "x", "--num_registers=4", "--r=(16,-1)")),
        ("x,r=[16,0,8],prop-attn=false", None, ("--model", "x", "--r=[16,0,8]", "--no_prop_attn")),
    ],
)
def test_specs(text: str, label: str | None, flags: tuple[str, ...]) -> None:
    spec = program.parse_spec(text)
    assert (spec.label, spec.flags) == (label, flags)


@pytest.mark.parametrize("text", ["", ":w.pth", "label=x", "deit_small,r", "deit_small,r=", "deit_small,,r=1"])
def test_specs_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--models"):
        program.parse_spec(text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "PHOTOS"], "no model"),
        (["--models", "TOY", "--model", "deit_tiny", "--data", "PHOTOS"], "either --models or"),
        (["--models", "TOY"], "no images: give --data"),
        (["--models", "TOY", "--data", "nowhere"], "--data nowhere does not exist"),
        (["--models", "TOY", "--data", "PHOTOS", "--dataset", "DIGITS"], "not both"),
        (["--models", "TOY", "--data", "PHOTOS", "--epochs", "3"], "--epochs has no effect"),
        (["--models", "TOY", "--data", "PHOTOS", "--layre", "3"], "unknown flag --layre"),
        (["--models", "TOY", "--data", "PHOTOS", "--layer", "3"], "blocks 0..2"),
        (["--models", "TOY,rr=3", "--data", "PHOTOS"], "unknown 'rr'"),
        (["--models", "TOY", "--data", "PHOTOS", "--outlier_rule", "quantle:0.98"], "none of quantile:0.98, sigma:3"),
        (["--models", "TOY", "--data", "PHOTOS", "--outlier_rule", "quantile:98"], "none of quantile:0.98, sigma:3"),
        (["--models", "TOY,regs=4", "--data", "PHOTOS"], "did you mean registers?"),
        (["--models", "TOY", "TOY,limit=3", "--data", "PHOTOS"], "on the same images"),
        (["--models", "TOY", "--data", "PHOTOS", "--dpi", "3"], "--dpi"),
        (["--models", "deit_digitz:TOY", "--data", "PHOTOS"], "."),
        (["--models", "TOY,merge=mctf", "--data", "PHOTOS"], "give --r"),
    ],
)
def test_mistakes_end_with_one_line(
    toy: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    filled = [flag.replace("TOY", toy).replace("PHOTOS", str(photos)) for flag in flags]
    assert analyze.main(["norms", "--out", str(tmp_path / "out"), *filled, *FAST]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("analyze.py: error: ") and message in error[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --voc"),
        (["--voc", "VOC", "--input_size", "64"], "--input_size has no effect"),
        (["--voc", "VOC", "--year", "2007"], "no VOC2007"),
        (["--voc", "VOC", "--head", "3"], "heads 0..2"),
        (["--voc", "VOC", "--k_patches", "0"], "at least 1"),
        (["--data", "VOC", "--no_hard"], "need boxes"),
    ],
)
def test_mistakes_of_lost(
    toy: str, voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    filled = [flag.replace("VOC", str(voc)) if flag == "VOC" else flag for flag in flags]
    assert analyze.main(["lost", "--models", toy, "--out", str(tmp_path / "out"), *filled, *FAST]) == 2
    assert message in capsys.readouterr().err


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze.main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("norms", "attention", "similarity", "lost"):
        assert command in text
        assert analyze.main([command, "--help"]) == 0
        assert "--models" in capsys.readouterr().out


DOCUMENTS = sorted((Path(__file__).resolve().parents[1] / "docs").glob("*.md"))
TEXT = "\n".join(file.read_text() for file in DOCUMENTS).replace("\\\n", " ")
COMMANDS = re.findall(r"^ +python run/analyze\.py (?!COMMAND)(.+)$", TEXT, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_parse(command: str) -> None:
    args, main_argv = analyze.build_parser().parse_known_args(shlex.split(command))
    for spec in program.specs_of(args) if getattr(args, "run_folder", None) is None else ():
        program.main_args(main_argv, spec)
    assert args.run is not None


def test_every_command_is_documented() -> None:
    (action,) = analyze.build_parser()._subparsers._group_actions  # type: ignore[union-attr]
    assert {command.split()[0] for command in COMMANDS} == set(action.choices)  # type: ignore[arg-type]
