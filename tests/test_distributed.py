"""Several gloo processes train, count, stop and die as one.

Processes are forked from a server that has imported main.py once; one test goes through torchrun itself.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import digits, same_run, toy_model
from test_engine import PLAIN, gradients, make_batch, make_learner, train
from test_resume import LAUNCH
from tiny import ours
from torch import Tensor

import main
import options
import trainer
from datasets import Batch, DataConfig, build_data, build_eval_loader
from distributed import Distributed, close_distributed, init_distributed
from engine import EpochLog, Scores, UnreadableImages, evaluate
from models import MergeConfig
from run.kill_test import checkpoint, log_lines
from utils import StopSignal

ROOT = Path(main.__file__).parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["main", "runs", "test_engine"])
PATIENCE = 600  # a bound for a hang, not a speed: machines may be slow


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def on_rank(work: Callable[..., Any], rank: int, world: int, port: str, folder: str, *args: Any) -> None:
    """What a forked process does: join the others if there are any, work, exit with the result."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    out, err = (Path(folder) / f"{kind}{rank}.txt" for kind in ("out", "err"))
    with toy_model(), out.open("a", buffering=1) as sys.stdout, err.open("a", buffering=1) as sys.stderr:
        sys.exit(work(folder, *args))


def start(work: Callable[..., Any], world: int, folder: Path, *args: Any) -> list[Any]:
    port = free_port()
    spawn = [(work, rank, world, port, str(folder), *args) for rank in range(world)]
    processes = [FORKS.Process(target=on_rank, args=each) for each in spawn]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[Any], seconds: float = PATIENCE) -> list[int | None]:
    """Exit statuses; a process that does not end is killed and has None."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return statuses


# Gradients, flags and averages


CASES = {
    "supervised": ["--smoothing", 0.1, "--accumulation_steps", 2],
    "pairing": ["--full_weight", 1, "--consistency_weight", 3, "--consistency_threshold", 0.4, "--smoothing", 0],
    "distillation": ["--distillation_type", "soft", "--distillation_tau", 2, "--teacher_path", "given"],
}


def batches_of(rank: int, world: int) -> list[Batch]:
    """Two micro-batches of 8 images in all, dealt to the ranks in turn."""
    whole = [make_batch(8, seed) for seed in (11, 15)]
    return [Batch(*(part[rank::world] for part in batch[:3]), ()) for batch in whole]  # type: ignore[arg-type]


def one_step(case: str, dist: Distributed) -> dict[str, dict[str, Tensor]]:
    """Gradients of two micro-batches, then the weights and their average after an update."""
    model = ours(MergeConfig(method="tome", r=2), num_registers=2, distilled=case == "distillation")
    with torch.no_grad():
        model.head.weight *= 8  # so that confidences lie on both sides of the threshold
    teacher = ours(seed=5).double() if case == "distillation" else None
    learner = make_learner(*CASES[case], "--clip_grad", 0.5, model=model, dist=dist, teacher=teacher)
    learner.optimizer = torch.optim.SGD(learner.module.parameters(), lr=0.1)  # Adam's first step is a sign
    micro = batches_of(dist.rank, dist.world)
    # the masked mean is over a micro-batch of all ranks, so one is taken at a time
    sums = learner.step_gradients(micro if case != "pairing" else micro[:1], 0, 0)
    grads = gradients(learner.module)
    learner.update()
    assert learner.ema is not None
    ema = {name: tensor.clone() for name, tensor in learner.ema.module.state_dict().items()}
    return {"sums": sums, "gradients": grads, "weights": learner.module.state_dict(), "ema": ema}


def scores_of(limit: int, dist: Distributed) -> Scores:
    args = options.parse_args(digits("--eval", "--batch_size", 32, limit=limit))
    data = build_data(args, DataConfig(input_size=32))
    model = ours(MergeConfig(method="tome", r=2))
    loader = build_eval_loader(args, data.val, dist.rank, dist.world)
    scores = evaluate(model, loader, [2], PLAIN, dist, agreement=True)
    assert scores is not None
    return scores[0]


def flags_between_ranks(dist: Distributed) -> dict[str, Any]:
    """Rank 1 alone is asked to stop, meets a loss that is not finite, and an unreadable image."""
    learner, stop, log, done = make_learner(dist=dist), StopSignal(), EpochLog(), []
    unreadable = UnreadableImages(5)
    batches = [make_batch(2, 10 * step + dist.rank) for step in range(5)]
    if dist.rank == 1:
        batches[0].images[0] = float("nan")
        batches[1] = batches[1]._replace(bad=("torn.png",))

    def after(step: int) -> None:
        done.append(step)
        if step == 2 and dist.rank == 1:
            stop.request("SIGTERM")

    ended = train(learner, batches, stop=stop, unreadable=unreadable, epoch_log=log, after_step=after)
    weights = [tensor.clone() for tensor in learner.module.state_dict().values()]
    seen = {"ended": ended, "done": done, "reason": stop.requested, "bad": sorted(unreadable.names), "sums": log.sums}
    return seen | {"nonfinite": log.nonfinite, "samples": log.samples, "weights": weights}


def checks(folder: str, with_training: bool) -> int:
    dist = init_distributed("cpu")
    found: dict[str, Any] = {str(limit): vars(scores_of(limit, dist)) for limit in (1, 5, 360)}
    if with_training:
        found |= {case: one_step(case, dist) for case in CASES}
        found["flags"] = flags_between_ranks(dist)
    torch.save(found, f"{folder}/found{dist.rank}.pt")
    close_distributed()
    return 0


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found."""
    return found_by(2, tmp_path_factory.mktemp("two"), True)


