"""The ranks of a job: processes that an MPI launcher started and that train as one.

One thread of each process makes all calls of MPI. What is to be communicated is handed to it as a
generator that starts non-blocking operations and yields while they are under way. It calls often
while some are, since hardly anything moves between two calls, and it never waits inside one: so it
also notices when another rank gives no sign of life.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import AnepyError, ConfigError
from ..native.info import library_info
from ..system import launcher
from ..system.version import __version__

T = TypeVar("T")
Steps = Generator[bool, None, T]  # what it yields: whether something was done
Values = npt.NDArray[np.float64]

STALL_S = 20.0  # without a sign of life a rank counts as lost
_BEAT_S = 1.0
_POLL_S = 0.05  # between looks at signs of life
_NAP_S = 2e-5, 1e-3  # between calls while operations are under way: at first, at most
_FIRST_S = 1.5  # rank 0 is the first to tell what went wrong on all of them
_WIDTH = 16  # numbers of a `gather`, the first of which says what it is for
_TEXT = 16384  # bytes of a `texts`
_LAST_BEAT = -1.0
KINDS = ("", "close", "step", "update", "evaluate", "save", "texts", "settled")


class Job(Generic[T]):
    """Communication under way; `wait` returns its result.

    Attributes:
        awaited: whether somebody waits for it.
    """

    def __init__(self, steps: Steps[T]) -> None:
        self.steps = steps
        self._done = threading.Event()
        self._result: T | None = None
        self.awaited = False

    def advance(self) -> bool | None:
        """Make the next calls; return whether something was done, None at the end."""
        try:
            return next(self.steps)
        except StopIteration as end:
            self._result = end.value
            self._done.set()
            return None

    def wait(self) -> T:
        """Return the result as soon as it is there."""
        self.awaited = True
        self._done.wait()
        return self._result  # type: ignore[return-value]


class Ranks:
    """The processes of this job, as one of them sees them. Make it once, in all of them.

    An exception that leaves the `with` block, or the script, ends the job on all ranks, and so does
    a rank that gives no sign of life for `STALL_S` seconds: with one line that names the rank.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        host: name of the computer.
        library: name and version of the MPI library.
        mpi: the module `mpi4py.MPI`.
        bulk: communicator for gradients and weights; only jobs may use it.

    Raises:
        ConfigError: mpi4py is missing, or belongs to another MPI than the launcher.

    Example:
        >>> with Ranks() as ranks, Trainer("model.bin", "data.bin", ranks=ranks) as trainer:
        ...     for report in trainer:
        ...         print(report.loss) if ranks.first else None
    """

    def __init__(self) -> None:
        self.mpi = _load()
        world = self.mpi.COMM_WORLD
        self.rank: int = world.Get_rank()
        self.size: int = world.Get_size()
        self.host: str = socket.gethostname()
        self.library = " ".join(self.mpi.Get_library_version().split()[:3]).strip(",")
        self._world, self.bulk = world, world.Dup()
        self._control, self._beats = world.Dup(), world.Dup()
        self._posted: deque[Job[Any]] = deque()
        self._wake = threading.Event()
        self._closing = self._closed = False
        self._aborting = threading.Lock()
        self._heard = time.monotonic()
        self._hook = sys.excepthook
        sys.excepthook = self._uncaught
        atexit.register(self.close)  # before MPI ends, which mpi4py registered earlier
        self._thread = threading.Thread(target=self._serve, name="anepy-mpi", daemon=True)
        self._thread.start()
        self.hosts = [str(each["host"]) for each in self.texts({"host": self.host})]

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and shows the run."""
        return self.rank == 0

    def name(self, rank: int) -> str:
        """Return what messages call a rank."""
        return f"rank {rank} of {self.size} ({self.hosts[rank]})"

    # What all ranks do together

    def post(self, steps: Steps[T]) -> Job[T]:
        """Start communication; all ranks start the same, in one order for each communicator."""
        job = Job(steps)
        self._posted.append(job)
        self._wake.set()
        return job

    def gather(self, kind: str, values: Sequence[float] = ()) -> Values:
        """Return the numbers of all ranks, float64 (size, 15), which all get alike.

        Args:
            kind: one of `KINDS`: ranks that are not at the same place end the job.
            values: up to 15 numbers; the rest is 0.
        """
        return self.post(self.gathering(kind, values)).wait()

    def gathering(self, kind: str, values: Sequence[float]) -> Steps[Values]:
        """Gather as `gather` does; for jobs."""
        sent, received = np.zeros(_WIDTH), np.zeros((self.size, _WIDTH))
        sent[0], sent[1 : 1 + len(values)] = KINDS.index(kind), values
        yield from waiting(self._control.Iallgather(sent, received))
        self._same_place(received[:, 0])
        return received[:, 1:]

    def texts(self, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return what all ranks pass, as JSON can hold it."""
        return self.post(self._texts(facts)).wait()

    def _texts(self, facts: Mapping[str, Any]) -> Steps[list[dict[str, Any]]]:
        sent, received = np.zeros(_TEXT, np.uint8), np.zeros((self.size, _TEXT), np.uint8)
        text = json.dumps(facts).encode()
        sent[: len(text)] = np.frombuffer(text, np.uint8)
        yield from self.gathering("texts", ())
        yield from waiting(self._control.Iallgather(sent, received))
        return [json.loads(bytes(row).rstrip(b"\0")) for row in received]

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Compare what must be the same on all ranks.

        Raises:
            ConfigError: on all of them, naming the first rank that differs and in what.
        """
        ours: dict[str, Any] = {"anepy": __version__}
        info = library_info()
        ours |= {"ABI": info["abi"], "library": info["build_id"]} | dict(facts)
        everyone = self.texts(ours)
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    raise ConfigError(
                        f"{self.name(rank)} differs from rank 0 in {name}: {theirs.get(name)} "
                        f"instead of {value}; give all ranks the same"
                    )

    def threads(self, wanted: int | None) -> tuple[int | None, str]:
        """Return how many threads this rank is to use, and a line that says why.

        Ranks of one host that may run on the same CPUs divide what each would take alone.

        Args:
            wanted: as the user said; None: decide.
        """
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [-1]
        alone = library_info()["threads"]
        here = {"host": self.host, "cpus": cpus, "wanted": wanted, "alone": alone}
        everyone = self.texts(here)
        decided = []
        for own in everyone:
            others = [e for e in everyone if e["host"] == own["host"]]
            sharing = sum(1 for e in others if set(e["cpus"]) & set(own["cpus"]))
            decided.append(own["wanted"] or max(1, own["alone"] // sharing))
        hosts = len({e["host"] for e in everyone})
        counts = sorted({str(n) for n in decided})
        text = f"{self.size} ranks on {hosts} host{'s' * (hosts > 1)} ({self.library}), "
        text += f"{' to '.join([counts[0], counts[-1]][: len(counts)])} thread"
        text += f"{'s' * (counts != ['1'])} each: "
        own, total = everyone[0], os.cpu_count() or 1
        neighbours = sum(1 for e in everyone if e["host"] == own["host"])
        if wanted is not None:
            text += "as asked for"
        elif len(own["cpus"]) < total and hasattr(os, "sched_getaffinity"):
            text += f"the launcher binds rank 0 to {len(own['cpus'])} of {total} CPUs"
            if neighbours < total:
                text += " (--bind-to none lifts that)"
        elif neighbours > 1:
            text += f"those of a host share its {total} CPUs"
        else:
            text += "each has its host for itself"
        return decided[self.rank], text

    # The thread that makes the calls

    def _serve(self) -> None:
        try:
            jobs: list[Job[Any]] = [Job(self._watch())]
            nap = _NAP_S[0]
            while jobs:
                while self._posted:
                    jobs.append(self._posted.popleft())
                moved = False
                for job in list(jobs):
                    went = job.advance()
                    if went is None:
                        jobs.remove(job)
                    moved |= went is not False
                if moved:
                    nap = _NAP_S[0]
                elif len(jobs) > 1:
                    time.sleep(nap)
                    # While somebody waits, nothing is computed that calls would keep from a core.
                    awaited = any(job.awaited for job in jobs)
                    nap = min(1.2 * nap, _NAP_S[0 if awaited else 1])
                elif not self._posted:
                    self._wake.wait(_POLL_S)
                    self._wake.clear()
        except BaseException as error:
            if not isinstance(error, AnepyError):
                traceback.print_exc()
            self.abort(str(error) or type(error).__name__)

    def _watch(self) -> Steps[None]:
        """Tell the next rank that this one lives, and listen to the one before."""
        if self.size == 1:
            while not self._closing:
                yield False
            return
        before, after = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        beat, heard = np.ones(1), np.zeros(1)
        listening = self._beats.Irecv(heard, before)
        sending = self._beats.Isend(beat, after)
        sent = looked = self._heard = time.monotonic()
        parent = os.getppid()
        bidding = ended = False
        while not (ended and bidding and sending.Test()):
            now = time.monotonic()
            if now - looked < _POLL_S and not self._closing:
                yield False
                continue
            if now - looked > STALL_S / 4:
                self._heard = now  # this process was stopped itself
            looked = now
            if os.getppid() != parent:
                os._exit(1)  # the launcher is gone, and nobody else would end this process
            if not ended and listening.Test():
                self._heard, ended = now, bool(heard[0] == _LAST_BEAT)
                if not ended:
                    listening = self._beats.Irecv(heard, before)
            if not ended and now - self._heard > STALL_S:
                raise ConfigError(
                    f"{self.name(before)} has given no sign of life for {STALL_S:g} s"
                )
            if not bidding and (self._closing or now - sent > _BEAT_S) and sending.Test():
                bidding = self._closing
                beat[0] = _LAST_BEAT if bidding else 1.0
                sending, sent = self._beats.Isend(beat, after), now
            yield False

    def _same_place(self, kinds: Values) -> None:
        for rank, kind in enumerate(kinds):
            if kind != kinds[0]:
                one, other = KINDS[int(kinds[0])], KINDS[int(kind)]
                raise ConfigError(f"{self.name(rank)} is at '{other}' while rank 0 is at '{one}'")

    # The end

    def close(self) -> None:
        """Leave the job together with all other ranks; may be called twice."""
        if self._closed:
            return
        self._closed = True
        sys.excepthook = self._hook
        atexit.unregister(self.close)
        self.gather("close")
        self._closing = True
        self._wake.set()
        self._thread.join()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None:
            self.close()
            return
        if not isinstance(error, AnepyError):
            traceback.print_exception(error)
        self._fail(error)

    def _uncaught(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        self._hook(kind, error, trace)
        self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self.first:
            time.sleep(_FIRST_S)
        who = "" if self.first else f"{self.name(self.rank)}: "
        self.abort(who + (" ".join(str(error).split()) or type(error).__name__))

    def abort(self, reason: str) -> None:
        """End the job on all ranks, with a line that says why. Does not return."""
        if not self._aborting.acquire(blocking=False):
            time.sleep(2 * _FIRST_S)  # another thread of this process is at it
            os._exit(1)
        with contextlib.suppress(OSError):
            print(f"anepy: error: {reason}", file=sys.stderr, flush=True)
        last = threading.Timer(5.0, os._exit, (1,))
        last.daemon = True
        last.start()
        self._world.Abort(1)
        os._exit(1)


def waiting(request: Any) -> Steps[None]:
    """Yield until a request is complete."""
    while not request.Test():
        yield False


def started() -> Ranks | None:
    """Return the ranks of this job; None if no launcher started it, or one process only.

    MPI is loaded only then.

    Raises:
        ConfigError: as `Ranks` says.
    """
    found = launcher.launch()
    return Ranks() if found is not None and found.size > 1 else None


def _load() -> Any:
    found = launcher.launch()
    told = f" ({found.variable}={found.size})" if found is not None else ""
    try:
        mpi = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"an MPI launcher started this{told}, but mpi4py does not load ({reason}): "
            "pip install 'anepy[mpi]', with the MPI of the launcher"
        ) from error
    if found is not None and found.size > 1 and mpi.COMM_WORLD.Get_size() == 1:
        raise ConfigError(
            f"the launcher started {found.size} processes{told}, but mpi4py has another MPI "
            f"({mpi.Get_library_version().split(',')[0].strip()}): use the launcher of that one"
        )
    if mpi.Query_thread() < mpi.THREAD_SERIALIZED:
        raise ConfigError("this MPI allows calls from the main thread only: use another one")
    return mpi
