"""Send a run of main.py to Slurm, or start it here, through submitit.

python run/submit.py --nodes 2 --ngpus 8 -- --model deit_small --r 16 --num_registers 4 --output_dir output/regtome
python run/submit.py --cluster local --ngpus 0 --tasks_per_node 2 -- --dataset DIGITS --output_dir output/digits

Everything after -- goes to main.py, and is checked before anything is submitted. The job folder (<output_dir>/slurm)
holds the script, and every rank's <job id>_<rank>_log.out and .err. A run that Slurm stops (preemption, time limit,
scancel --signal=USR2) saves, is requeued, and goes on where it was; so does one that `scontrol requeue` restarts.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import uuid
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, pickle_load

if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import build
import main as program
import options
from datasets import data_root, missing_data
from models import UserError, create_model
from utils import setup_output

ROOT = Path(__file__).resolve().parents[1]
SLURM_ONLY = ("partition", "constraint", "account", "mem", "comment", "cpus", "job_name", "sbatch", "max_timeouts")
ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
)
GRACE = 20.0  # seconds for the other ranks to end after one failed, and for shared file systems to show results
TAIL = 40  # lines of a failed rank that are shown
LOST = re.compile("lost contact|connection closed|connection reset|broken pipe|nccl", re.IGNORECASE)


# In the job


class RunFailed(RuntimeError):
    """main.py ended with an error that it has printed itself."""


class Rank:
    """One process of a job: what submitit pickles, and calls in every task.

    While main.py trains, its own handlers save on a signal and it returns 75 on all ranks. Only then rank 0 raises
    submitit's signal, so that submitit counts the timeouts, calls `checkpoint` and requeues, once.
    """

    def __init__(self, argv: Sequence[str], output_dir: str, root: str, threads: int | None, port: int = 0) -> None:
        self.argv, self.output_dir, self.root = list(argv), output_dir, root
        self.threads, self.port = threads, port
        self.restarted = False

    def __call__(self) -> int:
        where = submitit.JobEnvironment()
        self._environment(where)
        sys.path.insert(0, self.root)
        from main import main
        from utils import RESUMABLE_STATUS

        try:
            status = main(self.arguments())
        except Exception:
            if _in_charge(where):
                raise
            traceback.print_exc()  # the loss of ranks that Slurm has ended
            sys.exit(0)
        if status and (status == RESUMABLE_STATUS or not _in_charge(where)):
            self._requeue(where)
        if status == _local_requeue():  # main() hands on the exit of submitit's handler
            sys.exit(status)
        if status:
            raise RunFailed(f"main.py ended with status {status}")
        return status

    def _environment(self, where: submitit.JobEnvironment) -> None:
        """Where this rank stands. Under Slurm main.py reads srun's variables, and stale ones must not hide them."""
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
            os.environ.pop(name, None)
        if self.threads is not None:
            os.environ.setdefault("OMP_NUM_THREADS", str(self.threads))
        if where.cluster == "local":
            place: dict[str, Any] = {
                "RANK": where.global_rank,
                "WORLD_SIZE": where.num_tasks,
                "LOCAL_RANK": where.local_rank,
            }
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port}
            os.environ.update({name: str(value) for name, value in place.items()})

    def arguments(self) -> list[str]:
        """main.py's command line; a restarted training goes on from its own checkpoint, once there is one."""
        restarted = self.restarted or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        saved = any((Path(self.output_dir) / name).exists() for name in ("checkpoint.pth", "checkpoint_prev.pth"))
        resume = restarted and saved and "--eval" not in self.argv
        return [*self.argv, "--resume", "auto"] if resume else self.argv

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit runs after a requeue."""
        again = copy.copy(self)
        again.restarted = True
        return submitit.helpers.DelayedSubmission(again)

    def _requeue(self, where: submitit.JobEnvironment) -> None:
        """Leave without a result, after having the job requeued if that is for us to do."""
        if where.global_rank == 0 and _in_charge(where) and not self._killed(where):
            try:
                signal.raise_signal(getattr(signal, f"SIG{where.USR_SIG}"))
            except SystemExit as stop:
                if stop.code == _local_requeue():
                    raise
            except subprocess.CalledProcessError:
                if _in_charge(where):  # else the requeue has ended the very command that asked for it
                    raise
        sys.exit(0)  # SystemExit leaves no result file; submitit's own -1 would look like a failed rank

    def _killed(self, where: submitit.JobEnvironment) -> bool:
        """Whether a local run was told to end: without a scheduler, SIGTERM is not a preemption."""
        marker = Path(self.output_dir) / "stopped.json"
        return where.cluster == "local" and marker.exists() and json.loads(marker.read_text())["reason"] == "SIGTERM"


def _local_requeue() -> int:
    from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

    return LOCAL_REQUEUE_RETURN_CODE


def _in_charge(where: submitit.JobEnvironment) -> bool:
    """False if Slurm is ending the job by itself (scancel, an outside requeue, a lost node): hands off, then."""
    return where.cluster != "slurm" or slurm_state(where.job_id) in ("RUNNING", "UNKNOWN")


def slurm_state(job_id: str) -> str:
    """State of a Slurm job by squeue, which needs no accounting; "UNKNOWN" if Slurm does not answer, "GONE" if it has
    forgotten the job."""
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T"]
    for _ in range(3):  # the signal that ends a job may hit squeue, too
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.SubprocessError):
            return "UNKNOWN"
        if done.returncode >= 0:
            break
    if done.returncode:
        return "GONE" if "Invalid job id" in done.stderr else "UNKNOWN"
    return done.stdout.strip() or "GONE"


# Before the job


def build_parser() -> options.Parser:
    """Flags of submit.py, those before --."""
    parser = options.Parser(
        prog="submit.py",
        usage="python run/submit.py [flags] -- [arguments of main.py]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--cluster", choices=("slurm", "local", "debug"), default="slurm", help="local: here; debug: in this process")
    add("--nodes", type=options.positive_int, default=1)
    add("--ngpus", type=options.non_negative_int, default=8, help="GPUs per node, one process each; 0: on CPUs")
    add("--tasks_per_node", type=options.positive_int, help="processes per node, with --ngpus 0 (default: 1)")
    add("--timeout", type=options.positive_int, default=2880, metavar="MINUTES", help="then it saves and is requeued")
    add(
        "--max_timeouts",
        type=options.non_negative_int,
        help="requeues after a time limit (default: 10); preemptions are free",
    )
    add("--signal_delay", type=options.positive_int, default=120, metavar="SECONDS", help="to save in, before the end")
    add("--partition")
    add("--constraint", metavar="FEATURE", help="kind of node, such as volta32gb")
    add("--account")
    add("--mem", metavar="GB", help="per node, 80 or 80G or 500M (default: the cluster's)")
    add("--cpus", type=options.positive_int, help="per process (default: --num_workers of main.py, at least 1)")
    add("--comment")
    add("--job_name", help="default: regtome")
    add("--sbatch", action="append", metavar="KEY=VALUE", help="any other option of sbatch, such as qos=high")
    add("--job_dir", metavar="DIR", help="script and logs; %%j is the job's id (default: <output_dir>/slurm)")
    add("--wait", action="store_true", help="until the end; then a failed rank's error is shown, and the status is 1")
    add("--dry_run", action="store_true", help="print what would be submitted")
    add("--skip_data_check", action="store_true", help="for data that only the compute nodes see")
    return parser


def parse(argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """argv -> flags of submit.py, arguments of main.py.

    Raises:
        UserError: a flag that is unknown, contradicts another or does nothing.
    """
    own, separator, arguments = list(argv), "--" in argv, []
    if separator:
        own, arguments = own[: own.index("--")], own[own.index("--") + 1 :]
    args = build_parser().parse(own)
    if not separator:
        raise UserError(
            "the arguments of main.py are missing; give them after --, as in --nodes 2 -- --model deit_small"
        )
    if args.cluster != "slurm":
        _check_local(args)
    if args.ngpus and args.tasks_per_node not in (None, args.ngpus):
        raise UserError("--tasks_per_node is for --ngpus 0; with GPUs there is one process for each")
    if args.signal_delay >= 60 * args.timeout:
        raise UserError(f"--signal_delay {args.signal_delay} s must be shorter than --timeout {args.timeout} min")
    if args.mem and not re.fullmatch(r"\d+[KMGT]?", args.mem):
        raise UserError(f"--mem {args.mem} is no amount of memory; write 80 or 80G or 500M")
    for pair in args.sbatch or ():
        if not re.fullmatch(r"[a-z][a-z-]*(=.+)?", pair):
            raise UserError(f"--sbatch {pair} must look like qos=high or exclusive")
    return args, arguments


def _check_local(args: Namespace) -> None:
    given = [name for name in SLURM_ONLY if getattr(args, name) is not None]
    if given:
        raise UserError(f"--{given[0]} has no effect with --cluster {args.cluster}; leave it out")
    if args.nodes > 1:
        raise UserError(f"--cluster {args.cluster} runs on this machine only; leave --nodes out")
    if args.cluster == "debug" and max(args.ngpus, args.tasks_per_node or 1) > 1:
        raise UserError("--cluster debug runs one process; give --ngpus 0 or 1")


def complete(arguments: Sequence[str], args: Namespace) -> tuple[list[str], Namespace]:
    """main.py's arguments with those that a job needs, and what they parse to.

    Raises:
        UserError: whatever main.py would refuse that can be found without the data.
    """
    arguments = list(arguments)
    parsed = options.parse_args(arguments)
    if not parsed.output_dir:  # without one nothing is saved, and a requeued run would start anew
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{parsed.model or 'deit_small'}-{uuid.uuid4().hex[:4]}"
        arguments += ["--output_dir", str(Path("runs") / name)]
    if args.ngpus == 0 and parsed.device is None:
        arguments += ["--device", "cpu"]
    parsed = options.parse_args(arguments)
    check_run(parsed, args.skip_data_check)
    return arguments, parsed


def check_run(parsed: Namespace, skip_data: bool = False) -> None:
    """Raise UserError for a model, a merging, a checkpoint or a data path with which main.py could not start."""
    build.merge_config(parsed)
    weights = build.Weights(parsed, parsed.model)
    config = build.build_config(parsed, weights.name)
    merge = build.merge_config(parsed, weights.merge)
    registers = {"num_registers": parsed.num_registers, "register_layer": parsed.register_layer or 0}
    if weights.state is None:  # else the checkpoint decides what fits
        create_model(weights.name, merge=merge, img_size=config.input_size, num_classes=10, **registers)
    folder = Path(parsed.output_dir).expanduser()
    if not parsed.eval and not _continues(parsed.resume, folder) and (folder / "checkpoint.pth").exists():
        raise UserError(f"{folder} holds checkpoint.pth of an earlier run; add --resume auto, or name another folder")
    if not skip_data and parsed.dataset in ("IMNET", "IMAGENETTE", "FOLDER"):
        for split in ("val",) if parsed.eval else ("train", "val"):
            if not (data_root(parsed) / split).is_dir():
                raise missing_data(parsed, f"{data_root(parsed) / split} does not exist")


def _continues(resume: str | None, folder: Path) -> bool:
    """Whether a checkpoint in the run's folder is its own, which a requeued run may take."""
    return bool(resume) and (resume == "auto" or Path(str(resume)).expanduser().resolve().parent == folder.resolve())


