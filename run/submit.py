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
import dataclasses
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
import warnings
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
from datasets import MAX_WORKERS
from downloads import fetch, has_credentials
from models import UserError, create_model
from runfolder import check_unused
from sources import data_root, missing_data
from utils import INTERRUPTED_STATUS, setup_output

ROOT = Path(__file__).resolve().parents[1]
SLURM_ONLY = (
    "partition",
    "constraint",
    "account",
    "mem",
    "comment",
    "cpus",
    "job_name",
    "sbatch",
    "max_timeouts",
    "requeue_on_failure",
)
ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
)
NEVER = ("DependencyNeverSatisfied", "JobHeldUser", "JobHeldAdmin", "launch failed requeued held", "BadConstraints")
SILENCE = 1800.0  # seconds without an answer of Slurm after which nobody waits on
GRACE = 60.0  # seconds for the other ranks to end after one failed, and for shared file systems to show results
SETTLE = 15.0  # for results of a job that did not end well
TAIL = 40  # lines that are shown of a rank that died without a traceback
LOST_CONTACT = re.compile("lost contact|connection closed|connection reset|broken pipe|nccl", re.IGNORECASE)


# In the job


# At the beginning of the batch script. A process that is killed gets no chance to ask for a requeue: the script does.
# The first line tells in the log, which all starts of a job share, where one begins.
START = "submit.py: start"
SETUP = """\
echo "submit.py: start ${SLURM_RESTART_COUNT:-0}" >&2
regtome_end() {
  status=$? log=@FOLDER@/${SLURM_JOB_ID}_0_log.err count=@FOLDER@/${SLURM_JOB_ID}_failures
  [[ $status != 0 ]] || return
  [[ $status -ge 128 ]] || tac "$log" | sed '/^submit.py: start/q' | grep -qiE 'oom.kill|out of memory' || return
  [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]] || return
  failures=$(($(cat "$count" 2>/dev/null || echo 0) + 1))
  [[ $failures -le @TIMES@ ]] || return
  echo "$failures" > "$count"
  echo "submit.py: a process was killed; requeueing, $failures of @TIMES@" >&2
  scontrol requeue "$SLURM_JOB_ID" && sleep 60
}
trap regtome_end EXIT
"""


class RunFailed(RuntimeError):
    """Says that main.py ended with an error that it has printed itself."""


