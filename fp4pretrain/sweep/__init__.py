"""Several runs of one command: all are composed and checked first, then trained. One that fails does not
stop the others.

planning    overrides -> runs, each in a folder of its own; what cannot be meant costs its own run
standing    what a run's folder already holds: nothing, a part, or the finished run
engine      trains what is left, by the launcher that was asked for; ``train_all``
processes   several runs at once on this machine
slurm       each run as a Slurm job
starting    how a run is handed to processes of its own: start.yaml, output.log
progress    "run 3 of 8" with the time left
summary     the table, the picture and the page at the end
replicates  runs that differ in chance alone, for ``fp4pretrain noise``
"""

from fp4pretrain.sweep.engine import train_all
from fp4pretrain.sweep.planning import Outcome, Planned

__all__ = ["Outcome", "Planned", "train_all"]