# The submission


def build_executor(args: Namespace, parsed: Namespace) -> Any:
    """submitit's executor with the job's parameters.

    Raises:
        UserError: there is no Slurm here.
    """
    folder = Path(args.job_dir or Path(parsed.output_dir) / "slurm").expanduser().absolute()
    tasks = args.tasks_per_node or max(1, args.ngpus)
    executor: Any
    if args.cluster == "local":
        executor = Namespace(folder=folder, parameters={}) if args.dry_run else submitit.LocalExecutor(folder)
        limits = {"timeout_min": args.timeout, "signal_delay_s": args.signal_delay}
        executor.parameters.update(tasks_per_node=tasks, gpus_per_node=args.ngpus, **limits)
        return executor
    if not args.dry_run and not shutil.which("sbatch"):
        raise UserError("there is no sbatch here; go to a login node of the cluster, or give --cluster local")
    kind = _DrySlurm if args.dry_run else submitit.SlurmExecutor
    executor = kind(folder, max_num_timeout=10 if args.max_timeouts is None else args.max_timeouts)
    executor.update_parameters(**_slurm_parameters(args, parsed, tasks))
    return executor


class _DrySlurm(submitit.SlurmExecutor):
    """A Slurm executor that also exists where there is no Slurm, to print its script."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _slurm_parameters(args: Namespace, parsed: Namespace, tasks: int) -> dict[str, Any]:
    cpus = args.cpus or max(1, parsed.num_workers)
    extra: dict[str, Any] = {"requeue": True}  # also where the cluster's default is not to
    for pair in args.sbatch or ():
        key, equals, value = pair.partition("=")
        extra[key] = value if equals else True
    parameters = {
        "job_name": args.job_name or "regtome",
        "nodes": args.nodes,
        "ntasks_per_node": tasks,
        "gpus_per_node": args.ngpus or None,
        "cpus_per_task": cpus,
        "mem": f"{args.mem}G" if args.mem and args.mem.isdigit() else args.mem,
        "time": args.timeout,
        "signal_delay_s": args.signal_delay,
        "wckey": None,  # submitit's own would be refused where such keys are kept
        # a failed rank must not leave the others waiting; since Slurm 22.05 srun ignores sbatch's cpus-per-task
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus}"],
        "additional_parameters": extra,
    }
    parameters |= {name: getattr(args, name) for name in ("partition", "constraint", "account", "comment")}
    return {name: value for name, value in parameters.items() if value is not None or name == "wckey"}


def build_rank(args: Namespace, arguments: list[str], parsed: Namespace) -> Rank:
    """What every process of the job runs."""
    threads, port = None, 0
    if args.cluster == "local":
        threads, port = max(1, (os.cpu_count() or 1) // (args.tasks_per_node or max(1, args.ngpus))), _free_port()
    elif args.ngpus == 0:
        threads = args.cpus or max(1, parsed.num_workers)
    folder = str(Path(parsed.output_dir).expanduser().absolute())
    return Rank(arguments, folder, str(ROOT), threads, port)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def describe(args: Namespace, executor: Any, arguments: Sequence[str]) -> str:
    """What would be submitted: Slurm's script as it would be written, and main.py's command line."""
    lines = [f"job folder: {executor.folder}"] if executor is not None else []
    if args.cluster == "slurm":
        lines.append(executor._make_submission_file_text(executor._submitit_command_str, "").strip())
    elif args.cluster == "local":
        lines += [f"{name}: {value}" for name, value in sorted(executor.parameters.items())]
    lines.append(f"every rank runs: python {shlex.quote(str(ROOT / 'main.py'))} {shlex.join(arguments)}")
    if "--eval" not in arguments and args.cluster != "debug":
        lines.append("after a requeue it adds: --resume auto")
    return "\n".join(lines)


def submit(executor: Any, rank: Rank) -> Any:
    """Submit; returns submitit's job.

    Raises:
        UserError: Slurm refuses the job; its own words.
    """
    if __name__ != "__main__":  # the job's processes need not find this module
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
    setup_output(executor.folder if "%" not in str(executor.folder) else None, True)  # before Slurm writes logs there
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            return executor.submit(rank)
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"Slurm refuses the job: {' '.join(str(error).split())}") from error


def announce(args: Namespace, job: Any, parsed: Namespace) -> None:
    """Job id, places and what to type next."""
    logs = job.paths.folder / f"{job.job_id}_RANK_log"
    print(f"job {job.job_id} submitted: {args.nodes} x {job.num_tasks // args.nodes} processes")
    print(f"results: {parsed.output_dir}")
    print(f"logs of each rank: {logs}.out, {logs}.err")
    print(f"follow:  tail -F {shlex.quote(str(job.paths.folder / f'{job.job_id}_0_log.out'))}")
    if args.cluster == "slurm":
        print(f"state:   squeue -j {job.job_id}")
        print(f"save and requeue: scancel --signal=USR2 {job.job_id};  end: scancel {job.job_id}", flush=True)
    else:
        print(f"save and end: kill {job.job_id}", flush=True)


# Waiting


def job_state(job: Any) -> str:
    return slurm_state(job.job_id) if isinstance(job, submitit.SlurmJob) else job.state


def results(job: Any) -> dict[int, tuple[str, Any]]:
    """Rank -> ("success", value) or ("error", traceback), of the ranks that have ended."""
    paths = {rank: job.task(rank).paths.result_pickle for rank in range(job.num_tasks)}
    return {rank: pickle_load(path) for rank, path in paths.items() if path.exists()}


def wait(job: Any, poll: float = 2.0) -> int:
    """Follow a job through its requeues to its end; 0 if every rank succeeded, else 1 after showing the failed rank."""
    before, ending, found = "", 0.0, results(job)
    while not (len(found) == job.num_tasks and all(kind == "success" for kind, _ in found.values())):
        state = job_state(job)
        if state != before:
            print(f"job {job.job_id}: {state}", flush=True)
        before, found = state, results(job)
        over = state in (*ENDED, "GONE", "FINISHED", "INTERRUPTED")
        failed = any(kind == "error" for kind, _ in found.values())
        ending = (ending or time.monotonic()) if over or failed else 0.0
        if ending and ((over and failed) or time.monotonic() - ending > GRACE):
            if not over:
                job.cancel(check=False)  # ranks that wait for the failed one
            return report(job, found, state)
        time.sleep(poll if not ending else min(poll, 1.0))
    print(f"job {job.job_id}: done")
    return 0


def report(job: Any, found: dict[int, tuple[str, Any]], state: str) -> int:
    """Show the rank that failed first: one with a traceback of its own, before those that lost contact with it."""
    errors = {rank: str(text) for rank, (kind, text) in found.items() if kind == "error"}
    if not errors:
        silent = next((rank for rank in range(job.num_tasks) if rank not in found), 0)
        return _show(job, silent, f"ended as {state} without a result of rank {silent}", _log_tail(job, silent))
    # main.py prints its own errors in one line of the log; any other has its traceback in the result
    texts = {r: _log_tail(job, r) if RunFailed.__name__ in text else text for r, text in errors.items()}
    rank = min(texts, key=lambda r: (bool(LOST.search(texts[r])), r))
    return _show(job, rank, f"failed on rank {rank} of {job.num_tasks}", texts[rank])


def _log_tail(job: Any, rank: int) -> str:
    """What main.py wrote to a rank's error log, without submitit's lines and traceback."""
    path = job.task(rank).paths.stderr
    text = path.read_text(errors="replace") if path.exists() else ""
    text = text.partition("submitit ERROR")[0] or text
    lines = [line for line in text.splitlines() if not line.startswith("submitit ")]
    return "\n".join([line for line in lines if line.startswith("main.py: error")][-1:] or lines)


def _show(job: Any, rank: int, what: str, text: str) -> int:
    paths = job.task(rank).paths
    print(f"submit.py: job {job.job_id} {what}; logs: {paths.stdout}, {paths.stderr}", file=sys.stderr)
    print("\n".join(text.strip().splitlines()[-TAIL:]), file=sys.stderr, flush=True)
    return 1


def run(argv: Sequence[str]) -> int:
    args, arguments = parse(argv)
    arguments, parsed = complete(arguments, args)
    executor = build_executor(args, parsed) if args.cluster != "debug" else None
    if args.dry_run:
        print(describe(args, executor, arguments))
        return 0
    setup_output(parsed.output_dir, True)
    if executor is None:
        return program.main(arguments)
    job = submit(executor, build_rank(args, arguments, parsed))
    announce(args, job, parsed)
    return wait(job) if args.wait else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Submit one command line; returns the exit status: 0, 1 after a failed job with --wait, 2 the user's mistake."""
    try:
        return run(sys.argv[1:] if argv is None else list(argv))
    except UserError as error:
        print(f"submit.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("submit.py: interrupted; a job that was submitted goes on", file=sys.stderr)
        return 130
    except SystemExit as stop:  # argparse after --help
        return int(stop.code or 0)


if __name__ == "__main__":
    sys.exit(main())