class Rank:
    """A process of a job, which submitit pickles and calls in every task.

    While main.py trains, its own handlers save on a signal and it returns 75 on all ranks. Only then rank 0 raises
    submitit's signal, so that submitit counts the timeouts, calls `checkpoint` and requeues, once.
    """

    def __init__(self, argv: Sequence[str], output_dir: str, root: str, threads: int | None, port: int = 0) -> None:
        self.argv, self.output_dir, self.root = list(argv), output_dir, root
        self.threads, self.port = threads, port
        self.restarted = False

    def __call__(self) -> int:
        job = submitit.JobEnvironment()
        job.paths.result_pickle.unlink(missing_ok=True)  # of a start before this one
        self._environment(job)
        sys.path.insert(0, self.root)
        from main import main
        from utils import RESUMABLE_STATUS, StopSignal, die_with_launcher

        StopSignal.ends_process = True
        die_with_launcher()
        try:
            status = main(self.arguments())
        except Exception:
            if _is_running(job):
                raise
            traceback.print_exc()  # the loss of ranks that Slurm has ended
            sys.exit(0)
        if status and (status == RESUMABLE_STATUS or not _is_running(job)):
            self._requeue(job)
        if status == _local_requeue():  # main() hands on the exit of submitit's handler
            sys.exit(status)
        if status:
            raise RunFailed(f"main.py ended with status {status}")
        return status

    def _environment(self, job: submitit.JobEnvironment) -> None:
        """Say which rank this is. Under Slurm main.py reads srun's variables, and stale ones must not hide them.

        submitit's TorchDistributedEnvironment would take a port drawn from the job's number, which another program may
        hold here, and hides the GPUs of the other ranks.
        """
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
            os.environ.pop(name, None)
        if self.threads is not None:
            os.environ.setdefault("OMP_NUM_THREADS", str(self.threads))
        if job.cluster == "local":
            os.environ["RANK"] = str(job.global_rank)
            os.environ["WORLD_SIZE"] = str(job.num_tasks)
            os.environ["LOCAL_RANK"] = str(job.local_rank)
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            os.environ["MASTER_PORT"] = str(self.port)

    def arguments(self) -> list[str]:
        """Complete main.py's command line: a restarted training goes on from its own checkpoint, once there is one."""
        restarted = self.restarted or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        saved = any((Path(self.output_dir) / name).exists() for name in ("checkpoint.pth", "checkpoint_prev.pth"))
        resume = restarted and saved and "--eval" not in self.argv
        return [*self.argv, "--resume", "auto"] if resume else self.argv

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Tell submitit what to run after a requeue."""
        again = copy.copy(self)
        again.restarted = True
        return submitit.helpers.DelayedSubmission(again)

    def _requeue(self, job: submitit.JobEnvironment) -> None:
        """Leave without a result, after having the job requeued if that is for this rank to do."""
        if job.global_rank == 0 and _is_running(job) and not self._told_to_end(job):
            try:
                signal.raise_signal(getattr(signal, f"SIG{job.USR_SIG}"))
            except SystemExit as stop:
                if stop.code == _local_requeue():
                    raise
            except subprocess.CalledProcessError:
                if _is_running(job):  # else the requeue has ended the very command that asked for it
                    raise
        sys.exit(0)  # SystemExit leaves no result file; submitit's own -1 would look like a failed rank

    def _told_to_end(self, job: submitit.JobEnvironment) -> bool:
        """True if a local run got SIGTERM: without a scheduler that is no preemption."""
        marker = Path(self.output_dir) / "stopped.json"
        return job.cluster == "local" and marker.exists() and json.loads(marker.read_text())["reason"] == "SIGTERM"


def _local_requeue() -> int:
    """The exit status by which a task asks submitit's local controller to start it again."""
    from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

    return LOCAL_REQUEUE_RETURN_CODE


def _is_running(job: submitit.JobEnvironment) -> bool:
    """False if Slurm is ending the job by itself (scancel, an outside requeue, a lost node): hands off, then."""
    return job.cluster != "slurm" or slurm_state(job.job_id) in ("RUNNING", "UNKNOWN")


def slurm_state(job_id: str) -> str:
    """Ask squeue, which needs no accounting, for the state of a job.

    Returns:
        Slurm's word; "UNKNOWN" if Slurm does not answer, "GONE" if it has forgotten the job.
    """
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
    states = list(dict.fromkeys(line.strip() for line in done.stdout.splitlines() if line.strip()))
    return next((state for state in states if state not in ENDED), states[0] if states else "GONE")


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
    add(
        "--requeue_on_failure",
        type=options.non_negative_int,
        default=0,
        metavar="N",
        help="start again up to N times after a process was killed or ran out of memory (default: 0)",
    )
    add("--wait", action="store_true", help="until the end; then a failed rank's error is shown, and the status is 1")
    add("--dry_run", action="store_true", help="print what would be submitted")
    add("--skip_data_check", action="store_true", help="for data that only the compute nodes see")
    return parser


