"""The training loop: sampling, accumulation, updates, evaluation, checkpoints. Prints nothing.

`Trainer` is an iterator of `StepReport`; whoever iterates decides what to show, when to save
and when to stop. A stop between two steps loses nothing: `save_checkpoint` stores accumulated
gradients and the sampler's position, and a resumed run continues bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.engine import Engine
from ..engine.evaluation import mean_loss, sequence_losses
from ..engine.flops import flops_per_step
from ..engine.shared import SharedEngine
from ..errors import CheckpointError, ClosedError, ConfigError
from ..models.lora import Lora
from ..models.model import Model, sequence_length
from ..models.storage import StoredTensors
from ..models.stored_tokenizer import from_json
from ..models.views import Array
from ..system.interrupts import Uninterrupted
from ..system.version import __version__
from ..text.data import Sampler, TokenData, windows
from ..text.document_windows import DocumentSampler, evaluation_windows
from . import checkpoint
from .config import TrainConfig
from .loop import Loop
from .needs import check_batch, check_memory
from .parallel import ParallelLoop, alike
from .ranks import Ranks
from .reports import Measurements, StepReport, Summary
from .resuming import check_moments, differences


class Trainer:
    """Train a model on tokens, one `StepReport` per step.

    Iterating trains until `config.steps` and then frees the engine, whose memory is three times
    that of the trained weights and more. In a `with` block the engine lives until the end of the
    block, to evaluate or save a checkpoint after the last step. The model keeps its weights either
    way.

    A process may compile only so many programs for the Neural Engine. When it has, the iteration
    raises `CompileBudgetError` before the step that would need more; nothing is lost then, and a
    run that is resumed from `save_checkpoint` in a new process goes on bit for bit.

    Args:
        model: a `Model`, whose weights are trained in place, or the path of one.
        data: a `TokenData` or the path of one.
        config: settings; the defaults of `TrainConfig` if None.
        resume: checkpoint to continue from, a path or one that is open, which stays the caller's to
            close. Its weights, moments, accumulated gradients and
            sampler position replace those of `model`; differences between its settings and
            `config` follow `config` and are told in `notes`. Only the seed is the file's, and the
            frozen tensors have to be.
        restarted: the checkpoint is of this very run, which goes on in a new process: times and
            counts are added to those it carries.
        lora: an adapter to train on, instead of the new one that `config.lora` asks for.
        validation: tokens to evaluate on, or the path of a file, instead of a part of the data.
        ranks: the processes of an MPI job, all of which make a trainer with the same arguments:
            they train as one, with as many times the `batch`.

    Attributes:
        config: the settings.
        model: what is trained, or what the adapter is added to. One without a tokenizer gets that
            of the data, if it was trained for them.
        lora: the adapter that is trained; None if the model is.
        seq: tokens per sequence.
        data: the tokens trained on.
        held_out: the tokens to evaluate on; None if there are none.
        best: loss and step of the best evaluation; None before the first.
        ended: why the run ended before its last step, in words; "" if it did not.
        source: where model and data came from, for checkpoints.
        notes: what a resumed run does differently from the saved one, one line each.
        ranks: the processes that train as one; None if there is this one only.
        ranks_note: threads of each of them, and why, in words; "" without others.
        asked: returns the number of a signal that asks to stop; 0, as it does at first: none.
        start_step: steps done by the run that is resumed, else 0.

    Raises:
        ConfigError: a setting is out of range, or cannot be had on this device or with this data;
            no weight is changed then, nor in the next case.
        ModelError, DataError, CheckpointError: a file is unusable or does not fit.
        CompileBudgetError: this process may compile no more programs.
        NativeError: the system gives no memory, or the device fails.

    Example:
        >>> for report in Trainer("stories260K.bin", "data.bin", TrainConfig(steps=20)):
        ...     print(report.step, report.loss)
        >>> with Trainer("stories260K.bin", "data.bin", TrainConfig(steps=20)) as trainer:
        ...     losses = [report.loss for report in trainer]
        ...     trainer.save_checkpoint("run.npz")
    """

    def __init__(
        self,
        model: Model | str | Path,
        data: TokenData | str | Path,
        config: TrainConfig | None = None,
        resume: str | Path | checkpoint.Checkpoint | None = None,
        restarted: bool = False,
        lora: Lora | None = None,
        validation: TokenData | str | Path | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config if config is not None else TrainConfig()
        self.config.validate()
        if self.config.held_out and validation is not None:
            raise ConfigError("held_out and validation data exclude each other: give one of them")
        if self.config.eval_every and not self.config.held_out and validation is None:
            raise ConfigError(
                "eval_every needs something to evaluate on: set held_out, for example to 0.05, or "
                "give validation data"
            )
        with contextlib.ExitStack() as opened:
            if resume is not None and not isinstance(resume, checkpoint.Checkpoint):
                resume = opened.enter_context(checkpoint.Checkpoint(resume))
            self._prepare(model, data, resume, restarted, lora, validation, ranks)

    def _prepare(
        self,
        model: Model | str | Path,
        data: TokenData | str | Path,
        resume: checkpoint.Checkpoint | None,
        restarted: bool,
        lora: Lora | None,
        validation: TokenData | str | Path | None,
        ranks: Ranks | None,
    ) -> None:
        """Load everything, and go on where a checkpoint is."""
        self._counts = 0, 0  # updates and compilations when it was closed
        self.source: dict[str, Any] = {}
        if not isinstance(model, Model):
            self.source["model"] = os.path.abspath(model)
            model = Model.load(model, self.config.base or "f32")
        elif self.config.base not in (None, model.storage):
            model = model.stored(self.config.base)
        self.model = model
        self.lora = self._adapter(lora)
        if isinstance(model.weights, StoredTensors) and self.lora is None:
            raise ConfigError(
                f"the model is stored as {model.storage}, and only float32 is trained: load it "
                "with storage='f32', or train an adapter (lora)"
            )
        self.seq = sequence_length(self.config.seq, model.config.seq_len)
        if not isinstance(data, TokenData):
            data = TokenData(data, self.config.dtype)
        if data.path is not None:
            self.source["data"] = os.path.abspath(data.path)
        self.source["tokens"] = len(data)
        data.check(model.config.vocab_size)
        self.source["crc32"] = data.checksum
        if model.tokenizer is None and data.tokenizer_file is not None:
            model.tokenizer = from_json(data.tokenizer_file)
        check_batch(self.config.batch, self.seq)
        self.data, self.held_out = data.split(self.config.held_out)
        if validation is not None:
            self.held_out = self._validation(validation)
        self.ranks = ranks
        self._held_out_windows: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]] = []
        if self.held_out is not None:
            self._held_out_windows = evaluation_windows(
                self.held_out, self.seq, self.config.eval_windows, self.config.pack
            )
        self._first_window = next(windows(self.data, min(self.seq, max(1, len(self.data) - 1)), 1))
        sampler: Sampler
        if self.config.pack or self.data.mask is not None:
            # Instructions are learned whole: one a window, unless several are packed.
            sampler = DocumentSampler(self.data, self.seq, self.config.seed, self.config.pack)
        else:
            sampler = Sampler(self.data, self.seq, self.config.seed)
        options: dict[str, Any] = {
            "variant": self.config.engine_variant,
            "device": self.config.device,
            "precision": self.config.precision,
            "seq_len": self.seq,
            "threads": self.config.threads,
            "freeze": self.config.freeze,
            "recompute": self.config.recompute,
            "lora": self.lora,
            "optimizer": self.config.optimizer,
            "moments": self.config.moments,
            "defer": resume is not None,  # the weights are not those to compile for yet
        }
        self.ranks_note = ""
        self.asked: Callable[[], int] = lambda: 0
        self._engine: Engine | None
        self._loop: Loop
        self._parallel: ParallelLoop | None = None
        if ranks is None:
            self._engine = Engine(model, **options)
            self._loop = Loop(self._engine, sampler, self.config)
        else:
            options["threads"], self.ranks_note = ranks.threads(self.config.threads)
            shared = SharedEngine(model, **options, sparse=self.config.shard)
            self._engine = shared
            self._loop = self._parallel = ParallelLoop(shared, sampler, self.config, ranks)
            self._parallel.asked = lambda: self.asked()
            self._parallel.late = lambda: self._measured.minutes_over(self.config.minutes)
        self._base: int | None = None
        self.best: tuple[float, int] | None = None
        self.ended = ""
        self._worse = 0  # evaluations since the best one
        self._in_block = False
        self.notes: list[str] = []
        if isinstance(sampler, DocumentSampler) and sampler.cut:
            self.notes.append(f"{sampler.cut} documents are longer than {self.seq} tokens and cut")
        if data.vocab_size not in (None, model.config.vocab_size):
            self.notes.append(
                f"{data.name} was prepared for a vocabulary of {data.vocab_size}, the model has "
                f"{model.config.vocab_size}"
            )
        self._unevaluated: StepReport | None = None
        self._flops = self.flops["total"]
        self._measured = Measurements(self._flops)
        try:
            check_memory(self._engine, self.config.batch)
            if resume is not None:
                self._restore(resume, restarted)
            self.start_step = self._loop.steps
            if ranks is not None:
                settings = asdict(self.config) | self.engine_settings() | {"seq": self.seq}
                settings |= {"step": self.start_step, "data": self.source}
                ranks.agree(alike(self._engine, self.held_out, settings))
        except BaseException:
            self.close()
            raise

    # The engine and what is derived from it

    @property
    def engine(self) -> Engine:
        """Return the engine that trains; it is closed with the trainer.

        Raises:
            ClosedError: it is closed already.
        """
        if self._engine is not None:
            return self._engine
        if not self.finished:
            raise ClosedError("this Trainer is closed: make another one")
        raise ClosedError(
            f"this Trainer has made its {self._loop.steps} steps and closed its engine: iterate "
            "in `with Trainer(...) as trainer:` to evaluate or save a checkpoint after the last one"
        )

    @property
    def flops(self) -> dict[str, int]:
        """Return what `flops_per_step` says of a step of this run."""
        config = self.config
        return flops_per_step(self.model.config, self.seq, config.batch, config.freeze, self.lora)

    @property
    def steps_done(self) -> int:
        """Return the number of steps done since the very first one."""
        return self._loop.steps

    @property
    def finished(self) -> bool:
        """Return whether all steps are done, or time or patience is over."""
        return self._loop.steps >= self.config.steps or bool(self.ended)

    @property
    def _total(self) -> int:
        return 0 if self.config.endless else self.config.steps

    def clock(self) -> float:
        """Return `time.monotonic`; of several ranks that of rank 0 after the last step."""
        return time.monotonic() if self._parallel is None else self._parallel.clock

    @property
    def stopped(self) -> int:
        """The signal that asked to stop, or any of several ranks in the last step; 0: none."""
        return self.asked() if self._parallel is None else self._parallel.signal

    @property
    def losses(self) -> Sequence[float]:
        """Return the losses of the last steps, those before a resume included."""
        return self._measured.losses

    def close(self) -> None:
        """Free the engine; the model keeps its weights. May be called twice."""
        if self._engine is not None:
            self._counts = self._engine.updates, self._engine.compiles
            self._engine.close()
            self._engine = None

    def __enter__(self) -> Trainer:
        self._in_block = True
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _adapter(self, given: Lora | None) -> Lora | None:
        """Return the adapter to train: what was given, or a new one if the settings ask for it."""
        config = self.config
        if given is None:
            return (
                Lora(config.rank, config.alpha, config.targets, config.seed)
                if config.lora
                else None
            )
        self.config = replace(
            config, lora=True, rank=given.rank, alpha=given.alpha, targets=given.targets
        )
        return given

    def _adapter_facts(self) -> dict[str, Any]:
        if self.lora is None:
            return {}
        if self._base is None:
            self._base = zlib.crc32(self.model.arena.data)
        facts = {"rank": self.lora.rank, "alpha": self.lora.alpha, "base": self._base}
        return facts | {"targets": list(self.lora.targets)}

    # Training

    def __iter__(self) -> Iterator[StepReport]:
        """Train until `config.steps`; iterating again after a break goes on.

        Raises:
            ClosedError: the trainer was closed, or has come to its end outside of a `with` block.
            DivergedError, CompileBudgetError, NativeError: as `run_step` says.
        """
        _ = self.engine
        if self.held_out is not None and self._measured.sums.held_out_before is None:
            self._measured.sums.held_out_before = self.evaluate()
        while not self.finished or self._unevaluated is not None:
            yield self.run_step()
        if not self._in_block:
            self.close()

    def run_step(self) -> StepReport:
        """Train on the next sequences and update the weights if it is time.

        Raises:
            DivergedError: the loss is not finite; the weights are those of the last update.
            CompileBudgetError, NativeError: there are no programs for the weights; the step was
                not begun.
        """
        self._measured.start()
        if self._unevaluated is None:
            with Uninterrupted():
                report = self._step()
            if self._unevaluated is None:
                return report
        return self._evaluated(self._unevaluated)

    def _step(self) -> StepReport:
        """Make the next step; a report that waits for an evaluation becomes `_unevaluated`."""
        engine, config, loop, measured = self.engine, self.config, self._loop, self._measured
        stats, step_ms = loop.step()
        lr = loop.learning_rate()
        parallel = self._parallel
        if parallel.minutes_over if parallel else measured.minutes_over(config.minutes):
            self.ended = f"{config.minutes:g} minutes are over"
        last = self.finished
        updated = loop.update(last)
        update = updated[0] if updated is not None else None
        measured.add_step(step_ms, stats)
        traffic = parallel.traffic if parallel and update is not None else None
        if parallel is not None:
            measured.add_ranks(*parallel.shares)
        if traffic is not None:
            measured.add_traffic(traffic)
        if update is not None:
            measured.add_update(update)
        report = StepReport(
            step=loop.steps,
            total=self._total,
            stats=stats,
            lr=lr,
            ms_per_step=step_ms,
            tokens_per_s=stats.tokens / step_ms * 1e3,
            gflops=self._flops / step_ms / 1e6,
            update=update,
            updates=engine.updates,
            accumulated=loop.accumulated,
            compiles=measured.sums.compiles + engine.compiles,
            held_out_loss=None,
            traffic=traffic,
        )
        due = last or (config.eval_every and loop.steps % config.eval_every == 0)
        if self.held_out is not None and due:
            self._unevaluated = report
        else:
            measured.stop()
        return report

    def _evaluated(self, report: StepReport) -> StepReport:
        """Complete a report, now or, if there are no programs, in the next process."""
        loss = self._measured.sums.held_out_after = self.evaluate()
        self._unevaluated = None
        self._compare(loss, report.step)
        self._measured.stop()
        return replace(report, held_out_loss=loss)

    def _compare(self, loss: float, step: int) -> None:
        """Remember the best evaluation, and give up when there is no better one for too long."""
        if self.best is None or loss < self.best[0]:
            self.best, self._worse = (loss, step), 0
            return
        self._worse += 1
        if self.config.patience and self._worse >= self.config.patience:
            self.ended = (
                f"no better loss than {self.best[0]:.4f} of step {self.best[1]} in "
                f"{self._worse} evaluation{'s' * (self._worse != 1)}"
            )

    def _validation(self, validation: TokenData | str | Path) -> TokenData:
        if not isinstance(validation, TokenData):
            validation = TokenData(validation)
        if validation.path is not None:
            self.source["validation"] = os.path.abspath(validation.path)
        validation.check(self.model.config.vocab_size)
        return validation

    def evaluate(self) -> float:
        """Return the mean loss over evenly spaced sequences of the held-out data.

        Raises:
            ConfigError: there is no held-out data.
        """
        if not self._held_out_windows:
            raise ConfigError("there is no held-out data: set held_out, for example to 0.05")
        if self.ranks is None:
            return mean_loss(sequence_losses(self.engine, self._held_out_windows))
        # Each rank takes every so many of them.
        mine = self._held_out_windows[self.ranks.rank :: self.ranks.size]
        losses = sequence_losses(self.engine, mine)
        own = [math.fsum(n * loss for n, loss in losses), sum(n for n, _ in losses)]
        loss, counted = self.ranks.gather("evaluate", own)[:, :2].T
        return math.fsum(loss.tolist()) / float(counted.sum())

    def summary(self) -> Summary:
        """Return what this object has done and measured so far; also after it was closed."""
        engine = self._engine
        counts = self._counts if engine is None else (engine.updates, engine.compiles)
        return self._measured.summary(self._loop.steps, self._total, *counts)

    # Checkpoints

    def check(self) -> None:
        """Look whether the weights are worth keeping: they, their loss and gradient are finite.

        Half precision may overflow, and a gradient cannot be looked at while others accumulate. A
        loss takes programs: where there are none for these weights it is left out.

        Raises:
            DivergedError: they are not; says what is not finite.
        """
        self._loop.check(self._first_window)

    def roll_back(self, path: str | Path) -> None:
        """Go back to a checkpoint of this run, and on from it with data not drawn so far.

        Raises:
            CheckpointError: it cannot be read, or is of another run.
        """
        drawn = self._loop.sampler.state()
        with checkpoint.Checkpoint(path) as file:
            self._load(file)
        self._loop.sampler.restore(drawn)
        self._unevaluated = None

    def save_checkpoint(
        self,
        path: str | Path,
        restarting: bool = False,
        drop_gradients: bool = False,
        keep: bool = False,
    ) -> int:
        """Write everything a resumed run needs; possible after any step.

        Args:
            path: the file.
            restarting: a new process goes on at once and adds up times and counts.
            drop_gradients: leave out what has been accumulated, which is not finite.
            keep: the file that is replaced stays as `NAME-previous.npz`.

        Returns:
            The size of the file in bytes.

        Raises:
            CheckpointError: it could not be written; an older file is unchanged.
        """
        engine, parallel = self.engine, self._parallel
        accumulated = 0 if drop_gradients else self._loop.accumulated
        counted, unit = engine.counted, engine.unit
        moments: tuple[Mapping[str, Array], Mapping[str, Array]] = engine.adam_m, engine.adam_v
        gradients: Mapping[str, Array] = engine.gradients if accumulated and not parallel else {}
        if parallel is not None:
            moments = parallel.moments()
            if accumulated:
                counted, unit, gradients = parallel.gathered()
            if not parallel.ranks.first:
                return 0
        arrays = dict(engine.trained)
        arrays |= {f"m.{name}": value for name, value in moments[0].items()}
        arrays |= {f"v.{name}": value for name, value in moments[1].items()}
        arrays |= {f"grad.{name}": value for name, value in gradients.items()}
        run: dict[str, Any] = {}
        if self.best is not None:
            run |= {"best": list(self.best), "worse": self._worse}
        if self._unevaluated is not None:
            run["report"] = asdict(self._unevaluated)
        if restarting:
            run["measured"] = self._measured.state(engine.compiles)
        meta = checkpoint.Meta(
            config=asdict(self.model.config),
            step=self._loop.steps,
            updates=engine.updates,
            accumulated=accumulated,
            frozen=list(engine.frozen) if self.lora is None else [],
            adapter=self._adapter_facts(),
            sampler=self._loop.sampler.state(),
            settings=asdict(self.config) | {"seq": self.seq},
            source=self.source,
            engine=self.engine_settings(),
            losses=list(self.losses),
            counted=counted if accumulated else 0,
            scaling={
                "loss_scale": engine.loss_scale,
                "clean_steps": engine.clean_steps,
                "unit": unit,
            },
            run=run,
            anepy=__version__,
        )
        return checkpoint.save(path, arrays, meta, keep)

    def checkpoint_nbytes(self) -> int:
        """Return the size of the largest checkpoint this run can write, in bytes."""
        engine = self.engine
        parts = (engine.trained, engine.adam_m, engine.adam_v)
        # Accumulated gradients are of the tensors that have a first moment.
        gradients = sum(4 * value.size for value in engine.adam_m.values())
        held = sum(value.nbytes for part in parts for value in part.values())
        return held + gradients + (1 << 16)

    def engine_settings(self) -> dict[str, Any]:
        """Return what the engine runs on: device, precision, variant, isa, threads."""
        engine = self.engine
        return {
            "device": engine.device,
            "precision": engine.precision,
            "variant": engine.variant,
            "switches": list(engine.switches),
            "isa": engine.isa,
            "threads": engine.threads,
        }

    def _restore(self, file: checkpoint.Checkpoint, restarted: bool) -> None:
        path, meta = file.path, file.meta
        if meta.step > self.config.steps:
            raise ConfigError(
                f"{path} is at step {meta.step} already, steps is {self.config.steps}: raise steps"
            )
        check_moments(self.config, meta, path)
        self._load(file)
        self._measured = Measurements(self._flops, meta.losses)
        try:
            if "report" in meta.run:
                self._unevaluated = StepReport.from_record(meta.run["report"])
            if "best" in meta.run:
                loss, step = meta.run["best"]
                self.best, self._worse = (float(loss), int(step)), int(meta.run["worse"])
            if restarted:
                self._measured.restore(meta.run["measured"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: its 'run' is damaged ({error})") from error
        here = self.engine_settings()
        self.notes += differences(self.config, self.seq, self.source, here, meta)

    def _load(self, file: checkpoint.Checkpoint) -> None:
        """Take weights, moments, gradients and the place in the data from a checkpoint."""
        engine, parallel, meta = self.engine, self._parallel, file.meta
        # Before the arrays: a sampler state that does not fit must leave the weights alone.
        self._loop.sampler.restore(meta.sampler)
        moments = (engine.adam_m, engine.adam_v) if parallel is None else parallel.all_moments()
        adapter = self._adapter_facts()
        file.load(asdict(self.model.config), adapter, engine.trained, *moments, engine.gradients)
        engine.restore(meta.accumulated, meta.updates, counted=meta.counted, **meta.scaling)
        if parallel is not None:
            parallel.restored(meta.accumulated, *moments)
        self._loop.steps = meta.step
