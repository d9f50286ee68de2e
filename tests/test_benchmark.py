"""The yardsticks are what they say, ratios belong to one run, and the program prints and saves them."""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from tiny import block_inputs, every_method, images, ours, randomise
from torch.utils._python_dispatch import TorchDispatchMode

from analysis.ideal import ideal_model
from models import MergeConfig, UserError, create_model
from models.methods import METHODS
from run.benchmark import CONFIGURATIONS, TimedCall, interleave, main, match_accuracies, peak_memory, ratio

CPU = torch.device("cpu")
TINY = ["--models", "deit_digits", "--r", "8", "--batch_sizes", "2", "--device", "cpu", "--rounds", "3"]


@pytest.mark.parametrize("merge", [pytest.param(MergeConfig("none"), id="none"), *every_method()])
def test_ideal_has_the_same_tokens_per_block_and_shares_the_weights(merge: MergeConfig) -> None:
    model = ours(merge, num_registers=2, register_layer=1)
    ideal = ideal_model(model)
    x = images(2)
    assert [x.shape for x in block_inputs(ideal, x)] == [x.shape for x in block_inputs(model, x)]
    assert ideal(x).shape == model(x).shape
    theirs = dict(model.named_parameters())
    assert all(parameter is theirs[name] for name, parameter in ideal.named_parameters())
    assert type(model).__name__ == "MergingViT"


def test_ideal_without_merging_is_the_model_itself() -> None:
    model = ours(MergeConfig(method="none"), num_registers=2)
    torch.testing.assert_close(ideal_model(model)(images(2)), model(images(2)))


def test_ideal_drops_the_last_tokens_where_tome_merges() -> None:
    """Against timm's own block, written out."""
    model = ours(MergeConfig(r=(5,)), depth=1)
    block, seen = model.blocks[0], block_inputs(model, images(2))[0]
    with torch.no_grad():
        x = (seen + block.attn(block.norm1(seen)))[:, :-5]
        expected = model.head(model.norm(x + block.mlp(block.norm2(x)))[:, 0])
        torch.testing.assert_close(ideal_model(model)(images(2)), expected, rtol=1e-4, atol=1e-5)


def test_ideal_attends_to_the_kept_part_of_the_whole_map_where_mctf_merges() -> None:
    model = ours(MergeConfig(method="mctf", r=(5,), activate_layers=(0,), min_tokens=4), depth=1)
    block, seen = model.blocks[0], block_inputs(model, images(2))[0]
    attn, left = block.attn, seen.shape[1] - 5
    with torch.no_grad():
        q, k, v = attn.qkv(block.norm1(seen)).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * attn.scale).softmax(-1)[:, :, :left, :left]
        x = seen[:, :left] + attn.proj((attention @ v[:, :, :left]).transpose(1, 2).flatten(2))
        expected = model.head(model.norm(x + block.mlp(block.norm2(x)))[:, 0])
        torch.testing.assert_close(ideal_model(model)(images(2)), expected, rtol=1e-4, atol=1e-5)


def test_ideal_trains_and_takes_other_schedules() -> None:
    ideal = ideal_model(ours(MergeConfig(r=3))).train()
    ideal(images(2), r=2).sum().backward()
    assert all(p.grad is not None for p in ideal.parameters())


# Timing


