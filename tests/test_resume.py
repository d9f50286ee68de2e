"""A run that is stopped, or killed, and resumed is bit for bit the run that was never interrupted."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import digits, make_tree, refusal, run, same_run, toy_model

import main
import trainer
from engine import Learner
from run.kill_test import checkpoint, differences, log_lines

ROOT = Path(main.__file__).parent
Capture = pytest.CaptureFixture[str]
# everything that draws: order, crops, RandAugment, erasing, Mixup, CutMix, drop-path, dropout, r'
RANDOM = ["--repeated_aug", "--aa", "rand-m9-mstd0.5-inc1", "--color_jitter", "0.3", "--reprob", "0.5"]
RANDOM += ["--mixup", "0.8", "--cutmix", "1", "--drop_path", "0.2", "--drop", "0.1", "--accumulation_steps", "2"]
RANDOM += ["--r", "3", "--full_weight", "1", "--full_r_max", "4", "--consistency_weight", "3", "--num_registers", "2"]
LAUNCH = """
import sys
sys.path[:0] = sys.argv[1:3]
from runs import toy_model
import main
with toy_model():
    sys.exit(main.main(sys.argv[3:]))
"""


@pytest.fixture(scope="module", autouse=True)
def toy() -> Any:
    with toy_model():
        yield


class Killed(BaseException):
    """Stands for SIGKILL: nothing of main.py gets a chance to save."""


class Watch:
    """Counts the updates of all runs of a test, notes their learning rates, and interrupts after some of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.updates, self.interrupt_at, self.how = 0, 0, "SIGTERM"
        self.rates: dict[float, set[float]] = {}
        train, set_lr = trainer.train_one_epoch, Learner.set_lr

        def watched(*args: Any, after_step: Any, **options: Any) -> bool:
            def noted(learner: Learner, epoch: float) -> float:
                rate = set_lr(learner, epoch)
                self.rates.setdefault(epoch, set()).add(rate)
                return rate

            def counted(done: int) -> None:
                after_step(done)
                self.updates += 1
                if self.updates == self.interrupt_at:
                    self.interrupt()

            monkeypatch.setattr(Learner, "set_lr", noted)
            return train(*args, after_step=counted, **options)

        monkeypatch.setattr(trainer, "train_one_epoch", watched)

    def interrupt(self) -> None:
        if self.how == "kill":
            raise Killed
        os.kill(os.getpid(), signal.Signals[self.how])

    def run(self, argv: list[str], at: int = 0, how: str = "SIGTERM") -> int | None:
        """Run main.py, interrupted when `at` updates were done in this call; None: killed."""
        self.updates, self.interrupt_at, self.how = 0, at, how
        with contextlib.suppress(Killed):
            return main.main(argv)
        return None


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree"), {"a": 9, "b": 11}, {"a": 3, "b": 3})


def random_run(tree: Path, folder: Path, *flags: object) -> list[str]:
    """Two epochs of 2 updates, which take 2 micro-batches each."""
    words = ["--dataset", "FOLDER", "--data_path", tree, "--model", "deit_digits", "--input_size", 32, "--epochs", 2]
    words += ["--batch_size", 4, "--num_workers", 0, "--warmup_epochs", 1, "--model_ema_decay", 0.9, "--lr", 0.1]
    return [str(word) for word in [*words, *RANDOM, "--output_dir", folder, *flags]]