def parse(argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Split argv into the flags of submit.py, parsed, and the arguments of main.py.

    Raises:
        UserError: a flag is unknown, contradicts another or does nothing.
    """
    argv = list(argv)
    end = argv.index("--") if "--" in argv else None
    args = build_parser().parse(argv[:end])
    if end is None:
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
        if "array".startswith(pair.partition("=")[0]):  # sbatch takes shortened names
            raise UserError("--sbatch array is refused: this submits one run; submit each with its own --output_dir")
    return args, argv[end + 1 :]


def _check_local(args: Namespace) -> None:
    for name in SLURM_ONLY:
        if getattr(args, name) not in (None, 0):
            raise UserError(f"--{name} has no effect with --cluster {args.cluster}; leave it out")
    if args.nodes > 1:
        raise UserError(f"--cluster {args.cluster} runs on this machine only; leave --nodes out")
    if args.cluster == "debug" and max(args.ngpus, args.tasks_per_node or 1) > 1:
        raise UserError("--cluster debug runs one process; give --ngpus 0 or 1")


def complete(main_argv: Sequence[str], args: Namespace) -> tuple[list[str], Namespace]:
    """Add what a job needs to main.py's arguments; returns them, and what they parse to.

    Raises:
        UserError: whatever main.py would refuse that can be found without the data.
    """
    main_argv = list(main_argv)
    main_args = options.parse_args(main_argv)
    if not main_args.output_dir:  # without one nothing is saved, and a requeued run would start anew
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{main_args.model or 'deit_small'}-{uuid.uuid4().hex[:4]}"
        main_argv += ["--output_dir", str(Path("runs") / name)]
    if args.ngpus == 0 and main_args.device is None:
        main_argv += ["--device", "cpu"]
    main_args = options.parse_args(main_argv)
    check_run(main_args, args.skip_data_check)
    for flag in ("resume", "finetune", "teacher_path"):
        url = getattr(main_args, flag)
        if url and has_credentials(url):  # the job folder keeps the command line
            if args.cluster != "debug":
                print(f"--{flag}: jobs take the downloaded {fetch(url)}: its URL is not for the files of a job")
            main_argv = [word.replace(url, str(fetch(url))) for word in main_argv]
    return main_argv, options.parse_args(main_argv)


def check_run(main_args: Namespace, skip_data: bool = False) -> None:
    """Raise UserError for a model, a merging, a checkpoint or a data path with which main.py could not start."""
    weights = build.Weights(main_args, main_args.model)
    config = build.build_config(main_args, weights)
    merge = options.merge_config(main_args, weights.merge)
    registers = {"num_registers": main_args.num_registers, "register_layer": main_args.register_layer or 0}
    if weights.state is None:  # else the checkpoint decides what fits
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            create_model(weights.name, merge=merge, img_size=config.input_size, num_classes=10, **registers)
        for message in caught:
            print(f"warning: {message.message}")
    if not main_args.eval:
        check_unused(Path(main_args.output_dir).expanduser(), main_args.resume, main_args.overwrite)
    if not skip_data and main_args.dataset in ("IMNET", "IMAGENETTE", "FOLDER"):
        for split in ("val",) if main_args.eval else ("train", "val"):
            if not (data_root(main_args) / split).is_dir():
                raise missing_data(main_args, f"{data_root(main_args) / split} does not exist")


def workers_of(main_args: Namespace) -> int:
    """Return the loader processes to leave room for; a small set will start fewer by default."""
    return MAX_WORKERS if main_args.num_workers is None else int(main_args.num_workers)


# The submission


def build_executor(args: Namespace, main_args: Namespace) -> Any:
    """Build submitit's executor with the job's parameters.

    Raises:
        UserError: there is no Slurm here.
    """
    folder = _job_folder(args, main_args)
    tasks = args.tasks_per_node or max(1, args.ngpus)
    executor: Any
    if args.cluster == "local":
        executor = Namespace(folder=folder, parameters={}) if args.dry_run else submitit.LocalExecutor(folder)
        limits = {"timeout_min": args.timeout, "signal_delay_s": args.signal_delay}
        executor.parameters.update(tasks_per_node=tasks, gpus_per_node=args.ngpus, **limits)
        return executor
    if not args.dry_run and not shutil.which("sbatch"):
        raise UserError("there is no sbatch here; go to a login node of the cluster, or give --cluster local")
    executor_class = _DrySlurm if args.dry_run else submitit.SlurmExecutor
    executor = executor_class(folder, max_num_timeout=10 if args.max_timeouts is None else args.max_timeouts)
    executor.update_parameters(**_slurm_parameters(args, main_args, tasks))
    return executor


class _DrySlurm(submitit.SlurmExecutor):
    """A Slurm executor that also exists where there is no Slurm, to print its script."""

    @classmethod
    def affinity(cls) -> int:
        return 2  # as where srun is found; less than 1 refuses to make an executor


def _slurm_parameters(args: Namespace, main_args: Namespace, tasks: int) -> dict[str, Any]:
    cpus = args.cpus or max(1, workers_of(main_args))
    pairs = [pair.partition("=") for pair in args.sbatch or ()]
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
        "setup": _setup(args, main_args),
        # requeue: also where the cluster's default is not to
        "additional_parameters": {"requeue": True, **{key: value if sep else True for key, sep, value in pairs}},
        **{name: getattr(args, name) for name in ("partition", "constraint", "account", "comment")},
    }
    return {name: value for name, value in parameters.items() if value is not None or name == "wckey"}


def _job_folder(args: Namespace, main_args: Namespace) -> Path:
    return Path(args.job_dir or Path(main_args.output_dir) / "slurm").expanduser().absolute()


def _setup(args: Namespace, main_args: Namespace) -> list[str]:
    """Return the lines of the batch script before srun."""
    lines = SETUP.splitlines() if args.requeue_on_failure else SETUP.splitlines()[:1]
    folder = shlex.quote(str(_job_folder(args, main_args))).replace("%j", "${SLURM_JOB_ID}")
    return [line.replace("@FOLDER@", folder).replace("@TIMES@", str(args.requeue_on_failure)) for line in lines]


def build_rank(args: Namespace, main_argv: list[str], main_args: Namespace) -> Rank:
    """Build what every process of the job runs."""
    threads, port = None, 0
    if args.cluster == "local":
        threads, port = max(1, (os.cpu_count() or 1) // (args.tasks_per_node or max(1, args.ngpus))), _free_port()
    elif args.ngpus == 0:
        threads = args.cpus or max(1, workers_of(main_args))
    folder = str(Path(main_args.output_dir).expanduser().absolute())
    return Rank(main_argv, folder, str(ROOT), threads, port)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def describe(args: Namespace, executor: Any, main_argv: Sequence[str]) -> str:
    """Say what would be submitted: Slurm's script as it would be written, and main.py's command line."""
    lines = [f"job folder: {executor.folder}"] if executor is not None else []
    if args.cluster == "slurm":
        # private, for submitit has no public way to a script without submitting it
        lines.append(executor._make_submission_file_text(executor._submitit_command_str, "").strip())
    elif args.cluster == "local":
        lines += [f"{name}: {value}" for name, value in sorted(executor.parameters.items())]
    lines.append(f"every rank runs: python {shlex.quote(str(ROOT / 'main.py'))} {shlex.join(main_argv)}")
    if "--eval" not in main_argv and args.cluster != "debug":
        lines.append("after a requeue it adds: --resume auto")
    return "\n".join(lines)


def submit(executor: Any, rank: Rank) -> Any:
    """Submit a job; returns submitit's.

    Raises:
        UserError: Slurm refuses the job; in its own words.
    """
    if __name__ != "__main__":  # the job's processes need not find this module
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
    setup_output(executor.folder if "%" not in str(executor.folder) else None, True)  # before Slurm writes logs there
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            return executor.submit(rank)
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"Slurm refuses the job: {' '.join(str(error).split())}") from error


def announce(args: Namespace, job: Any, main_args: Namespace) -> None:
    """Print the job's number, where its results and logs are, and what to type next."""
    logs = job.paths.folder / f"{job.job_id}_RANK_log"
    print(f"job {job.job_id} submitted: {args.nodes} x {job.num_tasks // args.nodes} processes")
    print(f"results: {main_args.output_dir}")
    print(f"logs of each rank: {logs}.out, {logs}.err")
    print(f"follow:  tail -F {shlex.quote(str(job.paths.folder / f'{job.job_id}_0_log.out'))}")
    if args.cluster == "slurm":
        print(f"state:   squeue -j {job.job_id}")
        print(f"save and requeue: scancel --signal=USR2 {job.job_id};  end: scancel {job.job_id}", flush=True)
    else:
        print(f"save and end: kill {job.job_id}", flush=True)


# Waiting

Results = dict[int, tuple[str, Any]]  # rank -> ("success", value) or ("error", traceback), of ranks that have ended


@dataclasses.dataclass(frozen=True)
class Followed:
    """What is known about a job that is followed, besides its number: what its end is told with."""

    output_dir: str = ""
    command: str = ""  # to go on with

    def ways_on(self) -> list[str]:
        """Say what is saved, and how to go on."""
        folder = Path(self.output_dir).expanduser()
        if not self.output_dir or not (folder / "checkpoint.pth").exists():
            return []
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((folder / "checkpoint.pth").stat().st_mtime))
        where = ""
        with contextlib.suppress(OSError, ValueError, KeyError):
            marker = json.loads((folder / "stopped.json").read_text())
            where = f", in epoch {marker['epoch']} after micro-batch {marker['step']}"
        return [f"last good checkpoint: {folder / 'checkpoint.pth'}, of {saved}{where}", f"go on with: {self.command}"]


