"""Random command lines: whatever is typed, main.py runs it or says in one line why not."""

import contextlib
import io
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from runs import toy_model

import main
import options
import trainer
from models.schedule import parse_schedule

CHECKS = list(HealthCheck)
SOME = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=CHECKS, database=None)
BASE = ["--dataset", "DIGITS", "--limit", "12", "--batch_size", "4"]


@pytest.fixture(scope="module", autouse=True)
def nothing_trains() -> Iterator[None]:
    """Everything is built, up to the moment where training or the pass over the data begins."""
    with toy_model(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "fit", lambda self: 0)
        patch.setattr(main, "evaluate", lambda model, loader, schedules, *_, **__: [SCORES] * len(schedules))
        patch.setattr(torch, "compile", lambda model: model)
        yield


SCORES = Namespace(acc1=50.0, acc5=50.0, loss=1.0, n_images=12, agree=None, kl=None)


def play(argv: list[str]) -> tuple[int, str]:
    """Exit status and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main.main(argv)
    assert "Traceback" not in out.getvalue() + err.getvalue()
    return status, err.getvalue()


def is_one_line(text: str) -> bool:
    return text.startswith("main.py: error: ") and text.count("\n") == 1 and len(text) > 30


def number(low: float, high: float) -> st.SearchStrategy[str]:
    return st.floats(low, high, allow_nan=False).map(repr)


def whole(low: int, high: int) -> st.SearchStrategy[str]:
    return st.integers(low, high).map(str)


def one_of(*words: str) -> st.SearchStrategy[str]:
    return st.sampled_from(words)


r_list = st.lists(st.integers(1, 8), min_size=2, max_size=3).map(lambda r: ",".join(map(str, r)))
SCHEDULES = whole(0, 20) | number(0.3, 0.99) | r_list | r_list.map("[{}]".format) | one_of("(4,-1)", "(4,0.5)", "(0,1)")
# flags that go together in any combination, and values that each of them takes
VALID: dict[str, st.SearchStrategy[str]] = {
    "--r": SCHEDULES,
    "--num_registers": whole(1, 4),
    "--activate_layer": one_of("0", "1,2", "[0,2]", "2,0,1"),
    "--min_tokens": whole(0, 3),
    "--pooling": one_of("size", "max", "mean"),
    "--batch_size": whole(1, 8).map(lambda n: str(2 * int(n))),
    "--accumulation_steps": whole(1, 4),
    "--num_workers": whole(0, 2),
    "--input_size": one_of("16", "32", "40"),
    "--drop_path": number(0, 0.9),
    "--drop": number(0, 0.9),
    "--color_jitter": number(0, 1),
    "--aa": one_of("none", "rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "original"),
    "--train_interpolation": one_of("bicubic", "bilinear", "random"),
    "--hflip": number(0, 1),
    "--reprob": number(0, 1),
    "--remode": one_of("pixel", "const", "rand"),
    "--mixup": number(0, 2),
    "--cutmix": number(0, 2),
    "--mixup_mode": one_of("batch", "pair", "elem"),
    "--smoothing": number(0, 0.9),
    "--epochs": whole(1, 1000),
    "--opt": one_of("adamw", "sgd", "lamb", "momentum", "lion", "adafactor", "rmsprop", "nadamw", "lookahead_adam"),
    "--opt_eps": number(1e-12, 1e-2),
    "--momentum": number(0, 0.99),
    "--weight_decay": number(0, 1),
    "--clip_grad": number(1e-3, 10),
    "--sched": one_of("cosine", "tanh", "step", "multistep", "poly"),
    "--lr": number(0, 10),
    "--min_lr": number(0, 1),
    "--warmup_epochs": whole(0, 20),
    "--cooldown_epochs": whole(0, 20),
    "--decay_epochs": number(0.5, 100),
    "--decay_rate": number(0.01, 1),
    "--amp": one_of("bf16", "fp16", "none"),
    "--sam_rho": number(0, 5),
    "--model_ema_decay": number(0, 1),
    "--train_only": one_of("all", "norms", "norms,head"),
    "--layer_decay": number(0.1, 1),
    "--max_nonfinite": whole(0, 100),
    "--seed": whole(0, 2**63 - 1),
    "--save_every": whole(1, 100),
    "--log_every": whole(1, 100),
    "--eval_crop_ratio": number(0.2, 1),
}
SWITCHES = ["--model_ema", "--no_model_ema", "--grad_checkpointing", "--repeated_aug", "--no_repeated_aug", "--compile"]
SWITCHES += ["--unscale_lr", "--dist_eval", "--three_augment", "--no_pretrained", "--no_pin_mem"]


@st.composite
def valid_lines(draw: st.DrawFn) -> list[str]:
    flags = draw(st.lists(st.sampled_from(sorted(VALID)), max_size=8, unique=True))
    switches = draw(st.lists(st.sampled_from(SWITCHES), max_size=3, unique=True))
    switches = [switch for switch in switches if switch.replace("--", "--no_") not in switches]  # a contradiction
    idle = {"--aa", "--reprob", "--remode"} if "--three_augment" in switches else set()
    flags = [flag for flag in flags if flag not in idle and not (flag == "--opt" and "--momentum" in flags)]
    switches += ["--opt", "momentum"] if "--momentum" in flags else []
    if "--activate_layer" in flags or "--min_tokens" in flags or "--pooling" in flags:
        flags = sorted({*flags, "--r"})
    words = [word for flag in flags for word in (flag, draw(VALID[flag]))]
    words = [word.replace("_", "-") if word.startswith("--") and draw(st.booleans()) else word for word in words]
    return [*words, *switches]


@SOME
@given(valid_lines())
def test_valid_command_lines_build_a_run(flags: list[str]) -> None:
    assert play([*BASE, *flags]) == (0, "")


@SOME
@given(st.lists(SCHEDULES, min_size=1, max_size=4, unique_by=parse_schedule), st.booleans())
def test_every_schedule_evaluates(forms: list[str], agreement: bool) -> None:
    flags = ["--eval", "--r_evals", *forms, *(["--agreement"] if agreement else [])]
    assert play([*BASE, *flags]) == (0, "")


# values that no flag of this kind takes
NUMBERS = ["nan", "-1", "-inf", "inf", "1e999", "abc", "", " ", "1,2", "0x10", "--", "1 2", "é", "None"]
WRONG: dict[str, list[str]] = {}
for _flag in ("--lr", "--weight_decay", "--seed", "--mixup", "--num_registers", "--warmup_epochs", "--sam_rho"):
    WRONG[_flag] = NUMBERS
for _flag in ("--batch_size", "--epochs", "--accumulation_steps", "--limit", "--input_size", "--clip_grad"):
    WRONG[_flag] = ["0", *NUMBERS]
for _flag in ("--hflip", "--reprob", "--smoothing", "--drop_path", "--drop"):
    WRONG[_flag] = ["1.5", *NUMBERS]
for _flag in ("--merge", "--opt", "--sched", "--model", "--device", "--pooling", "--one_step_ahead", "--train_only"):
    WRONG[_flag] = ["x", "", "TOME", "1"]
for _flag in ("--finetune", "--resume", "--config"):
    WRONG[_flag] = ["absent", "/", "absent/x.pth", "\t"]
WRONG["--r"] = ["nan", "-1", "inf", "1e999", "abc", "", " ", "1.5", "4,x", "(4,5)", "(4,nan)", "[[1]]", "1,1,1,1", "--"]
WRONG |= {"--activate_layer": ["3", "-1", "a", "1,1", "0.5"], "--full_r_max": NUMBERS, "--amp": ["fp8"], "--aa": ["x"]}
NEEDS = {flag: ["--r", "2"] for flag in ("--activate_layer", "--pooling", "--one_step_ahead")}
NEEDS["--full_r_max"] = ["--r", "2", "--full_weight", "1"]


@pytest.mark.parametrize("flag", sorted(WRONG))
def test_wrong_values_are_refused_in_one_line(flag: str) -> None:
    for value in WRONG[flag]:
        status, err = play([*BASE, *NEEDS.get(flag, []), f"{flag}={value}"])
        assert status == 2 and is_one_line(err), (flag, value, status, err)


@SOME
@given(st.text("abdelmorst_-", min_size=1, max_size=12), st.sampled_from([[], ["3"], ["x", "--lr", "1"]]))
@example("", [])
@example("-", [])
def test_unknown_flags_are_refused_in_one_line(name: str, rest: list[str]) -> None:
    known = options.build_parser()._option_string_actions
    if "--" + name.replace("-", "_") in known:
        return
    status, err = play([*BASE, f"--{name}", *rest])
    assert (status == 2 and is_one_line(err)) or (f"--{name}" == "--" and not rest), (name, err)


PIECES = one_of(
    "0", "1", "-1", "3", "1.5", "0.3", "nan", "inf", "1e400", "9" * 25, "abc", "", "(1,2)", "(8,-1)", "8,0,4"
)
PIECES |= one_of("[", "0x10", "é", "True", "None", "none", "tome", "mctf", "lgtm", "on", "a\nb", "%s", "--", "[]", "()")
PIECES |= st.text(max_size=6)


@st.composite
def any_lines(draw: st.DrawFn) -> list[str]:
    """Any flags with anything behind them, but for --output_dir, which would make folders, and --help."""
    actions = [a for a in options.build_parser()._actions if a.dest not in ("output_dir", "help")]
    words: list[str] = []
    for action in draw(st.lists(st.sampled_from(actions), min_size=1, max_size=5)):
        flag = draw(st.sampled_from(action.option_strings))
        choices = PIECES if action.choices is None else PIECES | st.sampled_from(list(action.choices))
        words += [flag] if action.nargs == 0 else [f"{flag}={draw(choices)}"]
    return words


@settings(SOME, max_examples=250)
@given(any_lines())
def test_any_command_line_runs_or_is_refused_in_one_line(flags: list[str]) -> None:
    status, err = play([*BASE, *flags])
    assert (status, err) == (0, "") or (status == 2 and is_one_line(err)), (status, err)


WHOLE = [
    a.option_strings[0]
    for a in options.build_parser()._actions
    if isinstance(a.type, options.Number) and a.type.kind is int
]


@pytest.mark.parametrize("flag", WHOLE)
def test_absurdly_large_numbers(flag: str) -> None:
    for value in ("99999999", "9" * 25):
        status, err = play([*BASE, flag, value])
        assert (status, err) == (0, "") or (status == 2 and is_one_line(err)), (value, status, err)


@SOME
@given(st.dictionaries(st.sampled_from(sorted(VALID)), st.none() | st.booleans() | st.floats() | st.text(max_size=5)))
def test_any_config_runs_or_is_refused_in_one_line(tmp_path_factory: Any, content: dict[str, Any]) -> None:
    file = tmp_path_factory.mktemp("config") / "c.yaml"
    file.write_text(yaml.safe_dump({key.removeprefix("--"): value for key, value in content.items()}))
    status, err = play([*BASE, "--config", str(file)])
    assert (status, err) == (0, "") or (status == 2 and is_one_line(err)), (status, err)
