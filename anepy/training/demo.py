"""The embedded demo: very short stories from a small grammar, and a model that learns them.

Every story has the same bones (someone has something, it goes wrong, a friend helps, a happy end)
and a hundred and fifty words serve for all of them, so a model of a quarter of a million
parameters that reads single bytes tells recognisable stories after ten seconds. No text of anyone
else is used.

The grammar is made for being learnt to its end, so that the last loss says something about the
arithmetic and not about luck. What a story has to remember is one byte said not long ago: heroes,
and the objects and helpers of a plot, differ in their first letter, and all come again in the next
sentence or two. And there are more stories than a run reads.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..text.data import TokenData
from ..text.prepare import SEPARATOR
from ..text.tokenizer_pieces import BOS_ID, FIRST_BYTE_ID, MIN_VOCAB

if TYPE_CHECKING:
    from ..models.model import Model, ModelConfig

PROMPT = "Once upon a time"
SEQ_LEN = 256
# A run reads fewer than this, so it can learn no story by heart.
N_STORIES = 16000
# A whole story with BOS, its leading space and the BOS after it is one sequence.
MAX_STORY_BYTES = SEQ_LEN - 3

_HEROES = ["Anna", "Ben", "Clara", "Finn", "Lucy", "Max", "Nora", "Otto", "Sam", "Zoe"]
_KINDS = ["bear", "cat", "dog", "frog", "goose", "hen", "lamb", "mouse", "pig", "rabbit"]
_COLORS = ["red", "blue", "green", "yellow"]
_OPENING = "Once upon a time there was a {k} named {N}. {N} had a {c} {o}."
_DAYS = ["One day", "One morning", "In spring"]
_FEELINGS = ["{N} was sad.", "{N} began to cry.", "What could {N} do?"]
_MEETINGS = ["Then a {h} came by.", "A {h} came to help.", '"I can help," said a {h}.']
_ENDINGS = [
    "{N} was happy.",
    '"Thank you," said {N}.',
    "They were friends now.",
    "They played all day.",
    "They laughed and danced.",
]


class _Plot(NamedTuple):
    """One way to be in need and to be helped.

    The sentences hold {N} hero, {k} kind of animal, {c} color, {o} object, {h} helper. No animal,
    color, helper or object begins with a vowel, so "a" is always right.
    """

    objects: list[str]
    problems: list[str]
    helpers: list[str]
    helps: list[str]


_PLOTS = [
    _Plot(
        objects=["ball", "hat", "kite"],
        problems=["{N} threw the {o} into a tree.", "{N} ran and the {o} flew into a tree."],
        helpers=["bird", "monkey", "squirrel"],
        helps=[
            "The {h} went up the tree and got the {o}.",
            "The {h} shook the tree and the {o} fell down.",
        ],
    ),
    _Plot(
        objects=["ball", "hat", "ship"],
        problems=[
            "{N} dropped the {o} into the lake.",
            "{N} fell and the {o} rolled into the water.",
        ],
        helpers=["duck", "fish", "swan"],
        helps=["The {h} swam out and got the {o}.", "The {h} dived down and found the {o}."],
    ),
    _Plot(
        objects=["doll", "lamp", "ring"],
        problems=["{N} lost the {o}.", "{N} could not find the {o}."],
        helpers=["crow", "goat", "mole"],
        helps=["The {h} found the {o} behind a stone.", "The {h} found the {o} under a leaf."],
    ),
    _Plot(
        objects=["doll", "kite", "lamp"],
        problems=["{N} fell and the {o} broke.", "{N} broke the {o} in two."],
        helpers=["beaver", "farmer", "teacher"],
        helps=[
            "The {h} had some glue and fixed the {o}.",
            "The {h} fixed the {o} with some string.",
        ],
    ),
    _Plot(
        objects=["kite", "ring", "ship"],
        problems=[
            "{N} took the {o} for a walk and got lost.",
            "{N} ran after the {o} and got lost.",
        ],
        helpers=["donkey", "horse", "pony"],
        helps=["The {h} knew the way and took {N} home.", "The {h} took {N} and the {o} home."],
    ),
]


def corpus(n_stories: int = N_STORIES, seed: int = 0) -> str:
    """Return made-up stories, one per line pair: the story, then `<|endoftext|>`.

    Args:
        n_stories: how many.
        seed: the same seed gives the same stories everywhere.

    Example:
        >>> corpus(n_stories=1).startswith(PROMPT)
        True
    """
    return "".join(f"{story}\n{SEPARATOR}\n" for story in _stories(n_stories, seed))


def data(n_stories: int = N_STORIES, seed: int = 0) -> TokenData:
    """Return the corpus as `prepare` would tokenize it with the byte-level tokenizer."""
    # BOS, the leading space and the bytes of each story; BOS stands in as a byte no story has.
    text = "".join(f"\0 {story}" for story in _stories(n_stories, seed))
    codes = np.frombuffer(text.encode("ascii"), np.uint8)
    tokens = np.where(codes == 0, BOS_ID, codes + np.uint16(FIRST_BYTE_ID)).astype(np.uint16)
    return TokenData.from_array(tokens, name="the demo corpus", vocab_size=MIN_VOCAB)


def model(seed: int = 0) -> Model:
    """Return the untrained model: a quarter of a million parameters over single bytes.

    Args:
        seed: of its random weights. The layers' matrices have twice the deviation of `Model.init`,
            which is meant for wider models: from there names are remembered after half the steps.
    """
    # Imported here: writing the corpus needs no model.
    from ..models.model import Model

    model = Model.init(config(), seed)
    for name, weight in model.weights.items():
        if name.startswith("layers.") and weight.ndim > 1:
            weight *= 2
    return model


def config() -> ModelConfig:
    """Return the shape of the model."""
    from ..models.model import ModelConfig

    return ModelConfig(
        dim=96,
        hidden_dim=256,
        n_layers=2,
        n_heads=8,
        n_kv_heads=8,
        vocab_size=MIN_VOCAB,
        seq_len=SEQ_LEN,
    )


def _stories(n_stories: int, seed: int) -> list[str]:
    """Return stories of at most MAX_STORY_BYTES characters, all ASCII."""
    # Of all of `random`, only random() promises the same values in every Python.
    draw = random.Random(seed).random

    def one(options: list[str]) -> str:
        return options[int(draw() * len(options))]

    stories: list[str] = []
    for _ in range(n_stories):
        plot = _PLOTS[int(draw() * len(_PLOTS))]
        words = {
            "N": one(_HEROES),
            "k": one(_KINDS),
            "c": one(_COLORS),
            "o": one(plot.objects),
            "h": one(plot.helpers),
        }
        sentences = (
            f"{_OPENING} {one(_DAYS)} {one(plot.problems)} {one(_FEELINGS)} {one(_MEETINGS)}"
            f" {one(plot.helps)} {one(_ENDINGS)}"
        )
        stories.append(sentences.format(**words))
    return stories