def job_state(job: Any) -> str:
    return slurm_state(job.job_id) if isinstance(job, submitit.SlurmJob) else job.state


def pending_reason(job: Any) -> str:
    """Return Slurm's word for why a job waits."""
    if not isinstance(job, submitit.SlurmJob):
        return ""
    command = ["squeue", "--noheader", f"--jobs={job.job_id}", "--format=%r"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout.strip().partition("\n")[0]
    return ""


def read_results(job: Any) -> Results:
    """Read what the ranks that have ended left behind.

    By its files, for submitit's `job.results()` asks sacct, which many a cluster does not have.
    """
    paths = {rank: job.task(rank).paths.result_pickle for rank in range(job.num_tasks)}
    return {rank: pickle_load(path) for rank, path in paths.items() if path.exists()}


def wait(job: Any, poll: float = 2.0, followed: Followed | None = None) -> int:
    """Follow a job through its requeues to its end; 0 if every rank succeeded, else 1 after showing the failed rank."""
    followed = followed or Followed()
    state, reason, ending_since, silent_since, results = "", "", 0.0, 0.0, read_results(job)
    while not _all_succeeded(job, results):
        before, state = (state, reason), job_state(job)
        reason = pending_reason(job) if state == "PENDING" else ""
        if (state, reason) != before:
            print(f"job {job.job_id}: {state}{f' ({reason})' if reason not in ('', 'None') else ''}", flush=True)
        if any(word.lower() in reason.lower() for word in NEVER):
            return _give_up(job, f"waits for ever ({reason}): release it by scontrol, or end it: scancel {job.job_id}")
        silent_since = (silent_since or time.monotonic()) if state == "UNKNOWN" else 0.0
        if silent_since and time.monotonic() - silent_since > SILENCE:
            return _give_up(job, "may go on: Slurm has not answered for half an hour")
        results = read_results(job)
        over = state in (*ENDED, "GONE", "FINISHED", "INTERRUPTED")
        # a requeued job's results are of its start before
        failed = state != "PENDING" and any(outcome == "error" for outcome, _ in results.values())
        ending_since = (ending_since or time.monotonic()) if over or failed else 0.0
        if ending_since and (
            (over and failed) or time.monotonic() - ending_since > (GRACE if failed or state == "COMPLETED" else SETTLE)
        ):
            if not over:
                job.cancel(check=False)  # ranks that wait for the failed one
            return report(job, results, state, followed)
        time.sleep(min(poll, 1.0) if ending_since else poll)
    print(f"job {job.job_id}: done")
    return 0


def _give_up(job: Any, why: str) -> int:
    print(f"submit.py: job {job.job_id} {why}", file=sys.stderr)
    return 1


def _all_succeeded(job: Any, results: Results) -> bool:
    return len(results) == job.num_tasks and all(outcome == "success" for outcome, _ in results.values())


def report(job: Any, results: Results, state: str, followed: Followed | None = None) -> int:
    """Show the rank that failed first, and how to go on.

    That is one with an error of its own, or one that was killed, which leaves no result; those that lost contact with
    it are not to blame.
    """
    lines = (followed or Followed()).ways_on()
    errors = {rank: str(text) for rank, (outcome, text) in results.items() if outcome == "error"}
    # main.py prints its own errors in one line of the log; any other has its traceback in the result
    texts = {r: _error_log(job, r) if RunFailed.__name__ in text else text for r, text in errors.items()}
    own = [rank for rank, text in texts.items() if not LOST_CONTACT.search(text)]
    missing = [rank for rank in range(job.num_tasks) if rank not in results]
    killed = first_killed(job)
    if own:
        return _show(job, own[0], f"failed on rank {own[0]} of {job.num_tasks}", texts[own[0]], lines)
    if state in ("CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL") and not errors:
        return _show(job, 0, f"ended as {state}", "", lines)
    if killed is not None:
        rank, node, cause = killed
        return _show(job, rank, f"failed: rank {rank} of {job.num_tasks} on {node} {cause}", "", lines)
    if errors and missing:
        cause = "left no result: it was killed, most likely because memory ran out"
        return _show(job, missing[0], f"failed: rank {missing[0]} of {job.num_tasks} {cause}", "", lines)
    if errors:
        rank = min(texts)
        return _show(job, rank, f"failed on rank {rank} of {job.num_tasks}", texts[rank], lines)
    silent = missing[0] if missing else 0
    event = f"ended as {state} without a result of rank {silent}"
    return _show(job, silent, event, _error_log(job, silent), lines)


def first_killed(job: Any) -> tuple[int, str, str] | None:
    """Return rank, node and cause of the first process that srun saw end, if it did not end by itself."""
    path = job.task(0).paths.stderr
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = text.rpartition(START)[2].splitlines()
    found = (re.fullmatch(r"srun: error: (\S+): tasks? (\d+)[\d,-]*: (.+)", line.strip()) for line in lines)
    first = next((match for match in found if match), None)
    if first is None or first[3].startswith("Exited"):
        return None
    memory = "ask for more with --mem, or lower --batch_size or --num_workers of main.py"
    causes = {
        "Killed": f"was killed (SIGKILL), most likely because memory ran out: {memory}",
        "Out Of Memory": f"ran out of memory: {memory}",
        "Bus error": "was killed (SIGBUS), most likely because shared memory is full: lower --num_workers of main.py",
    }
    word = first[3].partition(" (core dumped)")[0]
    return int(first[2]), first[1], causes.get(word, f"was ended: {word}")


def _error_log(job: Any, rank: int) -> str:
    """Return a rank's error log without submitit's lines and traceback; main.py's own error alone, if any."""
    path = job.task(rank).paths.stderr
    text = path.read_text(errors="replace") if path.exists() else ""
    text = text.partition("submitit ERROR")[0] or text
    lines = [line for line in text.splitlines() if not line.startswith("submitit ")]
    return "\n".join([line for line in lines if line.startswith("main.py: error")][-1:] or lines)


def _show(job: Any, rank: int, event: str, text: str, lines: Sequence[str] = ()) -> int:
    paths = job.task(rank).paths
    print(f"submit.py: job {job.job_id} {event}; logs: {paths.stdout}, {paths.stderr}", file=sys.stderr)
    if text:
        print(error_excerpt(text), file=sys.stderr)
    for line in lines:
        print(f"submit.py: {line}", file=sys.stderr)
    sys.stderr.flush()
    return 1


def error_excerpt(text: str) -> str:
    """The part of a failed rank's text that tells why: a traceback from its beginning on, however long the chain of its
    errors is, for the first is the cause; the last lines of a text without one."""
    lines = text.strip().splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("Traceback")), max(0, len(lines) - TAIL))
    return "\n".join(lines[start:])


