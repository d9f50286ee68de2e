"""The launcher without Slurm: what it would submit, what it refuses, and runs on this machine."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import submitit
from _slurm import until
from runs import digits, toy_model
from submitit.core.utils import cloudpickle_dump

from run import submit

ROOT = Path(__file__).resolve().parents[1]


def refusal(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The one line on stderr of a command line that is refused."""
    assert submit.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("submit.py: error: ") and err.count("\n") == 1, (out, err)
    return err


def epochs(folder: Path) -> list[int]:
    """Epochs that a run has logged."""
    return [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()]


# What would be submitted


def dry(capsys: pytest.CaptureFixture[str], *flags: str, run: list[str] | None = None) -> list[str]:
    """Lines that a dry run prints; it leaves nothing behind."""
    before = sorted(Path().iterdir())
    assert submit.main([*flags, "--dry_run", "--", *(digits() if run is None else run)]) == 0
    assert sorted(Path().iterdir()) == before
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, on a machine without Slurm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_dry_run_shows_slurms_script(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "--nodes 2 --ngpus 8 --partition gpu --account me --constraint volta32gb --comment deadline --mem 80 --cpus 6"
    )
    more = "--timeout 600 --signal_delay 90 --job_name digits --sbatch qos=high --sbatch exclusive"
    lines = dry(capsys, *flags.split(), *more.split(), run=digits("--output_dir", "out"))
    header = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    logs = nowhere / "out" / "slurm"
    assert header == {
        "account=me",
        "comment=deadline",
        "constraint=volta32gb",
        "cpus-per-task=6",
        f"error={logs}/%j_0_log.err",
        "exclusive",
        "gpus-per-node=8",
        "job-name=digits",
        "mem=80G",
        "nodes=2",
        "ntasks-per-node=8",
        "open-mode=append",
        f"output={logs}/%j_0_log.out",
        "partition=gpu",
        "qos=high",
        "requeue",
        "signal=USR2@90",
        "time=600",
    }
    (srun,) = [line for line in lines if line.startswith("srun ")]
    assert f"--output {logs}/%j_%t_log.out" in srun and f"--error {logs}/%j_%t_log.err" in srun
    assert "--kill-on-bad-exit=1 --cpus-per-task=6" in srun and srun.endswith(str(logs))
    assert "main.py" in lines[-2] and lines[-2].endswith(" " + " ".join(digits("--output_dir", "out")))
    assert lines[-1].endswith("--resume auto")


