"""The main job on a user's own folder: its best weights, what a checkpoint carries, and predictions."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import digits, refusal, succeeds, toy_model

import linear_probe
import options
from build import load_for_inference
from datasets import DataConfig
from run import export, predict, visualize
from trainer import Best

ROOT = Path(__file__).resolve().parents[1]
Capture = pytest.CaptureFixture[str]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="module", autouse=True)
def small_model() -> Iterator[None]:
    with toy_model():
        yield


def make_photos(root: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """A tree ROOT/{train,val}/CLASS/*.png of noisy images in the colour of their class."""
    generator = np.random.default_rng(seed)
    for split, count in counts.items():
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(generator.normal(colour, 40, (28, 28, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("photos"), {"train": 8, "val": 4})


def own(photos: Path, *flags: object) -> list[str]:
    words = ["--dataset", "FOLDER", "--data_path", photos, "--num_workers", 0, "--device", "cpu", *flags]
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs at 24 pixels on one's own photos."""
    import main

    folder = tmp_path_factory.mktemp("run")
    flags = ["--model", "deit_digits", "--input_size", 24, "--eval_crop_ratio", 0.8, "--epochs", 2, "--lr", 0.05]
    flags += ["--mixup", 0, "--cutmix", 0, "--aa", "none", "--reprob", 0, "--r", 4, "--num_registers", 2]
    assert main.main(own(photos, *flags, "--output_dir", folder)) == 0
    return folder


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


# The best weights


def test_raw_and_average_weights_compete_for_best(trained: Path) -> None:
    best = torch.load(trained / "best.pth", weights_only=True)
    lines = log_lines(trained)
    scores = [(-line["test_acc1"], "raw") for line in lines] + [(-line["ema_acc1"], "average") for line in lines]
    assert best["best"] == -min(scores)[0]
    assert best["weights"] == next(line["best"] for line in reversed(lines) if line["best"])
    state = torch.load(trained / "checkpoint.pth", weights_only=True)
    if best["epoch"] == 2:
        won = state["model" if best["weights"] == "raw" else "model_ema"]
        assert all(torch.equal(best["model"][name], tensor) for name, tensor in won.items())


def test_equal_accuracy_is_decided_by_the_loss() -> None:
    better, worse, none = Best(90.0, 0.3), Best(90.0, 0.4), Best()
    assert min(worse, better, none, key=lambda best: best.rank) == better
    assert Best(91.0, 9.0).rank < better.rank


def test_an_evaluation_takes_raw_or_average_weights(capsys: Capture, photos: Path, trained: Path) -> None:
    line = log_lines(trained)[-1]
    for flags, wanted in (((), line["test_acc1"]), (("--use_ema",), line["ema_acc1"])):
        argv = own(photos, "--eval", "--resume", trained / "checkpoint.pth", *flags, "--output_dir", trained / "eval")
        out = succeeds(capsys, argv)
        result = json.loads((trained / "eval" / "result.json").read_text())
        assert result["rows"][0]["acc1"] == pytest.approx(wanted)
        assert ("(average weights)" in out) == bool(flags)
    assert "holds" in refusal(capsys, own(photos, "--eval", "--use_ema", "--resume", trained / "best.pth"))
    assert "--use_ema" in refusal(capsys, own(photos, "--eval", "--use_ema", "--model", "deit_digits"))


def test_an_older_checkpoint_goes_on_with_the_constant_decay(capsys: Capture, photos: Path, trained: Path) -> None:
    """It knows no number of updates, no loss of the best, no record of the data."""
    state = torch.load(trained / "checkpoint.pth", weights_only=True)
    for key in ("ema_updates", "best_loss", "data"):
        del state[key]
    state["args"] = {key: value for key, value in state["args"].items() if key not in ("given", "model_ema_warmup")}
    old = trained / "older" / "checkpoint.pth"
    old.parent.mkdir()
    torch.save(state, old)
    flags = ["--model", "deit_digits", "--input_size", 24, "--epochs", 3, "--r", 4, "--num_registers", 2]
    flags += ["--mixup", 0, "--cutmix", 0, "--eval_crop_ratio", 0.8]
    out = succeeds(capsys, own(photos, *flags, "--output_dir", old.parent, "--resume", "auto"))
    assert "at epoch 2" in out
    assert torch.load(old, weights_only=True)["ema_updates"] is None


# What a checkpoint carries


def test_a_checkpoint_carries_what_it_takes_to_use_it(capsys: Capture, photos: Path, trained: Path) -> None:
    data = torch.load(trained / "best.pth", weights_only=True)["data"]
    assert (
        data["input_size"] == [24, 24] and data["crop_pct"] == 0.8 and data["class_names"] == ["blue", "green", "red"]
    )
    argv = own(photos, "--eval", "--resume", trained / "best.pth", "--output_dir", trained / "eval")
    out = succeeds(capsys, argv)  # model, size, crop, registers, method and schedule come from the file
    result = json.loads((trained / "eval" / "result.json").read_text())
    best = torch.load(trained / "best.pth", weights_only=True)["best"]
    assert result["rows"][0]["acc1"] == pytest.approx(best) and result["data"] == data
    assert result["rows"][0]["r"] == "4" and result["num_registers"] == 2 and "note" not in out
    out = succeeds(capsys, [*argv, "--input_size", "16"])
    assert "note: --input_size 16 in place of the checkpoint's 24" in out
    args = options.parse_args(["--eval", "--resume", str(trained / "best.pth")])
    loaded = load_for_inference(args)
    assert (loaded.config.input_size, loaded.config.crop_pct) == (24, 0.8) and loaded.class_names == (
        "blue",
        "green",
        "red",
    )


def test_a_recipe_gives_way_to_the_checkpoint(capsys: Capture, tmp_path: Path) -> None:
    """The digits' recipe says 32 pixels; weights of 16 are evaluated at 16."""
    succeeds(capsys, digits("--input_size", 16, "--output_dir", tmp_path))
    out = succeeds(capsys, ["--eval", "--dataset", "DIGITS", "--limit", "20", "--resume", str(tmp_path / "best.pth")])
    expected = load_for_inference(options.parse_args(["--eval", "--resume", str(tmp_path / "best.pth")])).model.plan()
    assert f"tokens per block: {list(expected.counts)}" in out


def test_other_classes_are_an_error_and_fewer_are_not(
    capsys: Capture, photos: Path, trained: Path, tmp_path: Path
) -> None:
    other, fewer = tmp_path / "other" / "val", tmp_path / "fewer" / "val"
    for name in COLOURS:
        (other / f"my {name}").mkdir(parents=True)
        os.link(photos / "val" / name / "0.png", other / f"my {name}" / "0.png")
    line = refusal(capsys, own(other.parent, "--eval", "--resume", trained / "best.pth"))
    assert "class 0 is 'blue' in the weights and 'my blue' in the data" in line and "--finetune" in line
    (fewer / "red").mkdir(parents=True)  # number 0 in its own folder, number 2 in the weights
    for i in range(4):
        os.link(photos / "val" / "red" / f"{i}.png", fewer / "red" / f"{i}.png")
    out = succeeds(capsys, own(fewer.parent, "--eval", "--resume", trained / "best.pth"))
    assert "note: 2 of the checkpoint's 3 classes are not in the data" in out
    line = next(line for line in out.splitlines() if line.startswith("r=4"))
    argv = [
        str(fewer / "red"),
        "--resume",
        str(trained / "best.pth"),
        "--num_workers",
        "0",
        "--json",
        str(tmp_path / "p"),
    ]
    assert predict.main(argv) == 0
    hits = [row["top"][0]["name"] == "red" for row in json.loads((tmp_path / "p").read_text())["images"]]
    assert f"acc1 {100 * np.mean(hits):.3f}" in line  # as class 2 of the checkpoint, not as class 0 of the folder


def test_resume_keeps_the_model_and_the_optimizer(capsys: Capture, photos: Path, trained: Path) -> None:
    flags = ["--model", "deit_digits", "--epochs", 3, "--resume", trained / "checkpoint.pth", "--r", 4]
    for change, words in (
        (["--num_registers", 4], ["reg_token", "--num_registers"]),
        (["--input_size", 16], ["pos_embed", "--input_size"]),
        (["--opt", "sgd"], ["--opt adamw", "sgd"]),
    ):
        line = refusal(capsys, own(photos, *flags, *change))
        assert all(word in line for word in words), line


# Nothing finished is lost


def test_an_evaluation_leaves_the_record_of_its_run_alone(capsys: Capture, photos: Path, trained: Path) -> None:
    before = {name: (trained / name).read_bytes() for name in ("args.json", "log.txt", "best.pth", "checkpoint.pth")}
    succeeds(capsys, own(photos, "--eval", "--resume", trained / "best.pth", "--output_dir", trained))
    assert {name: (trained / name).read_bytes() for name in before} == before
    assert json.loads((trained / "result.json").read_text())["args"]["eval"] is True


# Small data


def test_a_new_head_starts_as_a_probe_of_its_weights(capsys: Capture, photos: Path, tmp_path: Path) -> None:
    """The first epoch, at no learning rate, has what scikit-learn's own logistic regression has."""
    succeeds(capsys, digits("--output_dir", tmp_path / "digits"))
    flags = ["--finetune", tmp_path / "digits" / "best.pth", "--epochs", 1, "--lr", 0, "--warmup_lr", 0, "--min_lr", 0]
    out = succeeds(capsys, own(photos, *flags, "--output_dir", tmp_path / "probed"))
    assert "head: starts as a linear probe of 24 training images" in out
    random = succeeds(capsys, own(photos, *flags, "--head_init", "random", "--output_dir", tmp_path / "random"))
    assert "probe" not in random
    assert log_lines(tmp_path / "probed")[0]["test_acc1"] > log_lines(tmp_path / "random")[0]["test_acc1"]
    assert "probe" not in succeeds(
        capsys, digits("--output_dir", tmp_path / "untrained")
    )  # no weights, nothing to probe
    assert "--head_init has no effect" in refusal(capsys, digits("--head_init", "probe"))


@pytest.mark.parametrize("present", [(0, 1, 2, 3), (1, 3), (2,)], ids=str)
def test_a_probe_is_scikit_learns_whatever_classes_there_are(present: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    targets = np.array(present)[generator.integers(0, len(present), 60)]
    features = generator.normal(size=(60, 5)) * 3 + 7
    features[:, 0] += 4 * targets
    weight, bias = linear_probe.fit_probe(features, targets, 5)
    predicted = (features @ weight.numpy().T + bias.numpy()).argmax(1)
    assert set(predicted) <= set(present)
    if len(present) > 1:
        from sklearn.linear_model import LogisticRegression

        scaled = (features - features.mean(0)) / features.std(0)
        assert (predicted == LogisticRegression(max_iter=500).fit(scaled, targets).predict(scaled)).mean() > 0.98


def test_defaults_adapt_to_short_runs() -> None:
    for epochs, warmup in ((300, 5), (30, 5), (10, 2), (2, 0.4)):
        assert options.parse_args(["--epochs", str(epochs)]).warmup_epochs == warmup
    assert options.parse_args(["--epochs", "2", "--warmup_epochs", "1"]).warmup_epochs == 1
    assert options.parse_args(["--dataset", "DIGITS"]).warmup_epochs == 3
    assert options.parse_args(["--dataset", "DIGITS", "--epochs", "5"]).warmup_epochs == 1


# No nonsense passes for a result


def test_outputs_that_are_not_finite_are_no_result(capsys: Capture, tmp_path: Path) -> None:
    argv = digits("--lr", 1e30, "--epochs", 2, "--output_dir", tmp_path)
    line = refusal(capsys, argv, status=1)
    assert "NaN or infinite" in line or "not finite" in line
    for file in tmp_path.glob("*.json"):
        json.loads(file.read_text(), parse_constant=lambda text: pytest.fail(f"{text} in a json file"))


def test_schedules_that_merge_nothing_are_refused(capsys: Capture) -> None:
    for flags in (["--r", "0.001"], ["--r", "2", "--dense_layers", "3"], ["--eval", "--r_evals", "2", "0.001"]):
        assert "merges nothing in the" in refusal(capsys, digits(*flags))
    succeeds(capsys, digits("--eval", "--merge", "tome", "--r", 0, limit=8))


# Predictions


def test_every_form_of_a_model_predicts_the_same(capsys: Capture, photos: Path, trained: Path, tmp_path: Path) -> None:
    weights = str(trained / "best.pth")
    forms: dict[str, list[str]] = {"checkpoint": [weights]}
    for command, place in (("folder", "exported"), ("onnx", "m.onnx"), ("program", "m.pt2")):
        assert export.main([command, "--resume", weights, "--out", str(tmp_path / place), "--checks", "1"]) == 0
        forms[command] = [str(tmp_path / place)]
    (tmp_path / "bad.png").write_text("no image")
    rows: dict[str, Any] = {}
    for form, (place,) in forms.items():
        file = tmp_path / f"{form}.json"
        argv = [str(photos / "val"), str(tmp_path / "bad.png"), "--resume", place, "--json", str(file), "--top", "3"]
        assert predict.main([*argv, "--num_workers", "0", "--batch_size", "7"]) == 0
        output = capsys.readouterr()
        assert "13 images in" in output.err and "bad.png: unreadable, left out" in output.out
        rows[form] = json.loads(file.read_text())["images"]
    reference = rows.pop("checkpoint")
    assert reference[-1] == {"image": str(tmp_path / "bad.png"), "error": "unreadable"}
    names = [[best["name"] for best in row["top"]] for row in reference[:-1]]
    assert all(set(row) == set(COLOURS) for row in names)
    for form, others in rows.items():
        assert [row["image"] for row in others] == [row["image"] for row in reference], form
        for row, other in zip(reference[:-1], others[:-1], strict=True):
            values = [[best["probability"] for best in r["top"]] for r in (row, other)]
            assert np.allclose(*values, atol=1e-5) and sum(values[0]) == pytest.approx(1), form


def test_a_fixed_batch_is_filled_and_cut() -> None:
    sizes = []

    def logits(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return images.mean((2, 3))

    classifier = predict.Classifier(logits, DataConfig(), "test", None, None, batch=5)
    images = torch.rand(12, 3, 4, 4)
    assert torch.equal(predict._logits(classifier, images), images.mean((2, 3))) and sizes == [5, 5, 5]
    assert classifier.label(3) == "class 3" and classifier.name(3) == "3"


def test_predictions_are_the_accuracy_of_the_evaluation(
    capsys: Capture, photos: Path, trained: Path, tmp_path: Path
) -> None:
    argv = [str(photos / "val"), "--resume", str(trained / "best.pth"), "--csv", str(tmp_path / "p.csv"), "--top", "1"]
    assert predict.main([*argv, "--num_workers", "0", "--picture", str(tmp_path / "merged.png")]) == 0
    with open(tmp_path / "p.csv") as file:
        rows = list(csv.DictReader(file))
    hits = [row["name"] == Path(row["image"]).parent.name for row in rows]
    assert 100 * np.mean(hits) == pytest.approx(torch.load(trained / "best.pth", weights_only=True)["best"])
    assert Image.open(tmp_path / "merged.png").size[0] > 100
    capsys.readouterr()
    assert predict.main([str(photos / "val" / "red"), "--resume", str(trained / "best.pth"), "--csv", "-"]) == 0
    assert capsys.readouterr().out.startswith("image,rank,class,name,label,probability\n")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nowhere.jpg"], ["nowhere.jpg does not exist"]),
        (["IMAGES", "--top", "0"], ["--top must be at least 1"]),
        (["IMAGES", "--epochs", "3"], ["--epochs has no effect on a prediction"]),
        (["IMAGES", "--resume", "absent.onnx"], ["absent.onnx does not exist"]),
        (["IMAGES", "--resume", "TEXT.onnx"], ["is not an ONNX file of run/export.py"]),
        (["IMAGES", "--resume", "TEXT.pt2"], ["is not a .pt2 of run/export.py"]),
        (["IMAGES", "--resume", "FOLDER"], ["is not a folder of run/export.py"]),
        (["IMAGES", "--resume", "RUN"], ["is the folder of a run; name", "best.pth"]),
        (["IMAGES", "--resume", "FOLDER", "--r", "4"], ["--r has no effect on an exported model"]),
        (["IMAGES", "--json", "-", "--csv", "-"], ["cannot both"]),
        (["IMAGES", "--model", "deit_digits", "--no_pretrained", "--picture", "p.png"], ["merges nothing"]),
        ([], ["IMAGE"]),
    ],
)
def test_mistakes_in_predicting_are_one_line(
    capsys: Capture, photos: Path, trained: Path, tmp_path: Path, flags: list[str], words: list[str]
) -> None:
    places = {"IMAGES": str(photos / "val"), "FOLDER": str(tmp_path), "RUN": str(trained)}
    for suffix in (".onnx", ".pt2"):
        (tmp_path / f"text{suffix}").write_text("text")
        places[f"TEXT{suffix}"] = str(tmp_path / f"text{suffix}")
    assert predict.main([places.get(word, word) for word in flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("predict.py: error: ") and error.count("\n") == 1 and all(word in error for word in words)


# What an export and a picture take from a checkpoint, and what they refuse


def test_an_export_keeps_what_was_there(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("x")
    assert export.main(["folder", "--model", "deit_digits", "--out", str(tmp_path)]) == 2
    assert "holds other files" in capsys.readouterr().err and os.listdir(tmp_path) == ["photo.jpg"]


def test_a_full_disk_leaves_no_half_of_an_export(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("models.export.save_file", full)
    assert export.main(["folder", "--model", "deit_digits", "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert "No space left" in error and error.count("\n") == 1 and not (tmp_path / "new").exists()


@pytest.mark.parametrize("flag", ["--epochs", "--save_every"])
def test_flags_of_training_are_refused_by_pictures_and_exports(capsys: Capture, tmp_path: Path, flag: str) -> None:
    words = ["--model", "deit_digits", "--out", str(tmp_path / "x.png"), flag, "3"]
    for command, main in (("merged", visualize.main), ("folder", export.main)):
        assert main([command, *words]) == 2
        assert f"{flag} has no effect" in capsys.readouterr().err


def test_ctrl_c_while_torch_is_imported_is_one_line() -> None:
    with subprocess.Popen(
        [sys.executable, "main.py", "--eval"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == "main.py: error: interrupted\n"