def test_rounds_are_interleaved_and_ratios_are_taken_within_them() -> None:
    turns: list[str] = []
    steps = {name: TimedCall(lambda name=name: turns.append(name), 1) for name in "abc"}
    times = interleave(steps, 7, CPU)
    assert {len(taken) for taken in times.values()} == {7}
    rounds = [sorted(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert rounds == [["a", "b", "c"]] * 9  # two to warm up
    assert len({tuple(turns[i : i + 3]) for i in range(6, len(turns), 3)}) > 1, "the order never changes"

    slow = {"a": np.array([1.0, 10.0, 1.0]), "b": np.array([0.5, 5.0, 0.5])}  # a slow round changes no ratio
    assert ratio(slow, "b", "a") == {"median": 2.0, "q25": 2.0, "q75": 2.0}


def test_what_was_not_measured_in_the_run_has_no_ratio() -> None:
    times = {"a": np.ones(3)}
    assert ratio(times, "a", "native") is None
    assert ratio(times, "a", None) is None
    assert ratio(times, "other", "a") is None


def test_times_are_those_of_the_steps() -> None:
    times = interleave({"short": TimedCall(lambda: None, 1), "long": TimedCall(lambda: time.sleep(0.01), 1)}, 3, CPU)
    assert (times["long"] >= 0.01).all() and np.median(times["short"]) < 0.01


def test_peak_memory_is_the_most_at_one_time() -> None:
    def step() -> None:
        a = torch.zeros(2**20)  # 4 MiB
        b = a + 1
        del a
        c = torch.cat((b, b))  # 4 + 8 MiB
        del b, c

    assert 12 * 2**20 <= peak_memory(TimedCall(step, 1), CPU) < 12.1 * 2**20


@pytest.mark.parametrize("registers", [0, 4])
def test_memory_of_a_training_step_falls_with_the_tokens(registers: int) -> None:
    """What the forward keeps for the backward is in proportion to the tokens; attention's map would make it more."""

    def kept(r: int) -> tuple[int, int]:
        model = randomise(create_model("deit_digits", num_registers=registers, merge=MergeConfig(r=r))).train()
        gradients = sum(p.numel() * p.element_size() for p in model.parameters())

        def run() -> None:
            model(images(32)).sum().backward()
            model.zero_grad()

        return peak_memory(TimedCall(run, 32), CPU) - gradients, sum(model.plan().counts)

    (dense, all_tokens), (merged, tokens) = kept(0), kept(9)
    assert merged / dense < tokens / all_tokens + 0.1, (merged / dense, tokens / all_tokens)


class Shapes(TorchDispatchMode):
    """Remembers the shapes of all tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.seen.add(tuple(value.shape))
        return out


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("merge", "maps"),
    [
        ({"r": 3}, False),
        ({"method": "lgtm", "r": 2, "dense_layers": 0}, False),
        ({"method": "mctf", "r": 3, "min_tokens": 4}, True),
    ],
)
def test_only_mctf_makes_a_map_of_all_tokens(merge: dict[str, Any], maps: bool, training: bool) -> None:
    model = ours(MergeConfig(**merge), num_registers=2).train(training)
    with Shapes() as shapes:
        model(images(2)).sum().backward()
    counts = {19} | set(model.plan().counts)  # 16 patches, 1 class token, 2 registers at first
    assert maps == any(len(shape) > 2 and shape[-1] == shape[-2] and shape[-1] in counts for shape in shapes.seen)


# The program


def test_all_phases_are_measured_saved_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--phases", "inference", "train", "end_to_end", "--dataset", "DIGITS", "--limit", "8", "--num_workers", "0"]
    methods = ["--methods", "tome", "mctf", "--num_registers", "0", "2"]
    assert main([*TINY, *methods, *data, "--output_dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "of ideal" in shown and "x native" in shown
    saved = json.loads((tmp_path / "benchmark.json").read_text())
    assert {"device", "versions", "git", "options", "rows"} <= saved.keys()
    rows = saved["rows"]
    assert {row["phase"] for row in rows} == {"inference", "train", "end_to_end"}
    assert len(rows) == 3 * 9  # native, and two methods with two register counts, each with its ideal
    for row in rows:
        assert row["images_per_s"]["q25"] <= row["images_per_s"]["median"] <= row["images_per_s"]["q75"]
        assert row["ratio_native"] is not None
        assert (row["ratio_ideal"] is not None) == (row["name"] != "native" and not row["name"].startswith("ideal"))
        assert (row["peak_memory"] is None) == (row["phase"] == "end_to_end")
    tome = next(row for row in rows if row["name"] == "tome r=8 +2")
    assert tome["tokens"] == [59, 51, 43, 35, 27, 19] and tome["gmacs"] > 0
    assert (tmp_path / "benchmark.txt").is_file() and (tmp_path / "speed.png").stat().st_size > 1000


def test_every_method_takes_part_by_its_name(tmp_path: Path) -> None:
    argv = ["--methods", *METHODS, "mctf_off", "mctf_max", "--num_registers", "2", "--output_dir", str(tmp_path)]
    assert main([*TINY, *argv]) == 0
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    merges = {row["method"]: row["merge"] for row in rows if "merge" in row and not row["name"].startswith("ideal")}
    assert {name: merge["method"] for name, merge in merges.items() if name in METHODS} == {
        name: name for name in METHODS
    }
    assert merges["mctf_off"]["one_step_ahead"] == "off" and merges["mctf_max"]["pooling"] == "max"
    assert CONFIGURATIONS["mctf_fast"] == {"method": "mctf", "r": 0.35, "activate_layers": (3, 6, 9)}


def test_dtypes_are_settings_of_their_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = [*TINY, "--methods", "tome", "--dtypes", "fp32", "bf16", "--no_native", "--output_dir", str(tmp_path)]
    assert main(argv) == 0
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert [row["dtype"] for row in rows] == ["fp32", "fp32", "bf16", "bf16"]
    assert all(row["ratio_native"] is None for row in rows)
    assert "x native" not in capsys.readouterr().out


def test_modes_take_turns_and_compiled_is_compared_with_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def compiler(module: Any, **options: Any) -> Any:
        asked.append(options)
        return module

    monkeypatch.setattr("run.benchmark.compile_model", compiler)
    argv = [*TINY, "--methods", "tome", "--modes", "eager", "compiled", "--profile", "--output_dir", str(tmp_path)]
    assert main(argv) == 0
    assert asked == [{"dynamic": False, "fullgraph": True}] * 3
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == ["eager"] * 3 + ["compiled"] * 3
    tome = [row for row in rows if row["name"].startswith("tome")]
    assert tome[0]["ratio_eager_ideal"] is None and tome[1]["ratio_eager_ideal"] is not None
    assert all((row["ratio_eager_native"] is None) == (row["mode"] == "eager") for row in rows)
    # what merging does and slicing does not
    assert "aten::sort" in tome[0]["operators"] and "aten::sort" not in rows[2]["operators"]
    text = (tmp_path / "benchmark.txt").read_text()
    assert "of eager ideal" in text and text.count("all operators") == 2


def test_runtimes_take_turns_with_eager_models(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    argv = [*TINY, "--methods", "tome", "--modes", "eager", "onnxruntime", "onnxruntime_int8"]
    with runs.toy_model():
        assert main([*argv, "--output_dir", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    by_key = {(row["mode"], row["method"]): row for row in rows}
    runtimes = ("onnxruntime", "onnxruntime_int8")
    merging = {("eager", "ideal tome"), *itertools.product(("eager", *runtimes), ("native", "tome"))}
    assert set(by_key) == merging  # nobody exports slices
    for mode in runtimes:
        row = by_key[mode, "tome"]
        assert row["ratio_native"]["median"] > 0 and row["ratio_eager_native"]["median"] > 0
        assert row["ratio_ideal"] is None and row["peak_memory"] is None


def test_eager_alone_is_compared_with_nothing_that_did_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("run.benchmark.compile_model", lambda module, **options: module)
    assert main([*TINY, "--methods", "tome", "--modes", "compiled", "--output_dir", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert all(row["ratio_eager_native"] is None and row["ratio_native"] is not None for row in rows)


TOME = MergeConfig(r=8).as_dict()


def result_file(folder: Path, r: str, tokens: list[int], acc1: float, merge: dict[str, Any]) -> Path:
    folder.mkdir()
    row = {"r": r, "tokens": tokens, "gmacs": 0.03, "acc1": acc1}
    (folder / "result.json").write_text(json.dumps({"model": "deit_digits", "merge": merge, "rows": [row]}))
    return folder


def test_accuracies_are_joined_by_model_tokens_and_method(tmp_path: Path) -> None:
    tokens = [57, 49, 41, 33, 25, 17]
    place = result_file(tmp_path / "eval", "8", tokens, 91.5, json.loads(json.dumps(TOME | {"r": 4})))
    setting = {"model": "deit_digits", "phase": "inference", "dtype": "fp32", "mode": "eager", "batch_size": 2}
    row = setting | {"device": "cpu", "name": "tome r=8 +0", "method": "tome", "r": "8", "tokens": tokens}
    row |= {"ratio_native": {"median": 1.5}, "merge": TOME}
    ((series, speed, accuracy, note),) = match_accuracies([row], [str(place)])
    assert (note, speed, accuracy) == ("r=8", 1.5, 91.5) and series.startswith("eval, tome")
    other = MergeConfig(r=8, prop_attn=False).as_dict()  # the same tokens, other accuracies
    with pytest.raises(UserError, match="timed in this run"):
        match_accuracies([row | {"merge": other}], [str(place)])
    dense = [65] * 6
    place = result_file(tmp_path / "dense", "0", dense, 93, MergeConfig(method="none").as_dict())
    assert match_accuracies([row | {"tokens": dense}], [str(place)])[0].acc1 == 93
    with pytest.raises(UserError, match="timed in this run"):
        match_accuracies([row | {"ratio_native": None}], [str(place)])
    with pytest.raises(UserError, match="timed in this run"):
        match_accuracies([row | {"tokens": [57]}], [str(place)])


def test_accuracies_of_something_else_are_refused_before_anything_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = result_file(tmp_path / "eval", "8", [57, 49, 41], 91.5, TOME)
    assert main([*TINY, "--methods", "tome", "--results", str(place), "--output_dir", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert "no row of --results" in captured.err and captured.out == ""


def test_pareto_plot(tmp_path: Path) -> None:
    place = result_file(tmp_path / "eval", "8", [57, 49, 41, 33, 25, 17], 91.5, TOME)
    argv = [*TINY, "--methods", "tome", "--num_registers", "0", "--no_ideal", "--results", str(place)]
    assert main([*argv, "--output_dir", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "pareto.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--methods", "tomes"], "tome"),
        (["--models", "deit_digit"], "deit_digits"),
        (["--modes", "onnxruntime", "--dtypes", "bf16"], "run forwards in fp32"),
        (["--modes", "openvino", "--phases", "train"], "run forwards in fp32"),
        (["--rounds", "2"], "--rounds"),
        (["--batch_sizes", "0"], "--batch_sizes"),
        (["--r", "-3"], "r must be"),
        (["--methods", "mctf_fast"], "block 9"),
        (["--results", "nowhere"], "--output_dir"),
        (["--results", "nowhere", "--output_dir", "x", "--no_native"], "--no_native"),
        (["--dataset", "DIGITS"], "end_to_end"),
        (["--phases", "end_to_end"], "--dataset"),
        (["--phases", "training"], "inference"),
        (["--clock", "cpu", "--threads", "2"], "--threads 1"),
        (["--modes", "cudagraphs"], "GPU"),
        (["--device", "gpu"], "cuda"),
        (["--batches", "3"], "--batch_sizes"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], word: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*TINY, *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("benchmark.py: error: ") and len(captured.err.splitlines()) == 1
    assert word in captured.err and captured.out == ""