def followed_job(argv: Sequence[str], main_argv: Sequence[str], main_args: Namespace) -> Followed:
    """Return what the end of a job is told with."""
    words = [word for word in main_argv if word != "--overwrite"]
    words += [] if main_args.resume == "auto" or main_args.eval else ["--resume", "auto"]
    flags = argv[: list(argv).index("--")]
    return Followed(main_args.output_dir, shlex.join(["python", "run/submit.py", *flags, "--", *words]))


def run(argv: Sequence[str]) -> int:
    """Submit, and with --wait follow the job to its end."""
    args, main_argv = parse(argv)
    main_argv, main_args = complete(main_argv, args)
    executor = build_executor(args, main_args) if args.cluster != "debug" else None
    if args.dry_run:
        print(describe(args, executor, main_argv))
        return 0
    setup_output(main_args.output_dir, True)
    if executor is None:
        return program.main(main_argv)
    job = submit(executor, build_rank(args, main_argv, main_args))
    announce(args, job, main_args)
    try:
        return wait(job, followed=followed_job(argv, main_argv, main_args)) if args.wait else 0
    except KeyboardInterrupt:
        print("submit.py: interrupted; the job goes on", file=sys.stderr)
        return INTERRUPTED_STATUS


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0, 1 after a failed job with --wait, 2 the user's mistake."""
    return options.exit_status("submit.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
