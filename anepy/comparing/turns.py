"""Variants that take turns: in this process, or in one of their own.

Where a process may compile only so many programs, every group of variants gets a fresh one. It is
`python -m anepy.comparing.turns`, and a pipe goes between.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from ..engine.engine import Engine
from ..errors import AnepyError
from ..models.model import Model
from ..native import find
from ..text.data import Sampler, TokenData
from ..training.loop import Loop
from .config import CompareConfig
from .result import Group, Run

# After its last task a thread pool spins for a few ms; the next engine must not pay for that.
_SETTLE_S = 0.02
# Seconds between two looks at whether to stop a process of its own.
_ASK_S = 0.2

# Told the number of a round, 0 for the warm-up, and whose turn it is.
Tell = Callable[[int, str], None]
Stop = Callable[[], bool]


@dataclass
class Job:
    """What every variant is given.

    Attributes:
        config: settings.
        base: the weights all begin with.
        data: the tokens all see.
        seq: tokens per sequence.
    """

    config: CompareConfig
    base: Model
    data: TokenData
    seq: int


class Contestant:
    """A variant at work: its engine, its weights, its place in the data."""

    def __init__(self, run: Run, job: Job) -> None:
        config = job.config
        self.run = run
        model = Model(job.base.config)
        model.arena[...] = job.base.arena
        self.engine = Engine(
            model, run.variant, config.device, config.precision, job.seq, config.threads
        )
        self._loop = Loop(self.engine, Sampler(job.data, job.seq, config.seed), config)
        run.switches = list(self.engine.switches)
        try:
            self.engine.reserve(config.batch)  # turns begin with the memory they need
            run.memory = 4 * model.arena.nbytes + self.engine.memory
        except BaseException:
            self.engine.close()
            raise

    def turn(self, number: int, steps: int, stop: Callable[[], bool]) -> bool:
        """Make steps, the last of them followed by an update; False if stopped before.

        Raises:
            DivergedError: a loss or gradient is not finite.
        """
        for index in range(steps):
            stats, wall_ms = self._loop.step()
            _append(self.run.steps, round=number, wall_ms=wall_ms, **_numbers(stats))
            last = index == steps - 1
            if (update := self._loop.update(last)) is not None:
                stats_of_update, wall_ms = update
                _append(
                    self.run.updates, round=number, wall_ms=wall_ms, **_numbers(stats_of_update)
                )
            if not last and stop():
                return False
        return True


def _numbers(stats: Any) -> dict[str, float]:
    return {name: float(value) for name, value in asdict(stats).items()}


def _append(table: dict[str, list[float]], **values: float) -> None:
    for name, value in values.items():
        table.setdefault(name, []).append(float(value))


@contextlib.contextmanager
def _kept(run: Run) -> Iterator[None]:
    """Note in a run why it failed, so that the other runs can go on."""
    try:
        yield
    except AnepyError as error:
        run.error = str(error)
    except MemoryError:
        run.error = "there is not enough memory"


def rotated(count: int, round_: int) -> list[int]:
    """Return the order of turns in a round: each begins one further than in the round before."""
    return [(round_ + index) % count for index in range(count)]


def take_turns(
    group: Group, job: Job, tell: Tell, stop: Stop, alive: dict[int, Contestant] | None = None
) -> bool:
    """Let the runs of a group take turns and keep what they measure.

    Args:
        group: its runs are filled.
        job: what all of them are given.
        tell: called before every turn.
        stop: asked after every step.
        alive: contestants that exist already, by their index; all are closed at the end.

    Returns:
        Whether it came to its end; False if stopped.
    """
    config = job.config
    alive = {} if alive is None else alive
    try:
        for index, run in enumerate(group.runs):
            with _kept(run):
                if index not in alive:
                    alive[index] = Contestant(run, job)
        for round_ in range(-1 if config.warmup else 0, config.rounds):
            order = rotated(len(group.runs), max(0, round_))
            if round_ >= 0:
                group.orders.append(order)
            for index in order:
                if stop():
                    return False
                run = group.runs[index]
                tell(round_ + 1, run.label)
                if index not in alive:
                    continue
                time.sleep(_SETTLE_S)
                with _kept(run):
                    steps = config.warmup if round_ < 0 else config.steps
                    if not alive[index].turn(round_, steps, stop):
                        return False
                    run.rounds = round_ + 1
                if run.error:
                    alive.pop(index).engine.close()
        return True
    finally:
        for contestant in alive.values():
            contestant.engine.close()


def take_turns_apart(group: Group, job: Job, tell: Tell, stop: Stop) -> bool:
    """Let the runs of a group take turns in a new process, as `take_turns` does in this one.

    Arguments and result are those of `take_turns`. If the process dies, each run says so.
    """
    ours, theirs = Pipe()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "anepy.comparing.turns", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # Ctrl-C is for this process, which passes it on.
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        try:
            stopping = False
            ours.send((group, job))
            while True:
                if not stopping and stop():
                    stopping = True
                    ours.send("stop")
                if not ours.poll(_ASK_S):
                    continue
                message = ours.recv()
                if message[0] == "turn":
                    tell(*message[1:])
                    continue
                _, found, complete = message
                group.runs[:], group.orders[:] = found.runs, found.orders
                return bool(complete)
        except (EOFError, ConnectionError):
            code = process.wait()
            for run in group.runs:
                run.error = f"the process that measured this group ended with code {code}"
            return True
        finally:
            ours.close()
            process.wait()


def _main(descriptor: int) -> None:
    """Take turns in a process of its own: `descriptor` is the pipe to the one that started it."""
    find.notify = lambda line: None  # the parent has said it
    # A parent that has gone needs no answer.
    with Connection(descriptor) as parent, contextlib.suppress(ConnectionError):
        group, job = parent.recv()

        def tell(round_: int, label: str) -> None:
            parent.send(("turn", round_, label))

        # Whatever the parent sends from now on, or its end, means stop.
        complete = take_turns(group, job, tell, parent.poll)
        parent.send(("end", group, complete))


if __name__ == "__main__":
    _main(int(sys.argv[1]))