def test_defaults(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = dry(capsys, "--ngpus", "0")
    assert not [line for line in lines if "gpus" in line or "--mem" in line or "partition" in line]
    assert "#SBATCH --ntasks-per-node=1" in lines and "#SBATCH --time=2880" in lines
    assert "#SBATCH --cpus-per-task=1" in lines and "#SBATCH --signal=USR2@120" in lines
    # without a folder a run could not go on after a requeue, and CPU nodes may show GPUs of others
    command = lines[-2].split()
    folder = Path(command[command.index("--output_dir") + 1])
    assert folder.parent == Path("runs") and "deit_digits" in folder.name
    assert command[command.index("--device") + 1] == "cpu"
    assert lines[0] == f"job folder: {nowhere / folder / 'slurm'}"


def test_job_folder_and_names_with_hyphens(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = dry(capsys, "--job-dir", "jobs/%j", "--tasks-per-node=4", "--ngpus=0")
    assert lines[0] == f"job folder: {nowhere}/jobs/%j" and "#SBATCH --ntasks-per-node=4" in lines


def test_an_evaluation_does_not_resume(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--resume" not in "\n".join(dry(capsys, run=["--eval", "--dataset", "DIGITS"]))


def test_dry_run_of_local_and_debug(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = dry(capsys, "--cluster", "local", "--ngpus", "2")
    assert "tasks_per_node: 2" in lines and "gpus_per_node: 2" in lines and "signal_delay_s: 120" in lines
    assert dry(capsys, "--cluster", "debug", "--ngpus", "0")[0].startswith("every rank runs: python ")


# What is refused


@pytest.mark.parametrize(
    ("flags", "arguments", "wanted"),
    [
        ("--nodes 2", None, "give them after --"),
        ("--nodse 2", "", "did you mean --nodes?"),
        ("--nodes 0", "", ">= 1"),
        ("--mem lots", "", "write 80 or 80G"),
        ("--ngpus 8 --tasks_per_node 4", "", "one process for each"),
        ("--timeout 1 --signal_delay 60", "", "must be shorter"),
        ("--sbatch --qos=high", "", "--sbatch"),
        ("--sbatch array=0-1", "", "--sbatch array is refused"),
        ("--sbatch arr=0-1", "", "--sbatch array is refused"),
        ("--cluster local --partition gpu", "", "--partition has no effect with --cluster local"),
        ("--cluster local --nodes 2", "", "this machine only"),
        ("--cluster debug", "", "one process"),
        ("", "--epochs 0", ">= 1"),
        ("", "--modle deit_small", "did you mean --model?"),
        ("", "--model deit_smal --dataset DIGITS", "deit_small"),
        ("", "--dataset DIGITS --r 99x", "99x"),
        ("", "--dataset DIGITS --merge mctf", "--r"),
        ("", "--dataset DIGITS --r 4 --activate_layer 17", "17"),
        ("", "--dataset DIGITS --finetune missing.pth", "missing.pth does not exist"),
        ("", "--dataset DIGITS --resume missing.pth", "missing.pth does not exist"),
        ("", "--data_path missing", "data not found: missing/train does not exist"),
        ("", "--dataset FOLDER --eval --data_path missing", "data not found: missing/val does not exist"),
        ("", "--dataset DIGITS --output_dir out", "there is no sbatch here"),
        ("--cluster debug --ngpus 0", "--dataset DIGITS --output_dir file", "--output_dir file"),
        ("--cluster debug --ngpus 0", "--dataset DIGITS --output_dir used", "used holds checkpoint.pth"),
    ],
)
def test_refusals(
    nowhere: Path, capsys: pytest.CaptureFixture[str], flags: str, arguments: str | None, wanted: str
) -> None:
    (nowhere / "used").mkdir()
    (nowhere / "used" / "checkpoint.pth").touch()
    (nowhere / "file").touch()
    argv = flags.split() + ([] if arguments is None else ["--", *arguments.split()])
    assert wanted in refusal(capsys, argv)
    assert not (nowhere / "out").exists() and not (nowhere / "runs").exists()


def test_data_of_the_nodes_need_not_be_here(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry(capsys, "--skip_data_check", run=["--data_path", "/scratch/imagenet", "--model", "deit_tiny"])


def test_a_run_may_go_on_in_its_own_folder(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(["--cluster", "debug", "--ngpus", "0", "--", *digits("--output_dir", "out", limit=20)]) == 0
    capsys.readouterr()
    again = digits("--output_dir", "out", "--epochs", 2, limit=20)
    assert "out holds checkpoint.pth" in refusal(capsys, ["--", *again])
    dry(capsys, run=[*again, "--resume", "auto"])
    dry(capsys, run=[*again, "--resume", "out/checkpoint.pth"])
    (nowhere / "other").mkdir()
    (nowhere / "out" / "checkpoint.pth").rename(nowhere / "other" / "checkpoint.pth")
    (nowhere / "out" / "checkpoint.pth").touch()
    assert "out holds checkpoint.pth" in refusal(capsys, ["--", *again, "--resume", "other/checkpoint.pth"])


# What a rank does


class Where(SimpleNamespace):
    """submitit's environment of one rank."""

    cluster, job_id, global_rank, USR_SIG = "slurm", "1", 0, "USR2"


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Signals that a rank raises, as submitit takes them: it requeues and leaves with -1."""
    raised: list[int] = []

    def raise_signal(number: int) -> None:
        raised.append(number)
        sys.exit(-1)

    monkeypatch.setattr(signal, "raise_signal", raise_signal)
    return raised


def leave(rank: submit.Rank, where: Any) -> Any:
    with pytest.raises(SystemExit) as stop:
        rank._requeue(where)
    return stop.value.code


@pytest.mark.parametrize(
    ("state", "number", "requeued"),
    [("RUNNING", 0, True), ("RUNNING", 1, False), ("COMPLETING", 0, False), ("PENDING", 0, False), ("GONE", 0, False)],
)
def test_only_rank_0_of_a_running_job_requeues(
    monkeypatch: pytest.MonkeyPatch, signals: list[int], state: str, number: int, requeued: bool
) -> None:
    monkeypatch.setattr(submit, "slurm_state", lambda job: state)
    rank = submit.Rank([], "out", str(ROOT), None)
    assert leave(rank, Where(global_rank=number)) == 0
    assert signals == [signal.SIGUSR2] * requeued


def test_a_requeue_that_ends_its_own_command_has_worked(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(number: int) -> None:
        monkeypatch.setattr(submit, "slurm_state", lambda job: "COMPLETING")
        raise subprocess.CalledProcessError(-15, "scontrol requeue")

    def refused(number: int) -> None:
        raise subprocess.CalledProcessError(1, "scontrol requeue")

    rank = submit.Rank([], "out", str(ROOT), None)
    monkeypatch.setattr(submit, "slurm_state", lambda job: "RUNNING")
    monkeypatch.setattr(signal, "raise_signal", refused)
    with pytest.raises(subprocess.CalledProcessError):
        rank._requeue(Where())  # type: ignore[arg-type]
    monkeypatch.setattr(signal, "raise_signal", killed)
    assert leave(rank, Where()) == 0


def test_the_state_is_asked_again_where_a_signal_ended_squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "squeue").write_text(
        f"#!/bin/sh\n[ -e {tmp_path}/asked ] && echo RUNNING && exit\n>{tmp_path}/asked\nkill $$"
    )
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit.slurm_state("1") == "RUNNING"
    (tmp_path / "squeue").write_text("#!/bin/sh\necho FAILED; echo RUNNING; echo FAILED")
    assert submit.slurm_state("1") == "RUNNING"
    (tmp_path / "squeue").write_text("#!/bin/sh\necho FAILED; echo FAILED")
    assert submit.slurm_state("1") == "FAILED"
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert submit.slurm_state("1") == "GONE"
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1")
    assert submit.slurm_state("1") == "UNKNOWN"


@pytest.mark.parametrize(("reason", "requeued"), [("SIGUSR2", True), ("another rank", True), ("SIGTERM", False)])
def test_a_local_run_that_is_killed_ends(tmp_path: Path, signals: list[int], reason: str, requeued: bool) -> None:
    (tmp_path / "stopped.json").write_text(json.dumps({"reason": reason}))
    assert leave(submit.Rank([], str(tmp_path), str(ROOT), None), Where(cluster="local")) == 0
    assert bool(signals) == requeued


def test_a_restarted_training_resumes_its_own_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    first = submit.Rank(["--resume", "other.pth"], str(tmp_path), str(ROOT), None)
    again = first.checkpoint().function
    assert again.arguments() == ["--resume", "other.pth"]  # stopped before anything was saved
    (tmp_path / "checkpoint.pth").touch()
    assert first.arguments() == ["--resume", "other.pth"]
    assert again.arguments() == ["--resume", "other.pth", "--resume", "auto"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # a requeue that submitit knows nothing of
    assert first.arguments() == again.arguments()
    assert submit.Rank(["--eval"], str(tmp_path), str(ROOT), None).arguments() == ["--eval"]


def test_stale_ranks_do_not_hide_slurms(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    submit.Rank([], "out", str(ROOT), threads=3)._environment(Where())  # type: ignore[arg-type]
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} & os.environ.keys()
    assert os.environ["OMP_NUM_THREADS"] == "3"


# What is told about a failure


class Finished(submitit.LocalJob[int]):
    """A job that has ended, of which only the files are there."""

    @property
    def state(self) -> str:
        return "FINISHED"


def ended(folder: Path, errors: dict[int, str], logs: dict[int, str]) -> Finished:
    for rank, text in errors.items():
        cloudpickle_dump(("error", text), folder / f"7_{rank}_result.pkl")
    for rank, text in logs.items():
        (folder / f"7_{rank}_log.err").write_text(text)
    return Finished(folder, "7", [0, 1])


def test_the_rank_that_broke_is_shown_not_those_that_lost_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = "Traceback\nRuntimeError: [pair.cc:1] Connection closed by peer"
    assert submit.wait(ended(tmp_path, {0: lost, 1: "Traceback\nKeyError: 'x'"}, {})) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "failed on rank 1 of 2" in lines[0] and str(tmp_path / "7_1_log.err") in lines[0]
    assert lines[1:] == ["Traceback", "KeyError: 'x'"]


KILLED = """\
submit.py: start 0
srun: error: node1: task 0: Segmentation fault
submit.py: start 1
srun: error: node2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=14.0
srun: error: node1: task 0: Exited with exit code 1
"""


def test_a_killed_rank_is_to_blame_not_the_one_that_lost_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint.pth").touch()
    (out / "stopped.json").write_text('{"epoch": 2, "step": 7}')
    followed = submit.Followed(str(out), "python run/submit.py -- --resume auto")
    lost = "Traceback\nRunError: lost contact with the other processes in a sum"
    for log, words in ((KILLED, "rank 1 of 2 on node2 was killed (SIGKILL)"), ("", "rank 1 of 2 left no result")):
        assert submit.wait(ended(tmp_path, {0: lost}, {0: log}), followed=followed) == 1
        lines = capsys.readouterr().err.splitlines()
        assert words in lines[0] and "memory ran out" in lines[0]
        assert (
            f"last good checkpoint: {out / 'checkpoint.pth'}" in lines[1] and "epoch 2 after micro-batch 7" in lines[1]
        )
        assert lines[2:] == ["submit.py: go on with: python run/submit.py -- --resume auto"]


def test_the_command_to_go_on_names_the_run(tmp_path: Path) -> None:
    args, main_argv = submit.parse(["--nodes", "2", "--", "--dataset", "DIGITS", "--output_dir", "o", "--overwrite"])
    main_argv, main_args = submit.complete(main_argv, args)
    command = submit.followed_job(["--nodes", "2", "--", "x"], main_argv, main_args).command
    assert command.startswith("python run/submit.py --nodes 2 -- --dataset DIGITS --output_dir o ")
    assert command.endswith("--resume auto") and "--overwrite" not in command


@pytest.mark.parametrize("reason", ["DependencyNeverSatisfied", "(launch failed requeued held)"])
def test_a_job_that_can_never_start_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reason: str
) -> None:
    monkeypatch.setattr(submit, "job_state", lambda job: "PENDING")
    monkeypatch.setattr(submit, "pending_reason", lambda job: reason)
    assert submit.wait(ended(tmp_path, {}, {})) == 1
    assert f"waits for ever ({reason})" in capsys.readouterr().err


def test_silence_of_slurm_ends_the_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "job_state", lambda job: "UNKNOWN")
    monkeypatch.setattr(submit, "SILENCE", 0.1)
    assert submit.wait(ended(tmp_path, {}, {}), poll=0.05) == 1
    assert "Slurm has not answered" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "log", "state", "times", "requeued"),
    [
        (137, "", "RUNNING", 2, 2),
        (1, "slurmstepd: error: Detected 1 oom-kill event", "RUNNING", 1, 1),
        (1, "oom-kill\nsubmit.py: start 1\n", "RUNNING", 1, 0),  # of a start before
        (1, "main.py: error: a mistake", "RUNNING", 1, 0),
        (0, "", "RUNNING", 1, 0),
        (143, "", "COMPLETING", 1, 0),  # cancelled
    ],
)
def test_a_killed_process_requeues_the_job(
    tmp_path: Path, status: int, log: str, state: str, times: int, requeued: int
) -> None:
    """The lines in front of srun in the batch script, with a Slurm of shell scripts."""
    for name, body in (("squeue", f"echo {state}"), ("scontrol", f"echo requeue >> {tmp_path}/asked"), ("sleep", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    flags = ["--requeue_on_failure", str(times), "--job_dir", str(tmp_path), "--dry_run", "--", "--dataset", "DIGITS"]
    args, main_argv = submit.parse(flags)
    lines = submit._setup(args, submit.complete(main_argv, args)[1])
    (tmp_path / "7_0_log.err").write_text(log)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    for _ in range(3):
        script = "\n".join([*lines, f"(exit {status})"])
        subprocess.run(["bash", "-c", script], env=environment, check=False, capture_output=True)
    asked = tmp_path / "asked"
    assert (asked.read_text().count("requeue") if asked.exists() else 0) == requeued


def test_a_long_traceback_is_shown_from_its_beginning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = [f"  frame {i}" for i in range(2 * submit.TAIL)]
    error = "\n".join(["Traceback (most recent call last):", *chain, "KeyError: 'cause'", "RuntimeError: 'effect'"])
    assert submit.wait(ended(tmp_path, {0: f"what came before\n{error}\n", 1: ""}, {})) == 1
    assert capsys.readouterr().err.splitlines()[1:] == error.splitlines()


def test_an_error_that_main_has_explained_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explained = (
        "main.py: error: data not found\nsubmitit ERROR (now) - triggered an exception\nTraceback\nRunFailed: 2\n"
    )
    failed = "Traceback\n__main__.RunFailed: main.py ended with status 2"
    assert submit.wait(ended(tmp_path, {0: failed, 1: failed}, {0: explained, 1: explained})) == 1
    assert capsys.readouterr().err.splitlines()[1:] == ["main.py: error: data not found"]


def test_a_job_that_dies_without_a_word_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "SETTLE", 0.1)
    assert submit.wait(ended(tmp_path, {}, {0: "slurmstepd: error: Detected 1 oom-kill event"}), poll=0.1) == 1
    error = capsys.readouterr().err
    assert "ended as FINISHED without a result of rank 0" in error and "oom-kill" in error


# Runs on this machine


def test_debug_runs_in_this_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--cluster", "debug", "--ngpus", "0", "--"]
    with toy_model():
        assert submit.main([*flags, *digits("--output_dir", tmp_path / "run")]) == 0
        assert epochs(tmp_path / "run") == [0]
        assert submit.main([*flags, *digits("--output_dir", tmp_path / "next", "--finetune", __file__)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def start(folder: Path, *arguments: object, wait: bool = True) -> "subprocess.Popen[str]":
    flags = ["--cluster", "local", "--ngpus", "0", *(["--wait"] if wait else [])]
    command = [sys.executable, str(ROOT / "run" / "submit.py"), *flags, "--", *digits(*arguments, "--log_every", 1)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=dict(os.environ) | {"OMP_NUM_THREADS": "1"}, text=True, **streams)


def children(process: int) -> list[int]:
    """Processes that one has started, from Linux's list of them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        found += [int(path.parent.name)] if int(fields[1]) == process else []
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_local_run_is_restarted_after_its_time_limits_signal(tmp_path: Path) -> None:
    process = start(tmp_path, "--output_dir", "run", "--batch_size", 4, "--limit", 200)
    logs = tmp_path / "run" / "slurm"

    def training() -> bool:
        assert process.poll() is None, process.communicate()
        return any("epoch 0 [2/" in path.read_text() for path in logs.glob("*_0_log.out"))

    until("the run trains", training)
    (log,) = logs.glob("*_0_log.out")
    for rank in children(int(log.name.split("_")[0])):
        os.kill(rank, signal.SIGUSR2)  # as submitit's local controller does at the time limit
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0 and out.rstrip().endswith(": done"), (out, err)
    assert "stopped by SIGUSR2 in epoch 0" in log.read_text() and "resumed run/checkpoint.pth" in log.read_text()
    assert epochs(tmp_path / "run") == [0]


def test_a_local_failure_reaches_the_submitter(tmp_path: Path) -> None:
    (tmp_path / "val" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "dog").mkdir(parents=True)
    run = [
        "--model",
        "deit_digits",
        "--dataset",
        "FOLDER",
        "--data_path",
        ".",
        "--input_size",
        32,
        "--output_dir",
        "run",
    ]
    out, err = (process := start(tmp_path, *run)).communicate(timeout=600)
    lines = err.splitlines()
    assert process.returncode == 1 and len(lines) == 2, (out, err)
    assert "failed on rank 0 of 1" in lines[0] and lines[1].startswith("main.py: error: ")