def found_by(world: int, folder: Path, with_training: bool) -> list[dict[str, Any]]:
    statuses = finish(start(checks, world, folder, with_training))
    assert statuses == [0] * world, [(folder / f"err{rank}.txt").read_text() for rank in range(world)]
    return [torch.load(folder / f"found{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_take_the_step_of_one_process_with_all_their_images(two: list[dict[str, Any]], case: str) -> None:
    wanted = one_step(case, Distributed(torch.device("cpu")))
    for kind in ("gradients", "weights", "ema"):
        assert two[0][case][kind].keys() == wanted[kind].keys()
        for name, tensor in wanted[kind].items():
            torch.testing.assert_close(two[0][case][kind][name], tensor, rtol=1e-9, atol=1e-12, msg=f"{kind} {name}")
            assert torch.equal(two[0][case][kind][name], two[1][case][kind][name]), f"{kind} {name}"
    for name, total in wanted["sums"].items():
        torch.testing.assert_close(two[0][case]["sums"][name] + two[1][case]["sums"][name], total)
    if case == "pairing":
        chosen = [float(found[case]["sums"]["selected"]) for found in two]
        assert chosen[0] != chosen[1] and sum(chosen) > 0, "the ranks should select different numbers of images"


def test_ranks_stop_skip_and_report_together(two: list[dict[str, Any]]) -> None:
    first, second = (found["flags"] for found in two)
    for found in (first, second):
        assert (found["ended"], found["done"], found["bad"]) == (False, [1, 2, 3], ["torn.png"])
        assert (found["nonfinite"], found["samples"]) == (1, 8)
    assert (first["reason"], second["reason"]) == ("another rank", "SIGTERM")
    assert first["sums"] == second["sums"]
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))


def test_evaluation_counts_each_image_once_for_any_world_size(two: list[dict[str, Any]], tmp_path: Path) -> None:
    three = found_by(3, tmp_path, False)
    for limit in (1, 5, 360):
        wanted = vars(scores_of(limit, Distributed(torch.device("cpu"))))
        assert wanted["n_images"] == limit
        for found in [*two, *three]:
            scores = found[str(limit)]
            assert (scores["n_images"], scores["acc1"], scores["acc5"]) == (limit, wanted["acc1"], wanted["acc5"])
            assert [scores[k] for k in ("loss", "agree", "kl")] == pytest.approx(
                [wanted[k] for k in ("loss", "agree", "kl")],
                rel=1e-6,
                abs=1e-9,  # kl is 1e-4 here, of float32 logits whose last digits may depend on the batch size
            )


