"""A run that is killed again and again, beside one that is not: `python killed.py RECIPE SEED KILLS`.

The recipe's run is made once without disturbance and moved to `<output>-whole`. Then it is made anew in processes that
kill themselves (SIGKILL) at moments drawn from the seed, until one comes to its end; and all of that again until there
were enough kills, each of these runs in `<output>-<n>`. Moments are counted in events: a step of the optimiser, a file
opened, renamed or removed while training (saving), or under an `answers` folder (asking). Prints a line of JSON a kill.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import traceback
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm import tqdm

from smolora.recipe import load_recipe
from smolora.train.run import TrainingRun

KINDS = {"step": 5, "save": 25, "ask": 12}  # kind of event: how many to draw from
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


class Killer:
    """Kills this process at the n-th event of a kind, or within 20 ms after it."""

    def __init__(self, folder: Path, kind: str, number: int, delay: float) -> None:
        self.folder, self.kind, self.left, self.delay = str(folder), kind, number, delay
        register_optimizer_step_post_hook(lambda *_: self.event("step"))
        sys.addaudithook(self.audit)

    def audit(self, name: str, args: tuple) -> None:
        if name in FILE_EVENTS and isinstance(args[0], (str, Path)) and str(args[0]).startswith(self.folder):
            self.event("ask" if "/answers" in str(args[0]) else "save")

    def event(self, kind: str) -> None:
        if kind != self.kind:
            return
        self.left -= 1
        if self.left == 0:
            if self.delay:
                threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            else:
                os.kill(os.getpid(), signal.SIGKILL)


def in_child(recipe, moment: tuple[str, int, float] | None) -> int:
    """Run in a process of its own; how it ended: 0, or minus the signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        tqdm.set_lock(threading.RLock())  # its own, or it may die with the one that the next run needs
        if moment is not None:
            Killer(recipe.folder, *moment)
        TrainingRun(recipe)()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(path: str, seed: int, kills: int) -> None:
    recipe = load_recipe(path)
    assert in_child(recipe, None) == 0
    recipe.folder.rename(f"{recipe.folder}-whole")
    draw = random.Random(seed)
    done, runs = 0, 0
    while done < kills:
        while True:
            moment = None
            if done < kills:
                kind = list(KINDS)[done % len(KINDS)]
                moment = (kind, draw.randint(1, KINDS[kind]), draw.choice((0, 0, 0.005, 0.02)))
            status = in_child(recipe, moment)
            if status == 0:
                break
            assert status == -signal.SIGKILL, status
            done += 1
            print(json.dumps({"run": runs, "killed at": moment}), flush=True)
        recipe.folder.rename(f"{recipe.folder}-{runs}")
        runs += 1


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
