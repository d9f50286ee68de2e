"""The commands of run/analyze.py: a new instrument is a module and its name here, twice."""

from . import attention, dynamics_command, lost_command, norms, probes_command, report, similarity, ttr

# modules with `add_parser(subparsers)`, in the order of --help
COMMANDS = (attention, dynamics_command, lost_command, norms, probes_command, report, similarity, ttr)