# Whole runs


def run_flags(folder: Path) -> list[str]:
    """Two epochs of 8 updates on two ranks."""
    flags = ["--epochs", 2, "--batch_size", 8, "--r", 3, "--full_weight", 1, "--mixup", 0.5, "--model_ema_decay", 0.9]
    return digits(*flags, "--reprob", 0.5, "--resume", "auto", "--output_dir", folder, limit=128)


def play(folder: str, interrupt: str = "", rank: int = 1, epochs: int = 2, flags: Sequence[str] = ()) -> int:
    """main.py in a rank; `interrupt` is sent to one of them by itself after its third update of this call."""
    argv = [*run_flags(Path(folder)), "--epochs", str(epochs), *flags]
    train_epoch, calls = trainer.train_one_epoch, [0]

    def watched(*args: Any, after_step: Any, **options: Any) -> bool:
        def counted(done: int) -> None:
            after_step(done)
            calls[0] += 1
            if calls[0] == 3 and interrupt and int(os.environ["RANK"]) == rank:
                os.kill(os.getpid(), signal.Signals[interrupt])

        return train_epoch(*args, after_step=counted, **options)

    trainer.train_one_epoch = watched
    return main.main(argv)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert finish(start(play, 2, folder)) == [0, 0], (folder / "err0.txt").read_text()
    return folder


def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on(unbroken: Path, tmp_path: Path) -> None:
    assert finish(start(play, 2, tmp_path, "SIGTERM", 1)) == [75, 75]
    assert '"step": 4' in (tmp_path / "stopped.json").read_text()
    assert finish(start(play, 2, tmp_path, "SIGUSR1", 0)) == [75, 75]
    assert finish(start(play, 2, tmp_path)) == [0, 0]
    assert not (tmp_path / "stopped.json").exists()
    same_run(tmp_path, unbroken)


@pytest.mark.parametrize(("how", "seconds"), [("SIGKILL", 120), ("SIGSTOP", 180)])
def test_a_lost_rank_ends_the_others_in_bounded_time(tmp_path: Path, how: str, seconds: float) -> None:
    """Killed: the connection breaks. Frozen: the wait ends after REGTOME_DIST_TIMEOUT."""
    processes = start(frozen_play, 2, tmp_path, how)
    began = time.monotonic()
    processes[0].join(seconds)
    status, taken = processes[0].exitcode, time.monotonic() - began
    finish(processes, 0)
    errors = (tmp_path / "err0.txt").read_text()
    assert status == 1 and taken < seconds, errors
    line = [line for line in errors.splitlines() if "main.py: error" in line]
    assert len(line) == 1 and "lost contact with the other processes" in line[0]
    assert "Traceback" not in errors


def frozen_play(folder: str, how: str) -> int:
    os.environ["REGTOME_DIST_TIMEOUT"] = "5"
    return play(folder, how, epochs=50)


def test_torchrun_forwards_a_stop_and_two_ranks_go_on(unbroken: Path, tmp_path: Path) -> None:
    script = tmp_path / "launch.py"
    script.write_text(LAUNCH)
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv = [*run_flags(folder), "--save_every_steps", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(
        [*command, "--", str(script), str(ROOT / "tests"), str(ROOT), *argv],
        env=environment,
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + PATIENCE
    while not (folder / "checkpoint.pth").exists() and time.monotonic() < deadline and launcher.poll() is None:
        time.sleep(0.01)
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode != 0 and (folder / "stopped.json").is_file(), output
    assert checkpoint(folder)["epoch"] < 2 and "stopped by SIGTERM in epoch" in output
    assert finish(start(play_in, 2, tmp_path, str(folder))) == [0, 0]
    same_run(folder, unbroken)
    assert len(log_lines(folder)) == 2


def play_in(_: str, folder: str) -> int:
    return play(folder)
