"""`anepy.compare`: variants of one training run, measured in turns.

Every variant has an engine and weights of its own and sees the same sequences. In a round each
makes the same number of steps and ends them with an update; who begins changes every round, so a
machine that gets slower with time does so to all of them. Engines stay alive between rounds. Where
memory does not allow all at once they are measured in groups, each with the reference among them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ..bench.peaks import device_peak
from ..engine.engine import Engine
from ..engine.variants import switch_names, variant_switches
from ..errors import ConfigError, UnsupportedError
from ..models.model import PRESETS, Model, ModelConfig, TensorTable, sequence_length
from ..native.info import provenance
from ..system import machine
from ..text.data import TokenData
from .config import CompareConfig
from .estimates import TRUSTED_ROUNDS
from .result import Ablation, Comparison, Group, Run
from .turns import Contestant, Job, take_turns, take_turns_apart

DEFAULT_PRESET = "stories110M"
BASELINE = "baseline"
# Part of the free memory that engines may take; a step without `prealloc` allocates some more.
_MEMORY_SHARE = 0.9
_SYNTHETIC_TOKENS = 1 << 18


@dataclass(frozen=True)
class Progress:
    """Where a comparison is.

    Attributes:
        done: turns done; the warm-up of a variant is one.
        total: turns of the whole comparison.
        group: number of the group that is measured, from 1.
        groups: how many groups there are.
        round: number of the round, from 1; 0 in the warm-up.
        label: the variant whose turn it is.
    """

    done: int
    total: int
    group: int
    groups: int
    round: int
    label: str


def compare(
    variants: Sequence[str],
    model: Model | str | Path | None = None,
    data: TokenData | str | Path | None = None,
    config: CompareConfig | None = None,
    *,
    preset: str = DEFAULT_PRESET,
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    command: Sequence[str] = (),
) -> Comparison:
    """Measure what variants are worth, in turns and repeatedly.

    A variant that fails on the way is kept with its reason and the others go on.

    Args:
        variants: like ["baseline", "opt", "opt-prealloc"]; the first is the reference.
        model: a model, whose weights stay as they are, or the path of one. None: random weights.
        data: tokens or the path of a token file. None: synthetic tokens.
        config: settings.
        preset: shape of the model if there is none.
        progress: told before every turn.
        stop: asked after every step; true ends the comparison with what has been measured.
        command: what was typed, for the record.

    Returns:
        Every sample, and what follows from them.

    Raises:
        ConfigError: an unknown name or a value out of range, fewer than two variants that this
            device can run, or too little memory for two engines.
        ModelError, DataError: a file is unusable.

    Example:
        >>> result = compare(["baseline", "opt"], preset="stories260K")  # doctest: +SKIP
        >>> result.ratio("opt", "baseline").value  # doctest: +SKIP
        0.86
    """
    config = config if config is not None else CompareConfig()
    config.validate()
    base = _load(model, preset, config.seed)
    plan = _Plan.make(variants, config, base)
    if data is None:
        data = synthetic(base.config.vocab_size, config.seed)
    elif not isinstance(data, TokenData):
        data = TokenData(data)
    data.check(base.config.vocab_size)
    return _Session(config, base, data, plan, progress, stop).run(list(command))


def _load(model: Model | str | Path | None, preset: str, seed: int) -> Model:
    if isinstance(model, Model):
        if model.storage != "f32":
            raise ConfigError(
                f"the model is stored as {model.storage}, and compare trains it: load it with "
                "storage='f32'"
            )
        return model
    if model is not None:
        return Model.load(model)
    config = _preset(preset)
    # Refused before gigabytes of random numbers are drawn: weights here and four arenas each.
    _check_room(int(machine.available_memory() * _MEMORY_SHARE), 16 * TensorTable(config).size)
    return Model.init(config, seed=seed)


def _preset(name: str) -> ModelConfig:
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def shape(model: str | Path | None, preset: str) -> tuple[str, ModelConfig]:
    """Return name and dimensions of a model file, or of a preset if there is none."""
    if model is not None:
        return Path(model).name, Model.load(model, storage="auto").config
    return f"{preset} shape", _preset(preset)


@dataclass(frozen=True)
class _Contender:
    label: str
    variant: str
    switches: tuple[str, ...]


_Section = tuple[_Contender, list[_Contender]]
_SwitchesOf = Callable[[str], tuple[str, ...]]  # what a variant means here


@dataclass
class _Plan:
    """Who is measured against whom.

    Attributes:
        columns: labels of the variants asked for and possible.
        refused: variant -> reason.
        sections: a reference and those to compare with it.
        ablation: rows for the switches.
    """

    columns: list[str]
    refused: dict[str, str]
    sections: list[_Section]
    ablation: list[Ablation]

    @classmethod
    def make(cls, variants: Sequence[str], config: CompareConfig, base: Model) -> _Plan:
        switches_of = functools.partial(variant_switches, device=config.device, model=base)
        refused: dict[str, str] = {}
        found: list[_Contender] = []
        for text in variants:
            try:
                switches = switches_of(text)
            except UnsupportedError as error:
                refused[text] = str(error)
                continue
            same = sum(other.variant == text for other in found)
            label = f"{text} ({same + 1})" if same else text
            found.append(_Contender(label, text, switches))
        if len(found) < (1 if config.ablate else 2):
            reasons = "; ".join(refused.values())
            raise ConfigError(
                f"there is nothing to compare, {len(found)} of {len(variants)} variants can run "
                f"here: {reasons or 'name two'}"
            )
        plan = cls([item.label for item in found], refused, [], [])
        plan.sections.append((found[0], found[1:]))
        if config.ablate:
            plan._ablate(found, switches_of)
        plan.sections = [section for section in plan.sections if section[1]]
        if not plan.sections:
            raise ConfigError("there is nothing to compare: name two variants")
        return plan

    def _ablate(self, found: Sequence[_Contender], switches_of: _SwitchesOf) -> None:
        """Add every switch to the baseline, and leave each out of the fullest variant."""
        fullest = max(found, key=lambda item: len(item.switches))
        bases = {
            "add": self._reference(BASELINE, switches_of),
            "leave out": self._reference(fullest.variant, switches_of),
        }
        for switch in switch_names():
            reason = _reason(f"{BASELINE}+{switch}", switches_of)
            forms = ["leave out"] if switch in fullest.switches else []
            for form in ["add", *forms]:
                reference, others = bases[form]
                sign = "+" if form == "add" else "-"
                text = f"{reference.variant}{sign}{switch}"
                why = reason or _reason(text, switches_of)
                row = Ablation(switch, form, reference.label, "", why)
                if not why:
                    row.label = self._contender(text, switches_of, reference, others)
                self.ablation.append(row)

    def _reference(self, variant: str, switches_of: _SwitchesOf) -> _Section:
        """Find the section of a reference, or begin one."""
        switches = switches_of(variant)
        for section in self.sections:
            if section[0].switches == switches:
                return section
        known = [item for _, others in self.sections for item in others]
        label = next((item.label for item in known if item.switches == switches), variant)
        self.sections.append((_Contender(label, variant, switches), []))
        return self.sections[-1]

    @staticmethod
    def _contender(
        text: str, switches_of: _SwitchesOf, reference: _Contender, others: list[_Contender]
    ) -> str:
        """Return the label of a variant in a section, adding it unless it is there already."""
        switches = switches_of(text)
        for item in others:
            if item.switches == switches:
                return item.label
        others.append(_Contender(text, text, switches))
        return text


def _reason(text: str, switches_of: _SwitchesOf) -> str:
    try:
        switches_of(text)
    except UnsupportedError as error:
        # The variant is not what the user typed, and its advice does not fit.
        return re.sub(r"^variant '.*?': |;.*$", "", str(error))
    return ""


class _Session:
    """One comparison from the first engine to the last sample."""

    def __init__(
        self,
        config: CompareConfig,
        base: Model,
        data: TokenData,
        plan: _Plan,
        progress: Callable[[Progress], None],
        stop: Callable[[], bool],
    ) -> None:
        self._config = config
        self._base = base
        self._data = data
        self._plan = plan
        self._progress = progress
        self._stop = stop
        self._seq = sequence_length(config.seq, base.config.seq_len)
        self._job = Job(config, base, data, self._seq)
        self._done = self._total = 0

    def run(self, command: list[str]) -> Comparison:
        """Measure everything, or what there was time for."""
        free = int(machine.available_memory() * _MEMORY_SHARE)
        _check_room(free, 4 * self._base.arena.nbytes)
        # The first engine tells what all of them run on, and what one takes.
        first = Contestant(_run(self._plan.sections[0][0]), self._job)
        self._config = replace(self._config, device=_same_device(self._config, first.engine))
        self._job = replace(self._job, config=self._config)
        try:
            result = self._describe(first.engine, command)
            room = _check_room(free, first.run.memory)
            budget = first.engine.compile_budget
            if budget:
                room = min(room, self._check_budget(budget, first.engine.compiles))
                first.engine.close()
            chunks = self._chunks(room, bool(budget), result.notes)
            self._total = self._turns() * sum(1 + len(others) for _, others in chunks)
            for number, (reference, others) in enumerate(chunks, 1):
                group = Group([_run(item) for item in (reference, *others)])
                result.groups.append(group)
                tell = functools.partial(self._tell, (number, len(chunks)))
                if budget:
                    complete = take_turns_apart(group, self._job, tell, self._stop)
                else:
                    alive = {0: first} if number == 1 else {}
                    group.runs[0] = first.run if alive else group.runs[0]
                    complete = take_turns(group, self._job, tell, self._stop, alive)
                if not complete:
                    result.interrupted = True
                    break
        finally:
            first.engine.close()
        return result

    def _tell(self, number: tuple[int, int], round_: int, label: str) -> None:
        self._progress(Progress(self._done, self._total, *number, round_, label))
        self._done += 1

    def _turns(self) -> int:
        return self._config.rounds + bool(self._config.warmup)

    def _check_budget(self, budget: int, compiles: int) -> int:
        """Return how many engines a process may have that compiles no more than `budget`.

        Raises:
            ConfigError: fewer than two.
        """
        config = self._config
        need = compiles * (1 + config.updates)
        if budget < 2 * need:
            raise ConfigError(
                f"a process may compile {budget} programs on this device, two variants need up to "
                f"{2 * need} for {config.updates} updates: lower --rounds or --steps, or raise "
                "--accum"
            )
        return budget // need if need else budget

    def _chunks(self, room: int, apart: bool, notes: list[str]) -> list[_Section]:
        """Cut sections so that no more than `room` engines are alive at once."""
        chunks: list[_Section] = []
        for reference, others in self._plan.sections:
            parts = -(-len(others) // (room - 1))
            size = -(-len(others) // parts)
            chunks += [(reference, others[at : at + size]) for at in range(0, len(others), size)]
        if len(chunks) > len(self._plan.sections):
            what = "a process may compile for" if apart else "memory for"
            notes.append(
                f"{what} {room} engines at a time: measured in {len(chunks)} groups, each with its "
                "reference"
            )
        return chunks

    def _describe(self, engine: Engine, command: list[str]) -> Comparison:
        config, base, plan = self._config, self._base, self._plan
        notes = [engine.device_note] if engine.device_note else []
        if config.rounds < TRUSTED_ROUNDS:
            notes.append(
                f"{config.rounds} rounds: intervals are to be trusted from {TRUSTED_ROUNDS} on"
            )
        return Comparison(
            **provenance(),
            command=command,
            engine={
                "device": engine.device,
                "precision": engine.precision,
                "isa": engine.isa,
                "threads": engine.threads,
                "seq": self._seq,
            },
            model={
                "name": base.path.name if base.path else _shape_name(base.config),
                "parameters": base.n_parameters,
                "shape": asdict(base.config),
            },
            data={"name": self._data.name, "tokens": len(self._data)},
            settings=asdict(config) | {"seq": self._seq},
            peak=device_peak(engine.device, engine.precision, engine.threads),
            columns=plan.columns,
            refused=plan.refused,
            ablation=plan.ablation,
            notes=notes,
        )


def _same_device(config: CompareConfig, engine: Engine) -> str:
    """Name the device for all other engines: a variant it cannot run must not go to another one."""
    return engine.device if engine.device_note else config.device


def _run(item: _Contender) -> Run:
    return Run(item.label, item.variant, list(item.switches))


def _check_room(free: int, need: int) -> int:
    """Return how many engines of `need` bytes may be alive; 2 where the free memory is unknown.

    Raises:
        ConfigError: fewer than two.
    """
    if free and free < 2 * need:
        raise ConfigError(
            f"two engines of this model need {2 * need / 1e9:.2f} GB at once and "
            f"{free / 1e9:.2f} GB may be used: free some memory, or compare on a smaller --model, "
            "--preset or --seq"
        )
    return free // need if free else 2


def synthetic(vocab_size: int, seed: int) -> TokenData:
    """Make tokens whose frequencies follow the law of Zipf and Mandelbrot, as those of text do."""
    weights = np.cumsum(1.0 / (np.arange(vocab_size) + 2.7))
    draws = np.random.default_rng(seed).random(_SYNTHETIC_TOKENS) * weights[-1]
    tokens = np.searchsorted(weights, draws).astype(np.int32)
    return TokenData.from_array(tokens, f"synthetic tokens (Zipf's law, seed {seed})", vocab_size)


def _shape_name(config: ModelConfig) -> str:
    known = (name for name, shape in PRESETS.items() if shape == config)
    return f"{next(known, 'a model')} shape, random weights"
