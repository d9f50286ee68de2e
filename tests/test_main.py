"""The command line as a user meets it: mistakes in one line, files of a run, evaluation of what was trained."""

import json
import math
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from runs import digits, make_tree, refusal, run, succeeds, toy_model

import main
import options
from models.errors import UserError
from run.kill_test import checkpoint, differences, log_lines

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", autouse=True)
def toy() -> Any:
    with toy_model():
        yield


@pytest.fixture(scope="module")
def trained(toy: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run with registers and merging."""
    folder = tmp_path_factory.mktemp("trained")
    assert main.main(digits("--r", 2, "--num_registers", 2, "--output_dir", folder)) == 0
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree"), {"a": 3, "b": 3, "c": 2}, {"a": 2, "b": 1, "c": 2})


def folder_run(tree: Path, *flags: object) -> list[str]:
    words = ["--dataset", "FOLDER", "--data_path", tree, "--model", "deit_digits", "--input_size", 16]
    training = [] if "--eval" in flags else ["--epochs", 1, "--warmup_epochs", 0]
    words += ["--batch_size", 4, "--num_workers", 0, *training, *flags]
    return [str(word) for word in words]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub address where nobody listens, and an empty cache."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


# Mistakes


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--modle", "deit_tiny"], ["--modle", "did you mean --model?"]),
        (["--batch-sise=3"], ["--batch_sise", "did you mean --batch_size?"]),
        (["--zzz"], ["unknown flag --zzz", "--help"]),
        (["stray"], ["unexpected argument 'stray'"]),
        (["-x"], ["unexpected argument '-x'"]),
        (["--mode", "deit_tiny"], ["unknown flag --mode"]),  # no abbreviations
        (["--model", "deit_smal"], ["unknown model 'deit_smal'", "deit_small"]),
        (["--model", "swin_tiny_patch4_window7_224"], ["swin_tiny_patch4_window7_224", "not supported"]),
        (["--opt", "adamv"], ["--opt 'adamv'", "did you mean 'adam"]),
        (["--sched", "cosin"], ["--sched 'cosin'", "did you mean 'cosine'"]),
        (["--merge", "tom"], ["--merge", "tome", "mctf", "lgtm"]),
        (["--amp", "fp8"], ["--amp", "bf16"]),
        (["--device", "gpu"], ["--device", "cuda"]),
        (["--aa", "nonsense"], ["--aa nonsense"]),
        (["--distillation_type", "sof"], ["--distillation_type", "soft"]),
        (["--distillation_type", "soft", "--teacher_model", "regnety_16"], ["unknown teacher", "regnety_16"]),
        (["--batch_size", "0"], ["--batch_size", "must be >= 1", "not 0"]),
        (["--batch_size", "1e3"], ["--batch_size", "invalid integer value: '1e3'"]),
        (["--batch_size"], ["--batch_size", "expected one argument"]),
        (["--epochs", "-1"], ["--epochs", "must be >= 1"]),
        (["--lr", "nan"], ["--lr", "must be >= 0, not nan"]),
        (["--lr", "inf"], ["--lr", "not inf"]),
        (["--limit", "0"], ["--limit", "must be >= 1"]),
        (["--hflip", "2"], ["--hflip", "must be >= 0 and <= 1"]),
        (["--full_r_max", "inf"], ["--full_r_max", "invalid number value"]),
        (["--model_ema_decay", "1.5"], ["--model_ema_decay", "<= 1"]),
        (["--r", "abc"], ["cannot read r='abc'", "16, 0.35, 16,0,8 or (16,-1)"]),
        (["--r", "-1"], ["r='-1'"]),
        (["--r", "1.5"], ["1.5", "0.35"]),
        (["--r", "4,x"], ["cannot read r='4,x'"]),
        (["--r", "(4,5)"], ["(4,5)"]),
        (["--r", "nan"], ["nan"]),
        (["--r", "1,1,1,1"], ["r lists 4 blocks, but the model has 3"]),
        (["--r", "2", "--activate_layer", "9"], ["block 9", "0..2"]),
        (["--r", "2", "--activate_layer", "1,1"], ["names a block twice"]),
        (["--r", "2", "--activate_layer", "a"], ["--activate_layer", "invalid list of blocks value: 'a'"]),
        (["--r", "2", "--activate_layer=-1"], ["activate_layers", "-1"]),
        (["--r", "2", "--dense_layers", "9"], ["dense_layers is 9"]),
        (["--merge", "lgtm", "--r", "2", "--global_layer", "9"], ["global_layer is 9"]),
        (["--num_registers", "2", "--register_layer", "9"], ["register_layer", "9"]),
        (["--throughput"], ["--throughput", "--eval"]),
        (["--agreement"], ["--agreement", "--eval"]),
        (["--r_evals", "0", "2"], ["--r_evals", "--eval"]),
        (["--sam_adaptive"], ["--sam_adaptive", "--sam_rho"]),
        (["--save_every_steps", "2"], ["--save_every_steps", "--output_dir"]),
        (["--resume", "auto"], ["--resume auto", "--output_dir"]),
        (["--merge", "mctf"], ["--merge mctf merges nothing", "--r"]),
        (["--merge", "none", "--r", "4"], ["'none'"]),
        (["--r", "2", "--tau_sim", "1"], ["tau_sim has no effect", "tome"]),
        (["--prop_attn", "--r", "2", "--local_grid", "2"], ["local_grid has no effect"]),
        (["--full_weight", "1"], ["--full_weight has no effect without merging"]),
        (["--consistency_weight", "1"], ["--consistency_weight", "--full_weight"]),
        (["--r", "2", "--full_weight", "1", "--full_r_max", "1.5"], ["--full_r_max"]),
        (["--merged_weight", "0"], ["nothing to train"]),
        (["--epochs", "2", "--r_warmup_epochs", "1"], ["--r_warmup_epochs has no effect"]),
        (["--r", "2", "--r_warmup_epochs", "3"], ["--r_warmup_epochs 3 reaches r only after", "1 epochs"]),
        (["--train_only", "registers_head"], ["--num_registers"]),
        (["--register_lr_mult", "2"], ["--register_lr_mult has no effect without registers"]),
        (["--bce_loss"], ["--bce_loss", "--smoothing 0"]),
        (["--src"], ["--src", "--three_augment"]),
        (["--mixup", "0.8", "--batch_size", "5"], ["even --batch_size"]),
        (["--teacher_path", "t.pth"], ["--teacher_path has no effect"]),
        (["--opt_betas", "0.9"], ["--opt_betas needs two"]),
        (["--pretrained"], ["deit_digits has no published weights"]),
        (["--finetune", "none.pth"], ["none.pth does not exist"]),
        (["--resume", "none.pth"], ["none.pth does not exist"]),
        (["--config", "none.yaml"], ["cannot read --config none.yaml"]),
        (["--output_dir", __file__], ["--output_dir", "is a file"]),
    ],
)
def test_a_mistake_is_one_line(capsys: Capture, flags: list[str], words: list[str]) -> None:
    line = refusal(capsys, digits(*flags))
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["data/IMNET does not exist", "data/IMNET/train/CLASS/", "ILSVRC2012", "--dataset DIGITS"]),
        (["--dataset", "FOLDER", "--data_path", "x"], ["x does not exist", "x/train/CLASS/"]),
        (["--dataset", "WDS"], ["data not found", "train*.tar"]),
        (["--dataset", "DIGIT"], ["unknown --dataset 'DIGIT'", "did you mean 'DIGITS'?"]),
    ],
)
def test_missing_data_shows_the_tree(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refusal(capsys, [*flags, "--no_pretrained"])
    for word in words:
        assert word in line


def test_a_real_process_prints_one_line_and_no_traceback(tmp_path: Path) -> None:
    """Also what Python itself writes to stderr counts: warnings, threads at exit."""
    script = Path(main.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "--dataset", "DIGITS", "--model", "deit_smal"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "deit_small" in done.stderr


def test_help_exits_with_zero(capsys: Capture) -> None:
    ended = run(capsys, ["--help"])
    assert ended.status == 0 and ended.err == ""
    for word in ("--r_evals", "merging", "optimisation", "--config FILE"):
        assert word in ended.out


def damaged(kind: str, trained: Path, folder: Path) -> Path:
    """A file that is no checkpoint of this model, for one of several reasons."""
    path = folder / f"{kind}.pth"
    good = (trained / "checkpoint.pth").read_bytes()
    if kind == "torn":
        path.write_bytes(good[: len(good) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>404 not found</html>")
    elif kind == "no_weights":
        torch.save({"epoch": 3}, path)
    elif kind == "resnet":
        torch.save({"model": {"conv1.weight": torch.zeros(1)}}, path)
    else:
        state = torch.load(trained / "checkpoint.pth", weights_only=True)["model"]
        torch.save({"model": {key: torch.zeros(*tensor.shape[:-1], 7) for key, tensor in state.items()}}, path)
    return path


@pytest.mark.parametrize("flag", ["--finetune", "--resume"])
@pytest.mark.parametrize("kind", ["torn", "empty", "text", "no_weights", "resnet", "other_shapes"])
def test_a_checkpoint_that_does_not_serve(capsys: Capture, trained: Path, tmp_path: Path, kind: str, flag: str) -> None:
    path = damaged(kind, trained, tmp_path)
    for extra in ([], ["--eval"]):
        assert str(path) in refusal(capsys, digits(flag, path, *extra))


def test_weights_alone_cannot_be_resumed(capsys: Capture, trained: Path) -> None:
    line = refusal(capsys, digits("--resume", trained / "best.pth", "--output_dir", ""))
    assert "it has no optimizer, lr_scheduler" in line and "use --finetune" in line


def test_other_optimizer_options_are_refused_on_resume(capsys: Capture, trained: Path) -> None:
    line = refusal(capsys, digits("--resume", trained / "checkpoint.pth", "--train_only", "head", "--epochs", 2))
    assert "does not fit these optimizer options" in line and "--finetune" in line


def test_without_a_network_the_way_out_is_named(capsys: Capture, no_network: None, tree: Path) -> None:
    line = refusal(capsys, folder_run(tree, "--model", "deit_tiny"))
    assert "deit_tiny" in line and "--finetune" in line and "--no_pretrained" in line
    line = refusal(capsys, folder_run(tree, "--distillation_type", "hard", "--teacher_model", "resnet18"))
    assert "resnet18" in line and "--teacher_path" in line


# Flags


def parse(*flags: object) -> Any:
    return options.parse_args([str(flag) for flag in flags])


def test_every_flag_has_its_hyphen_spelling() -> None:
    parser = options.build_parser()
    spelled = [flag for action in parser._actions for flag in action.option_strings if "_" in flag]
    assert len(spelled) > 60
    for action in parser._actions:
        for flag in [flag for flag in action.option_strings if flag.startswith("--") and flag != "--help"]:
            is_float = isinstance(action.type, options.Number) and action.type.kind is float
            word = {"train_only": "head", "lora_targets": "qkv"}.get(action.dest, "0.5" if is_float else "1")
            value = [] if action.nargs == 0 else [str((action.choices or [word])[0])]
            value *= action.nargs if isinstance(action.nargs, int) and action.nargs else 1
            plain, hyphened = (parser.parse([f, *value]) for f in (flag, flag.replace("_", "-")))
            assert vars(plain) == vars(hyphened), flag
            assert getattr(plain, action.dest) == getattr(hyphened, action.dest)


def test_spellings_of_deit() -> None:
    assert parse("--data-set", "CIFAR10", "--data-path", "/d-1/e_f").data_path == "/d-1/e_f"
    assert parse("--data-set", "CIFAR10").dataset == "CIFAR10"
    assert parse("--data-set=CIFAR10").dataset == "CIFAR10"
    args = parse("--ThreeAugment", "--dist-eval", "--unscale-lr", "--batch-size", 8, "--no-model-ema")
    assert args.three_augment and args.unscale_lr and args.batch_size == 8 and not args.model_ema


def test_booleans_have_a_negative_which_contradicts_them() -> None:
    assert parse("--prop_attn").prop_attn is True and parse().prop_attn is None
    for flags in (("--prop_attn", "--no_prop_attn"), ("--no-repeated-aug", "--repeated_aug")):
        with pytest.raises(UserError, match=r"contradict each other; give one of them"):
            parse(*flags)
    negatives = [f for a in options.build_parser()._actions for f in a.option_strings if f.startswith("--no_")]
    for flag in negatives:
        assert getattr(parse(flag), flag.removeprefix("--no_")) is False


def test_a_recipe_gives_way_to_config_and_flags(tmp_path: Path) -> None:
    assert (parse().mixup, parse().model) == (0.8, None)
    args = parse("--dataset", "DIGITS")
    assert (args.mixup, args.model, args.num_workers, args.input_size) == (0.0, "deit_digits", 0, 32)
    assert parse("--dataset", "DIGITS", "--mixup", 0.3).mixup == 0.3
    file = tmp_path / "c.yaml"
    file.write_text("dataset: DIGITS\nmixup: 0.2\nepochs: 7\n")
    args = parse("--config", file, "--epochs", 9)
    assert (args.dataset, args.mixup, args.epochs, args.model) == ("DIGITS", 0.2, 9, "deit_digits")


def test_every_flag_is_in_one_group() -> None:
    groups = [options.flags_of(group) for group in options.FLAG_GROUPS]
    flags = frozenset(vars(parse())) - {"given", "schedule"}
    assert frozenset().union(*groups) == flags and sum(map(len, groups)) == len(flags)
    inference = options.flags_of(*options.INFERENCE_GROUPS)
    assert {"config", "model", "r", "tau_sim", "finetune", "dataset", "limit", "seed", "device"} <= inference
    assert not {"epochs", "resume", "r_evals", "r_warmup_epochs", "drop_path", "compile", "output_dir"} & inference


def test_given_flags_are_those_of_the_command_line_and_of_its_config(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("lr: 1e-3\nmodel-ema: false\nsam_rho: null\n")
    assert options.given_flags(["--dataset", "DIGITS", "--batch-size=64", "--no_pin_mem"]) == {
        *("dataset", "batch_size", "pin_mem")
    }
    assert options.given_flags(["--config", str(file), "--lr", "1"]) == {"config", "lr", "model_ema"}
    assert options.given_flags([]) == frozenset()
    mctf = options.given_flags(["--eval", "--use_mctf", "True", "--mctf_type", "[16,0,0,1,1,1,20,40,1,1,0]"])
    assert mctf - {"eval"} <= options.flags_of("merging") and {"merge", "r", "tau_size"} <= mctf
    assert capsys.readouterr().out == ""


def test_config_sets_defaults_of_every_kind(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: deit_tiny\nlr: 1e-3\nmodel-ema: false\nthree_augment: true\nopt_betas: [0.9, 0.95]\n"
        "r: [2, 0, 4]\nactivate_layer: [0, 2]\nsam_rho: null\ndist_eval: false\neval: true\nr_evals: [0, '4,2']\n"
    )
    args = parse("--config", file)
    assert (args.model, args.lr, args.model_ema, args.three_augment) == ("deit_tiny", 1e-3, False, True)
    assert (args.opt_betas, args.r, args.activate_layer) == ([0.9, 0.95], "2,0,4", (0, 2))
    assert (args.sam_rho, args.eval, args.r_evals) == (0.0, True, ["0", "4,2"])
    args = parse("--config", file, "--r_evals", 3, "--model", "deit_small")
    assert args.r_evals == ["3"] and args.model == "deit_small"
    assert args.given == sorted(args.given) and {"model", "model_ema", "opt_betas", "r_evals"} <= set(args.given)
    file.write_text("no_pretrained: true\nno-model-ema: false\ndata_set: DIGITS\n")  # every spelling of a flag
    args = parse("--config", file)
    assert (args.pretrained, args.model_ema, args.dataset) == (False, True, "DIGITS")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modle: deit_tiny", ["unknown key 'modle'", "did you mean 'model'?"]),
        ("epochs: many", ["--epochs", "invalid integer value: 'many'"]),
        ("epochs: 0", ["must be >= 1"]),
        ("batch_size: true", ["batch_size takes a value"]),
        ("batch_size: false", ["batch_size takes a value"]),
        ("model_ema: 3", ["model_ema takes true or false"]),
        ("- epochs", ["holds a list", "write lines such as"]),
        ("", ["is empty", "write lines such as"]),
        ("no_model_ema: 1", ["no_model_ema takes true or false"]),
        ("model_ema: true\nno_model_ema: true", ["model_ema is set twice"]),
        ("a: [", ["cannot read --config"]),
        ("config: other.yaml", ["unknown key 'config'"]),
        ("lr: {a: 1}", ["--lr"]),
        ("mixup: [0.1, 0.2]", ["--mixup"]),
    ],
)
def test_a_mistake_in_a_config_is_one_line(capsys: Capture, tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "c.yaml").write_text(text)
    line = refusal(capsys, digits("--config", tmp_path / "c.yaml"))
    for word in words:
        assert word in line


# Training


def test_files_of_a_run(trained: Path) -> None:
    assert {p.name for p in trained.iterdir() if "tfevents" not in p.name} == {
        "args.json",
        "best.pth",
        "checkpoint.pth",
        "log.txt",
    }
    assert next(trained.glob("events.out.tfevents.*")).stat().st_size > 100
    args = json.loads((trained / "args.json").read_text())
    assert (args["model"], args["r"], args["num_registers"], args["epochs"]) == ("deit_digits", "2", 2, 1)
    (line,) = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    wanted = ["epoch", "train_loss", "train_ce", "lr", "test_loss", "test_acc1", "test_acc5", "ema_acc1"]
    assert list(line) == [*wanted, "images_per_s", "seconds", "best"]
    assert line["epoch"] == 0 and line["seconds"] > 0 and line["images_per_s"] > 0
    assert 1 < line["train_loss"] < 4 and 0 <= line["test_acc1"] <= line["test_acc5"] <= 100
    state = torch.load(trained / "checkpoint.pth", weights_only=True)
    wanted = ["model", "model_ema", "optimizer", "lr_scheduler", "scaler", "epoch", "step", "rng", "sampler", "merge"]
    assert set(wanted) | {"args", "best"} <= state.keys() and (state["epoch"], state["step"]) == (1, 0)
    best = torch.load(trained / "best.pth", weights_only=True)
    won = {"raw": "model", "average": "model_ema"}[line["best"]]
    assert best["best"] == max(line["test_acc1"], line["ema_acc1"]) == state["best"] and best["weights"] == line["best"]
    assert differences(best["model"], state[won]) == []
    digits_classes = [str(i) for i in range(10)]
    assert best["data"] == state["data"] and best["data"]["class_names"] == digits_classes
    assert best["data"]["input_size"] == [16, 16] or best["data"]["input_size"] == [32, 32]


def trains(capsys: Capture, folder: Path, *flags: object) -> dict[str, Any]:
    """One epoch of two updates; returns its checkpoint with the log line."""
    succeeds(capsys, digits("--output_dir", folder, *flags, limit=20))
    first, *rest = log_lines(folder)
    assert first["best"] in ("raw", "average")  # the first epoch is the best so far
    line = rest[-1] if rest else first
    line.pop("best")
    assert all(math.isfinite(value) for value in line.values())
    return checkpoint(folder) | {"line": line}


@pytest.mark.parametrize(
    "flags",
    [
        ["--accumulation_steps", "2"],
        ["--clip_grad", "0.1"],
        ["--amp", "bf16"],
        ["--grad_checkpointing", "--r", "2"],
        ["--sam_rho", "0.05", "--mixup", "0.8"],
        ["--sam_rho", "0.5", "--sam_adaptive"],
        ["--no_model_ema"],
        ["--three_augment", "--color_jitter", "0.3"],
        ["--r", "0.35", "--merge", "lgtm", "--dense_layers", "1", "--global_layer", "2"],
        ["--r", "(2,-1)", "--min_tokens", "8"],
        ["--r", "4", "--epochs", "2", "--r_warmup_epochs", "1"],
        ["--sched", "step", "--opt", "sgd"],
        ["--bce_loss", "--smoothing", "0", "--cutmix", "1"],
        ["--repeated_aug", "--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.25"],
        ["--drop_path", "0.3", "--drop", "0.1"],
        ["--num_registers", "3", "--register_layer", "1", "--r", "2"],
        ["--num_workers", "1"],
    ],
    ids=" ".join,
)
def test_every_way_to_train(capsys: Capture, tmp_path: Path, flags: list[str]) -> None:
    state = trains(capsys, tmp_path, *flags)
    assert ("ema_acc1" in state["line"]) == ("--no_model_ema" not in flags)
    assert (state["model_ema"] is None) == ("--no_model_ema" in flags)


def test_compile_wraps_the_model_in_training_and_evaluation(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    trains(capsys, tmp_path, "--compile")
    assert len(compiled) == 1
    state = tmp_path / "checkpoint.pth"
    succeeds(capsys, digits("--eval", "--resume", state, "--compile", "--throughput", "--batch_size", 2, limit=4))
    assert len(compiled) == 3  # ours and, for the speed, timm's


def test_pairing_logs_its_parts(capsys: Capture, tmp_path: Path) -> None:
    flags = ("--r", 4, "--full_weight", 1, "--consistency_weight", 3, "--consistency_threshold", 0)
    line = trains(capsys, tmp_path, *flags)["line"]
    parts = [key for key in line if key.startswith("train_")]
    assert parts == ["train_loss", "train_ce", "train_full_ce", "train_consistency", "train_selected"]
    total = line["train_ce"] + line["train_full_ce"] + 3 * line["train_consistency"]
    assert line["train_loss"] == pytest.approx(total, rel=1e-5) and line["train_selected"] == 1


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_distillation_from_a_teacher_of_our_own(capsys: Capture, trained: Path, tmp_path: Path, kind: str) -> None:
    flags = ("--distillation_type", kind, "--teacher_model", "deit_digits", "--teacher_path", trained / "best.pth")
    line = trains(capsys, tmp_path, *flags)["line"]
    assert line["train_loss"] == pytest.approx((line["train_ce"] + line["train_distillation"]) / 2, rel=1e-5)


def test_a_distilled_deit_learns_by_both_heads(capsys: Capture, trained: Path, tmp_path: Path) -> None:
    flags = ["--model", "deit_tiny_distilled", "--no_pretrained", "--drop_path", 0, "--no_model_ema", "--r", 1]
    flags += ["--distillation_type", "hard", "--teacher_model", "deit_digits", "--teacher_path", trained / "best.pth"]
    succeeds(capsys, digits(*flags, "--batch_size", 2, "--output_dir", tmp_path, limit=4))
    assert {"train_ce", "train_distillation"} <= log_lines(tmp_path)[0].keys()
    assert "head_dist.weight" in checkpoint(tmp_path)["model"]


def test_train_only_and_the_rate_of_registers(capsys: Capture, trained: Path, tmp_path: Path) -> None:
    start = checkpoint(trained)["model"]

    def changed(*flags: object) -> set[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        trains(capsys, folder, "--finetune", trained / "checkpoint.pth", *flags)
        model = checkpoint(folder)["model"]
        return {name for name in start if not torch.equal(start[name], model[name])}

    head = {"head.weight", "head.bias"}
    assert changed("--train_only", "head") == head
    assert changed("--train_only", "registers_head") == head | {"reg_token"}
    assert changed() == set(start)
    groups = trains(capsys, tmp_path / "mult", "--num_registers", 2, "--register_lr_mult", 5)["optimizer"]
    rates = {
        (group["lr_scale"], round(group["lr"] / groups["param_groups"][0]["lr"], 6)) for group in groups["param_groups"]
    }
    assert rates == {(1.0, 1.0), (5.0, 5.0)}


def test_finetune_says_that_the_head_is_fresh(capsys: Capture, trained: Path, tree: Path, tmp_path: Path) -> None:
    out = succeeds(capsys, folder_run(tree, "--finetune", trained / "best.pth", "--output_dir", tmp_path))
    assert "head is fresh: 10 classes in the checkpoint, 3 in the model" in out
    assert checkpoint(tmp_path)["model"]["head.weight"].shape[0] == 3
    line = refusal(capsys, folder_run(tree, "--eval", "--resume", trained / "best.pth"))
    assert "10 and 3 classes: class 0 is '0' in the weights and 'a' in the data" in line
    line = refusal(capsys, folder_run(tree, "--eval", "--finetune", trained / "best.pth"))
    assert "10 and 3 classes" in line


def test_resume_wins_over_finetune_over_pretrained(capsys: Capture, trained: Path) -> None:
    state = trained / "checkpoint.pth"
    out = succeeds(capsys, digits("--eval", "--resume", state, "--finetune", "absent.pth", limit=4))
    assert f"weights: {state}" in out
    out = succeeds(capsys, digits("--eval", "--finetune", state, "--pretrained", limit=4))
    assert f"--pretrained gives way to {state}" in out


def test_a_model_named_by_its_checkpoint_is_stored_under_that_name(
    capsys: Capture, trained: Path, tree: Path, tmp_path: Path
) -> None:
    argv = [word for word in folder_run(tree) if word not in ("--model", "deit_digits")]
    succeeds(capsys, [*argv, "--finetune", str(trained / "best.pth"), "--output_dir", str(tmp_path)])
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert state["args"]["model"] == "deit_digits" and state["model"]["reg_token"].shape[1] == 2


@pytest.mark.parametrize(
    ("train", "val"), [({"a": 2}, {"a": 1}), ({"a": 1, "b": 1}, {"a": 1, "b": 1}), ({"a": 1}, {"a": 3})]
)
def test_the_smallest_data_sets(capsys: Capture, tmp_path: Path, train: dict[str, int], val: dict[str, int]) -> None:
    """One class, and fewer images than a batch."""
    tree = make_tree(tmp_path / "data", train, val)
    succeeds(capsys, folder_run(tree, "--output_dir", tmp_path / "run", "--r", 1))
    (line,) = log_lines(tmp_path / "run")
    assert line["test_acc5"] == 100  # over min(5, classes)
    result = evaluated(capsys, tmp_path / "run", folder_run(tree, "--eval"))
    assert result["n_images"] == sum(val.values()) and result["rows"][0]["acc5"] == 100


# Evaluation


def evaluated(capsys: Capture, folder: Path, argv: list[str], *flags: object) -> dict[str, Any]:
    """result.json of --eval of a run's checkpoint."""
    out = folder / "eval"
    weights = ["--resume", str(folder / "checkpoint.pth"), "--output_dir", str(out)]
    succeeds(capsys, [*argv, "--eval", *weights, *map(str, flags)])
    return json.loads((out / "result.json").read_text())


EVAL = ["--dataset", "DIGITS", "--limit", "40"]


def test_evaluation_takes_everything_from_our_checkpoint(capsys: Capture, trained: Path) -> None:
    result = evaluated(capsys, trained, EVAL)
    assert (result["model"], result["num_registers"], result["dataset"]) == ("deit_digits", 2, "DIGITS")
    assert result["weights"] == str(trained / "checkpoint.pth") and result["n_images"] == 40
    assert result["merge"]["method"] == "tome" and result["merge"]["r"] == "2"
    (row,) = result["rows"]
    assert list(row) == ["r", "schedule", "tokens", "gmacs", "params", "acc1", "acc5", "loss"]
    assert (row["r"], row["schedule"], row["tokens"]) == ("2", [2, 2, 2], [17, 15, 13])
    (line,) = log_lines(trained)
    assert (row["acc1"], row["acc5"]) == (line["test_acc1"], line["test_acc5"])
    assert row["loss"] == pytest.approx(line["test_loss"], rel=1e-6)
    assert row["params"] == sum(t.numel() for t in checkpoint(trained)["model"].values())
    assert {"python", "torch", "torchvision", "timm", "numpy"} <= result["versions"].keys()
    assert isinstance(result["device"], str) and "git" in result
    other = evaluated(capsys, trained, EVAL, "--r", "0")["rows"][0]
    assert (other["r"], other["tokens"]) == ("0", [19, 19, 19])


def test_several_schedules_in_one_pass_with_agreement_and_speed(capsys: Capture, trained: Path) -> None:
    forms = ["0", "0.35", "4,0,2", "(2,-1)", "100", "[2,2]"]
    flags = ["--agreement", "--throughput", "--batch_size", 4, "--r_evals", *forms]
    rows = evaluated(capsys, trained, EVAL, *flags)["rows"]
    assert [row["schedule"] for row in rows] == [[0, 0, 0], [5, 3, 2], [4, 0, 2], [4, 2, 0], [8, 4, 2], [2, 2, 0]]
    assert [row["tokens"][-1] for row in rows] == [19, 9, 13, 13, 5, 15]
    keys = ["r", "schedule", "tokens", "gmacs", "params", "acc1", "acc5", "loss", "agree", "kl", "images_per_s"]
    for row in rows:
        assert set(keys) | {"native_images_per_s", "speedup"} <= row.keys()
        speed, native = row["images_per_s"], row["native_images_per_s"]
        assert speed["q25"] <= speed["median"] <= speed["q75"]
        assert row["speedup"] == pytest.approx(speed["median"] / native["median"])
    assert (rows[0]["agree"], rows[0]["kl"]) == (100, pytest.approx(0, abs=1e-9))
    assert rows[4]["kl"] > 0 and rows[0]["gmacs"] >= rows[4]["gmacs"]
    alone = evaluated(capsys, trained, EVAL, "--r", "4,0,2")["rows"][0]
    assert (alone["acc1"], alone["loss"]) == (rows[2]["acc1"], pytest.approx(rows[2]["loss"], rel=1e-6))


@pytest.mark.parametrize("form", ["x", "-1", "1,1,1,1", "nan"])
def test_a_bad_schedule_among_several_is_told_before_the_pass(capsys: Capture, trained: Path, form: str) -> None:
    flags = ["--eval", "--resume", str(trained / "checkpoint.pth"), "--r_evals", "0", form]
    ended = run(capsys, [*EVAL, *flags])
    assert ended.status == 2 and ended.err.count("\n") == 1 and "eval [" not in ended.out


def test_limit_thins_both_splits(capsys: Capture) -> None:
    out = succeeds(capsys, digits("--eval", limit=7))
    assert "7 val images" in out
    out = succeeds(capsys, digits("--no_model_ema", limit=36))
    assert "36 train, 36 val images" in out


def test_unreadable_images_count_as_wrong_and_end_the_run_past_the_limit(capsys: Capture, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "data", {"a": 4, "b": 4}, {"a": 2, "b": 2})
    (tree / "val" / "a" / "0.png").write_bytes(b"torn")
    argv = folder_run(tree, "--output_dir", tmp_path / "run")
    out = succeeds(capsys, argv)
    assert out.count("unreadable image: ") == 1 and str(tree / "val" / "a" / "0.png") in out
    result = evaluated(capsys, tmp_path / "run", folder_run(tree, "--eval"), "--agreement")
    assert result["n_images"] == 4 and result["rows"][0]["acc1"] <= 75 and result["rows"][0]["agree"] == 100
    line = refusal(capsys, [*argv, "--overwrite", "--max_bad_images", "0"], status=1)
    assert "0.png" in line and "--max_bad_images 0" in line


def test_a_stop_by_non_finite_losses_names_the_step_and_the_last_good_checkpoint(
    capsys: Capture, tmp_path: Path
) -> None:
    flags = ("--output_dir", tmp_path, "--lr", 1e30, "--no_model_ema", "--max_nonfinite", 1, "--opt", "sgd")
    flags += ("--clip_grad", 1e30, "--weight_decay", 0)
    first = digits("--output_dir", tmp_path, "--no_model_ema", "--opt", "sgd", "--weight_decay", 0)
    succeeds(capsys, first)
    good = tmp_path / "good.pth"
    (tmp_path / "checkpoint.pth").rename(good)
    line = refusal(capsys, digits(*flags, "--overwrite", "--finetune", good, "--epochs", 3), status=1)
    assert "epoch 0" in line and "micro-batch" in line and "--max_nonfinite 1" in line
    assert "last good checkpoint: none" in line


@pytest.mark.skipif(not (SHARED / "imagenet_mini").is_dir(), reason="no ../shared/data/imagenet_mini")
def test_published_weights_on_real_images(capsys: Capture, tmp_path: Path) -> None:
    argv = ["--eval", "--model", "deit_tiny", "--finetune", str(SHARED / "deit_tiny_imagenet.safetensors")]
    argv += ["--data_path", str(SHARED / "imagenet_mini"), "--limit", "210", "--batch_size", "35", "--agreement"]
    succeeds(capsys, [*argv, "--num_workers", "0", "--r_evals", "0", "8", "16", "--output_dir", str(tmp_path)])
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    image = 100 / 210
    for row, acc1, agree, kl in zip(rows, (79.05, 78.57, 77.62), (100, 96.67, 91.90), (0, 0.0255, 0.1342), strict=True):
        assert row["acc1"] == pytest.approx(acc1, abs=3 * image)
        assert row["agree"] == pytest.approx(agree, abs=3 * image)
        assert row["kl"] == pytest.approx(kl, rel=0.02, abs=1e-6)


def test_user_errors_are_value_errors() -> None:
    """So that a caller in Python need not know our class."""
    with pytest.raises(ValueError):
        parse("--epochs", "x")
    assert issubclass(UserError, ValueError)