@pytest.fixture(scope="module")
def unbroken(toy: None, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert main.main(random_run(tree, folder)) == 0
    return folder


def same_best(first: Path, second: Path) -> bool:
    return not differences(*(checkpoint(folder / "best.pth") for folder in (first, second)))


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_stopped_and_resumed(watch: Watch, unbroken: Path, tree: Path, tmp_path: Path, how: str, at: int) -> None:
    """A signal after update 1: in mid-epoch; after 2, the last of the epoch: in the evaluation; after 3: at the end."""
    argv = random_run(tree, tmp_path, "--resume", "auto")
    status = 130 if how == "SIGINT" else 75
    assert watch.run(argv, at, how) == status
    assert (tmp_path / "stopped.json").is_file()
    assert watch.run(argv) == 0
    assert not (tmp_path / "stopped.json").exists()
    same_run(tmp_path, unbroken)
    assert same_best(tmp_path, unbroken)


def test_the_position_in_the_epoch_is_the_one_in_the_checkpoint(watch: Watch, tree: Path, tmp_path: Path) -> None:
    argv = random_run(tree, tmp_path, "--resume", "auto", "--accumulation_steps", "1")
    places = []
    for at in (1, 2, 2, 2):
        assert watch.run(argv, at) == 75
        state = checkpoint(tmp_path)
        places.append((state["epoch"], state["step"]))
        marker = (tmp_path / "stopped.json").read_text()
        assert f'"epoch": {state["epoch"]}' in marker and f'"step": {state["step"]}' in marker
    # the update that follows a signal is the one that sees it; after the last one of an epoch the evaluation sees it
    assert places == [(0, 2), (0, 5), (1, 3), (1, 5)] and len(log_lines(tmp_path)) == 1


@pytest.mark.parametrize("workers", [(1, 0), (0, 2)])
def test_workers_do_not_matter(
    watch: Watch, unbroken: Path, tree: Path, tmp_path: Path, workers: tuple[int, int]
) -> None:
    argv = random_run(tree, tmp_path, "--resume", "auto")
    assert watch.run([*argv, "--num_workers", str(workers[0])], 1) == 75
    assert watch.run([*argv, "--num_workers", str(workers[1])]) == 0
    same_run(tmp_path, unbroken)


@pytest.mark.parametrize("save_every_steps", [0, 1])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_killed_and_resumed(
    watch: Watch, unbroken: Path, tree: Path, tmp_path: Path, at: int, save_every_steps: int
) -> None:
    argv = random_run(tree, tmp_path, "--resume", "auto", "--save_every_steps", save_every_steps)
    assert watch.run(argv, at, "kill") is None
    assert watch.run(argv) == 0
    done_before = {0: (at - 1) // 2 * 2, 1: (0, 1, 1, 3, 3)[at]}[save_every_steps]
    assert watch.updates == 4 - done_before
    same_run(tmp_path, unbroken)
    assert all(len(rates) == 1 for rates in watch.rates.values()), "an update has the same learning rate both times"


@pytest.mark.parametrize(
    "flags",
    [
        ["--sched", "cosine", "--warmup_epochs", "2", "--cooldown_epochs", "1"],
        ["--sched", "step", "--decay_epochs", "1"],
        ["--sched", "plateau", "--patience_epochs", "1", "--lr", "0"],
        ["--opt", "sgd", "--clip_grad", "0.1"],
        ["--opt", "lamb", "--no_model_ema"],
        ["--opt", "lookahead_adamw"],
        ["--amp", "bf16", "--sam_rho", "0.1"],
        ["--amp", "fp16"],
        ["--r", "4", "--r_warmup_epochs", "3"],
        ["--train_only", "head", "--save_every", "2"],
        ["--train_only", "registers,norms,head", "--num_registers", "1", "--layer_decay", "0.7"],
    ],
    ids=" ".join,
)
@pytest.mark.filterwarnings("ignore:PlateauLRScheduler:FutureWarning")
def test_every_state_is_saved(watch: Watch, tmp_path: Path, flags: list[str]) -> None:
    def argv(folder: str) -> list[str]:
        return digits(*flags, "--epochs", 4, "--output_dir", tmp_path / folder, "--resume", "auto", limit=20)

    assert watch.run(argv("whole")) == 0
    wanted, watch.rates = watch.rates, {}
    for at in (1, 2, 1):  # of 8 updates
        assert watch.run(argv("broken"), at) == 75
    assert watch.run(argv("broken")) == 0
    assert watch.rates == wanted and all(len(rates) == 1 for rates in wanted.values())
    same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_torn_checkpoint_falls_back_to_the_one_before(
    capsys: Capture, watch: Watch, unbroken: Path, tree: Path, tmp_path: Path
) -> None:
    argv = random_run(tree, tmp_path, "--resume", "auto", "--save_every_steps", 1)
    assert watch.run(argv, 3, "kill") is None
    os.truncate(tmp_path / "checkpoint.pth", 2000)
    capsys.readouterr()
    assert watch.run(argv) == 0
    out = capsys.readouterr().out
    assert "torn or damaged" in out and f"resuming from {tmp_path / 'checkpoint_prev.pth'}" in out
    same_run(tmp_path, unbroken)
    for name in ("checkpoint.pth", "checkpoint_prev.pth"):
        os.truncate(tmp_path / name, 2000)
    line = refusal(capsys, argv)
    assert "no checkpoint to resume" in line and "another --output_dir" in line


def test_what_the_order_depends_on_must_stay_within_an_epoch(
    capsys: Capture, watch: Watch, tree: Path, tmp_path: Path
) -> None:
    argv = random_run(tree, tmp_path, "--resume", "auto")
    assert watch.run(argv, 1, "kill") is None  # a fresh start: nothing was saved
    assert watch.run([*argv, "--save_every_steps", "1", "--accumulation_steps", "1"], 2) == 75
    argv += ["--accumulation_steps", "1"]
    once = [word for word in argv if word != "--repeated_aug"]
    for changed in ([*argv, "--seed", "1"], [*argv, "--limit", "8"], [*once, "--no_repeated_aug"]):
        line = refusal(capsys, changed)
        assert "inside an epoch" in line and "->" in line and "--resume_anyway" in line
    ended = run(capsys, [*argv, "--seed", "1", "--resume_anyway"])
    assert ended.status == 0 and "seed 0 -> 1: the epoch ends here, after 12 images" in ended.out
    assert [line["epoch"] for line in log_lines(tmp_path)] == [0, 1]


def plain_run(folder: Path, *flags: object) -> list[str]:
    """Two epochs of 48 images, in which no process draws anything for itself."""
    words = [
        "--reprob",
        0,
        "--mixup",
        0,
        "--cutmix",
        0,
        "--drop_path",
        0,
        "--aa",
        "none",
        "--no_repeated_aug",
        "--lr",
        1,
    ]
    words += [
        "--lr",
        1,
        "--opt",
        "momentum",
        "--momentum",
        0,
        "--num_workers",
        0,
        "--epochs",
        2,
        "--output_dir",
        folder,
        *flags,
    ]
    return digits(*words, limit=48)


@pytest.mark.parametrize(
    "split", [("--batch_size", 4, "--accumulation_steps", 3), ("--batch_size", 6, "--accumulation_steps", 2)]
)
def test_another_split_of_the_same_global_batch_goes_on_inside_the_epoch(
    capsys: Capture, watch: Watch, tmp_path: Path, split: tuple[object, ...]
) -> None:
    whole, broken = (plain_run(tmp_path / name, "--batch_size", 12) for name in ("whole", "broken"))
    assert watch.run(whole) == 0 and watch.run(broken, 1) == 75
    assert checkpoint(tmp_path / "broken")["step"] == 2
    capsys.readouterr()
    assert watch.run([*broken, "--resume", "auto", *map(str, split)]) == 0
    assert "the same images in the same order, 12 in an update" in capsys.readouterr().out
    assert watch.updates == 6
    losses = [[line["train_loss"] for line in log_lines(tmp_path / name)] for name in ("whole", "broken")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize("sched", ["cosine", "tanh", "step", "multistep", "poly"])
def test_the_learning_rate_follows_the_global_batch(capsys: Capture, watch: Watch, tmp_path: Path, sched: str) -> None:
    flags = ["--epochs", 4, "--warmup_epochs", 3, "--sched", sched, "--decay_epochs", 3, "--min_lr", 0.01]
    assert watch.run(plain_run(tmp_path / "small", "--batch_size", 8, *flags)) == 0
    wanted, watch.rates = watch.rates, {}
    broken = plain_run(tmp_path / "broken", "--resume", "auto", *flags)
    assert watch.run([*broken, "--batch_size", "16"], 4) == 75
    watch.rates, _ = {}, capsys.readouterr()
    assert watch.run([*broken, "--batch_size", "8"]) == 0
    assert "global batch: 0.03125 -> 0.015625" in capsys.readouterr().out
    assert watch.rates and all(rates == wanted[epoch] for epoch, rates in watch.rates.items())


def test_another_global_batch_goes_on_at_the_next_epoch_or_at_the_same_image(
    capsys: Capture, watch: Watch, tmp_path: Path
) -> None:
    for flags, note, updates in (
        ([], "24 images of the epoch were done; it ends here", 3),
        (["--resume_anyway"], "goes on after image 16, update 1 of 3: 8 images are seen again", 5),
    ):
        argv = plain_run(tmp_path / str(updates), "--resume", "auto")
        assert watch.run([*argv, "--batch_size", "12"], 1) == 75
        assert run(capsys, [*argv, "--batch_size", "16", *flags, "--epochs", "1"]).out.count(note) == 1
        assert watch.run([*argv, "--batch_size", "16", *flags]) == 0
        assert [line["epoch"] for line in log_lines(tmp_path / str(updates))] == [0, 1]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("epoch", "abc", "its epoch is 'abc'"),
        ("epoch", 99, "is at epoch 99, past the 2 of this run"),
        ("step", 3000, "its step is 3000 of 4 micro-batches"),
        ("step", -1, "its step is -1"),
        ("rng", {}, "its rng is none"),
        ("sampler", {}, "its sampler is {}"),
        ("epoch_log", {"a": 1}, "its epoch_log has ['a']"),
        ("optimizer", {}, "does not fit these optimizer options"),
    ],
)
def test_an_altered_checkpoint_is_refused_in_one_line(
    capsys: Capture, unbroken: Path, tree: Path, tmp_path: Path, key: str, value: Any, words: str
) -> None:
    state = torch.load(unbroken / "checkpoint.pth", weights_only=True)
    torch.save(state | {"epoch": 1, key: value}, tmp_path / "altered.pth")
    assert words in refusal(capsys, random_run(tree, tmp_path / "run", "--resume", tmp_path / "altered.pth"))


def test_the_comparison_can_fail(unbroken: Path, tree: Path, tmp_path: Path) -> None:
    assert main.main(random_run(tree, tmp_path, "--hflip", 0.9)) == 0
    found = differences(checkpoint(tmp_path), checkpoint(unbroken))
    assert {place.split("/")[1] for place in found} >= {"model", "model_ema", "optimizer"}
    assert log_lines(tmp_path) != log_lines(unbroken)


def test_a_finished_run_has_nothing_left_to_do(capsys: Capture, unbroken: Path, tree: Path) -> None:
    before = (unbroken / "log.txt").read_bytes()
    ended = run(capsys, random_run(tree, unbroken, "--resume", "auto"))
    assert ended.status == 0 and "done: 2 epochs" in ended.out
    assert (unbroken / "log.txt").read_bytes() == before


def test_flags_that_a_resumed_run_does_not_follow_are_named(
    capsys: Capture, unbroken: Path, tree: Path, tmp_path: Path
) -> None:
    argv = random_run(tree, tmp_path, "--resume", unbroken / "checkpoint.pth", "--lr", 5, "--epochs", 3)
    ended = run(capsys, argv)
    assert ended.status == 0 and "warning: the checkpoint's optimizer and schedule go on" in ended.out
    assert "--lr, --epochs says now" in ended.out
    assert log_lines(tmp_path)[-1]["lr"] <= 1e-4


def test_a_resumed_run_may_change_its_precision(capsys: Capture, unbroken: Path, tree: Path, tmp_path: Path) -> None:
    argv = random_run(tree, tmp_path, "--resume", unbroken / "checkpoint.pth", "--epochs", 3, "--amp", "fp16")
    assert run(capsys, argv).status == 0


@contextlib.contextmanager
def started(argv: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A real process of main.py."""
    command = [sys.executable, "-c", LAUNCH, str(ROOT / "tests"), str(ROOT), *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=folder, env=environment, text=True, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_save(file: Path, process: subprocess.Popen[str]) -> None:
    """Until the process has written the file anew."""

    def written() -> int:
        return file.stat().st_mtime_ns if file.exists() else 0

    before = written()
    while written() == before and process.poll() is None:
        time.sleep(0.02)


def test_real_processes_stopped_and_killed(tmp_path: Path) -> None:
    def argv(folder: str) -> list[str]:
        flags = ["--save_every_steps", 1, "--resume", "auto", "--output_dir", tmp_path / folder]
        return digits(*flags, "--epochs", 8, limit=20)

    for number, status in ((signal.SIGTERM, 75), (signal.SIGKILL, -9)):
        with started(argv("broken"), tmp_path) as process:
            wait_for_save(tmp_path / "broken" / "checkpoint_prev.pth", process)
            process.send_signal(number)
            _, errors = process.communicate(timeout=600)
            assert process.returncode == status and errors == ""
    assert 0 < checkpoint(tmp_path / "broken")["epoch"] + checkpoint(tmp_path / "broken")["step"] < 8
    torch.manual_seed(1)  # the state of this process does not matter
    assert main.main(argv("broken")) == 0
    assert main.main(argv("whole")) == 0
    same_run(tmp_path / "broken", tmp_path / "whole")
