"""A recipe's run on the processes of a launcher: `torchrun --nproc-per-node 2 two_ranks.py RECIPE [key=value ...]`."""

from __future__ import annotations

import sys

from smolora.recipe import load_recipe
from smolora.train.run import TrainingRun

if __name__ == "__main__":
    TrainingRun(load_recipe(sys.argv[1], sys.argv[2:]))()
