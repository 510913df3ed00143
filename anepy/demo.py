"""The embedded demo: very short stories from a small grammar, and a model that learns them.

Every story has the same bones (someone wants something, it goes wrong, a friend helps, a happy
end) and about two hundred words in all, so a model of a million parameters that reads single bytes
tells recognisable stories after a minute. No text of anyone else is used.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .data import SEPARATOR, TokenData
from .tokenizer import BOS_ID, FIRST_BYTE_ID, MIN_VOCAB

if TYPE_CHECKING:
    from .model import ModelConfig

PROMPT = "Once upon a time"
SEQ_LEN = 256
N_STORIES = 3000
# A whole story with BOS, its leading space and the BOS after it is one sequence.
MAX_STORY_BYTES = SEQ_LEN - 3

# Name and pronouns.
_HEROES = [
    ("Anna", "she", "her"),
    ("Ben", "he", "his"),
    ("Clara", "she", "her"),
    ("Max", "he", "his"),
    ("Mia", "she", "her"),
    ("Nora", "she", "her"),
    ("Otto", "he", "his"),
    ("Sam", "he", "his"),
    ("Tom", "he", "his"),
    ("Zoe", "she", "her"),
]
_KINDS = ["bear", "cat", "dog", "fox", "frog", "goose", "hen", "lamb", "mouse", "pig"]
_TRAITS = ["little", "happy", "funny", "brave", "kind"]
_COLORS = ["red", "blue", "green", "yellow"]
_VIEWS = ["hill", "lake", "forest", "farm"]
_OPENINGS = [
    "Once upon a time there was a {a} {k} named {N}.",
    "Once upon a time a {k} named {N} lived near a {v}.",
]
_DAYS = ["One day", "One morning", "In spring"]
_FEELINGS = ["{N} was sad.", "{N} began to cry.", "What could {s} do?"]
_MEETINGS = ["Then a {h} came by.", "A {h} came to help.", '"I can help," said a {h}.']
_ENDINGS = [
    "{N} was happy.",
    '"Thank you," said {N}.',
    "They were friends now.",
    "They played all day.",
    "They laughed and danced.",
]


class _Plot(NamedTuple):
    """One way to want something and to be helped.

    The sentences hold {N} hero, {s} she or he, {p} her or his, {c} color, {o} object, {w} place,
    {h} helper. No helper or object begins with a vowel, so "a" is always right.
    """

    places: list[str]
    objects: list[str]
    wants: list[str]
    problems: list[str]
    helpers: list[str]
    helps: list[str]


_PLOTS = [
    _Plot(
        places=["park", "garden", "forest"],
        objects=["ball", "kite", "hat"],
        wants=["{N} went to the {w} with {p} {c} {o}.", "{N} played in the {w} with a {c} {o}."],
        problems=["But the {o} got stuck in a tree.", "But the wind blew the {o} into a tree."],
        helpers=["bird", "monkey", "squirrel"],
        helps=[
            "The {h} went up the tree and got the {o}.",
            "The {h} shook the tree and the {o} fell down.",
        ],
    ),
    _Plot(
        places=["lake", "river", "sea"],
        objects=["ball", "boat", "hat"],
        wants=["{N} went to the {w} with {p} {c} {o}.", "{N} played by the {w} with a {c} {o}."],
        problems=["But the {o} fell into the water.", "But the wind blew the {o} away."],
        helpers=["duck", "fish", "swan"],
        helps=["The {h} swam out and got the {o}.", "The {h} dived down and found the {o}."],
    ),
    _Plot(
        places=["forest", "garden", "field"],
        objects=["ball", "doll", "key"],
        wants=["{N} lost {p} {c} {o} in the {w}.", "{N} went to the {w} to find {p} {c} {o}."],
        problems=["But the {o} was not there.", "But {s} could not see it."],
        helpers=["crow", "deer", "rabbit"],
        helps=["The {h} found the {o} behind a stone.", "The {h} found the {o} under a leaf."],
    ),
    _Plot(
        places=["kitchen", "market", "shop"],
        objects=["cake", "carrot", "pear", "plum"],
        wants=["{N} went to the {w} to get a sweet {o}.", "{N} wanted a {o} from the {w}."],
        problems=["But there was no {o} left.", "But the {w} was closed."],
        helpers=["cook", "farmer", "goat"],
        helps=["The {h} had a {o} and gave half to {N}.", "The {h} made a big {o} for {N}."],
    ),
    _Plot(
        places=["hill", "forest", "field"],
        objects=["lamp", "light", "map"],
        wants=["{N} went for a long walk to the {w}.", "{N} ran to the {w} to see the stars."],
        problems=["But it was dark and {s} had no {o}.", "But {s} had no {o} and got lost."],
        helpers=["bat", "horse", "moth"],
        helps=["The {h} had a {o} and took {N} home.", "The {h} knew the way and took {N} home."],
    ),
    _Plot(
        places=["hill", "park", "school"],
        objects=["boat", "doll", "drum", "kite"],
        wants=["{N} took {p} {c} {o} to the {w}.", "{N} ran to the {w} with a {c} {o}."],
        problems=["But {s} fell and the {o} broke.", "But the {o} broke in two."],
        helpers=["beaver", "mole", "teacher"],
        helps=["The {h} had some glue and fixed it.", "The {h} fixed the {o} with some string."],
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


def config() -> ModelConfig:
    """Return the demo model's shape: about a million parameters over single bytes."""
    # Imported here: writing the corpus needs no model.
    from .model import ModelConfig

    return ModelConfig(
        dim=128,
        hidden_dim=352,
        n_layers=5,
        n_heads=8,
        n_kv_heads=4,
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
    while len(stories) < n_stories:
        name, subject, possessive = _HEROES[int(draw() * len(_HEROES))]
        plot = _PLOTS[int(draw() * len(_PLOTS))]
        words = {
            "N": name,
            "s": subject,
            "p": possessive,
            "a": one(_TRAITS),
            "k": one(_KINDS),
            "v": one(_VIEWS),
            "c": one(_COLORS),
            "w": one(plot.places),
            "o": one(plot.objects),
            "h": one(plot.helpers),
        }
        story = (
            f"{one(_OPENINGS)} {one(_DAYS)} {one(plot.wants)} {one(plot.problems)}"
            f" {one(_FEELINGS)} {one(_MEETINGS)} {one(plot.helps)}"
        ).format(**words)
        endings = [one(_ENDINGS), one(_ENDINGS)]
        bare = story
        for ending in dict.fromkeys(f" {ending.format(**words)}" for ending in endings):
            if len(story) + len(ending) <= MAX_STORY_BYTES:
                story += ending
        # The few stories too long for any end are not told.
        if story != bare:
            stories.append(story)
    return stories
