"""The documents are true: their links, their sections, their sizes, and every command they show.

A block of `sh` is run by bash, one of `python` by Python, all of a document in order in one folder
that holds the files `folder` makes. What a block needs beyond that is said right before it, and its
commands and options are then looked up only:

    <!-- needs: a Mac -->

A block of `text` right behind one of `python` is what that prints, to the letter.
"""

from __future__ import annotations

import functools
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import needs
import numpy as np
import pytest

import anepy

ROOT = needs.CHECKOUT
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "findings/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)
README_BYTES = 8192
# Names of notes that never shipped, as comments once had them without an ending.
OLD = ("ane-facts", "cpu-performance")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, what it needs ("" if nothing), its first line."""

    language: str
    text: str
    needs: str
    line: int
    output: str | None = None  # of the block of text right behind it


FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: str) -> list[Block]:
    text = (ROOT / document).read_text("utf-8")
    found: list[Block] = []
    end = 0
    for match in FENCE.finditer(text):
        between = text[end : match.start()].strip()
        line = text.count("\n", 0, match.start()) + 2
        if match[1] == "text" and found and not between and found[-1].language == "python":
            last = found.pop()
            found.append(Block(last.language, last.text, last.needs, last.line, match[2]))
        else:
            needs = re.search(r"<!-- needs: ([^>]+) -->$", between)
            found.append(Block(match[1], match[2], needs[1] if needs else "", line))
        end = match.end()
    return found


def having(*languages: str) -> list[str]:
    return [d for d in DOCUMENTS if any(b.language in languages for b in blocks(d))]


# ----------------------------------------------------------------------------- names and links


def anchors(document: Path) -> set[str]:
    """Return the names GitHub gives to the headings of a document."""
    text = FENCE.sub("", document.read_text("utf-8"))
    names: dict[str, int] = {}
    found = set()
    for heading in re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = names.get(name, 0)
        names[name] = count + 1
        found.add(f"{name}-{count}" if count else name)
    return found


def missing(base: Path, name: str) -> str:
    """Say what is wrong with a path, or a path and a section, named in a file in `base`."""
    path, _, section = name.partition("#")
    places = [base / path, ROOT / path, ROOT / "docs" / path]
    target = next((p.resolve() for p in places if p.exists()), None)
    if target is None:
        return f"{path} does not exist"
    if section and section not in anchors(target):
        return f"{path} has no section #{section}"
    return ""


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    text = FENCE.sub("", (ROOT / document).read_text("utf-8"))
    base = (ROOT / document).parent
    faults = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            assert link.startswith("https://"), link
            continue
        name = f"{Path(document).name}{link}" if link.startswith("#") else link
        # Relative to the document and nothing else: that is how a reader's link is followed.
        if not (base / name.partition("#")[0]).exists() or missing(base, name):
            faults.append(f"{link}: {missing(base, name) or 'not from here'}")
    assert faults == []


COMPILED = "anepy/_lib/"  # there only once the library has been compiled


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_documents_exist(document: str) -> None:
    """`folder/file` in backticks, where the folder is one of this project's."""
    text = FENCE.sub("", (ROOT / document).read_text("utf-8"))
    tops = "|".join(re.escape(p.name) for p in ROOT.iterdir() if p.is_dir() and p.name != "dist")
    names = re.findall(rf"`((?:{tops})/[\w./*{{}}-]*)`", text)
    faults = [n for n in names if n != COMPILED and not list(ROOT.glob(n.rstrip("/")))]
    assert faults == []


NAMED = re.compile(r"[\w./-]*\w\.md\b(?:#[\w-]+)?")


def test_documents_that_sources_name_exist() -> None:
    """A document, and its section behind a #, in the root or beside the file that names it."""
    faults = []
    for path in needs.git_checkout():
        if path.suffix == ".md" or path.name == Path(__file__).name:
            continue
        text = path.read_bytes().decode("utf-8", "ignore")
        for name in NAMED.findall(text):
            if fault := missing(path.parent, name.lstrip("/")):
                faults.append(f"{path.relative_to(ROOT)}: {fault}")
        faults += [f"{path.relative_to(ROOT)}: {old}" for old in OLD if old in text]
    assert faults == []


def test_links_are_checked_against_sections(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# One two\n## `x.y`: three!\n## One two\n```\n# no\n```\n")
    assert anchors(tmp_path / "a.md") == {"one-two", "xy-three", "one-two-1"}
    assert missing(tmp_path, "a.md#one-two") == ""
    assert missing(tmp_path, "a.md#four") == "a.md has no section #four"
    assert missing(tmp_path, "b.md") == "b.md does not exist"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) < README_BYTES


@pytest.mark.parametrize(("title", "most"), [("token", 10), ("weight", 10)])
def test_hands_of_a_walk_are_where_it_says(title: str, most: int) -> None:
    """Each row names a file and something that this file defines; no hand comes twice."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    section = text.split(f"\n## The walk of a {title}\n")[1].split("\n## ")[0]
    hands = re.findall(r"^\| \d+\w? \| `([\w./]+)` `(\w+)` \|", section, re.MULTILINE)
    assert 5 < len(hands) <= most and len(hands) == len(set(hands))
    assert len(hands) == len(re.findall(r"^\| \d", section, re.MULTILINE))
    for path, name in hands:
        defined = rf"^(?:\s*(?:def|class) {name}\b|\w[^\n;=]*\b{name}\()"
        assert re.search(defined, (ROOT / path).read_text("utf-8"), re.MULTILINE), (path, name)


# ------------------------------------------------------------------- messages and environment

CODE = {".py", ".c", ".h", ".m"}


@functools.cache
def code() -> str:
    """Return the package and the library as one text, adjacent string literals joined."""
    text = "\n".join(
        path.read_text("utf-8")
        for folder in ("anepy", "libsrc")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in CODE
    )
    return re.sub(r'"\s*\n\s*f?"', "", text)


@pytest.mark.parametrize("title", ["Messages", "Warnings of anepy info"])
def test_messages_are_those_of_the_code(title: str) -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    cells = [row.split(" | ")[0] for row in section.splitlines() if row.startswith(("| `", "| …"))]
    parts = [part for cell in cells for part in re.findall(r"`([^`]+)`", cell)]
    assert len(parts) >= len(cells) > 5
    assert [part for part in parts if part not in code()] == []


def test_environment_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    told = set(re.findall(r"`(ANEPY_\w+)`", text))
    read = set(re.findall(r'(?:getenv\(|environ\.get\(|VARIABLE = )["\'](ANEPY_\w+)["\']', code()))
    assert told == read


def test_every_call_for_a_report_names_the_same_command() -> None:
    prose = [(ROOT / document).read_text("utf-8") for document in DOCUMENTS]
    asking = re.compile(r"please (?:send|report)\b[^\n]*", re.IGNORECASE)
    calls = [call for text in [code(), *prose] for call in asking.findall(text)]
    assert len(calls) > 5
    assert [call for call in calls if "anepy info --json" not in call] == []
    for path in ("CONTRIBUTING.md", ".github/ISSUE_TEMPLATE/fault.md"):
        assert "`anepy info --json`" in (ROOT / path).read_text("utf-8")


# ------------------------------------------------------------------------------------ commands


def story(draw: random.Random) -> str:
    name, kind = draw.choice(["Anna", "Ben", "Clara", "Finn"]), draw.choice(["cat", "dog", "hen"])
    thing, friend = draw.choice(["ball", "hat", "cake"]), draw.choice(["mouse", "pig", "frog"])
    return (
        f"Once upon a time there was a {kind} named {name}. {name} had a red {thing}. One day the "
        f"{thing} was gone. {name} was sad. Then a {friend} came by. The {friend} found the "
        f"{thing}. {name} and the {friend} were friends now. They played all day."
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make what a reader of the documents has at hand: texts, a tokenizer, a model, tokens.

    stories.txt, held_out.txt   stories
    tokenizer.bin, tok512.bin   512 tokens, as many as the preset stories260K has
    model.bin                   that preset with random weights
    stories.bin, held_out.bin   the stories as token ids
    """
    made = tmp_path_factory.mktemp("reader")
    draw = random.Random(1)
    texts = {"stories": [story(draw) for _ in range(300)]}
    texts["held_out"] = [story(draw) for _ in range(60)]
    letters = [*map(chr, range(32, 127))]
    words = sorted({word for told in texts["stories"] for word in re.findall(r" ?\w+", told)})
    parts = sorted({word[:n] for word in words for n in range(2, len(word) + 1)}, key=len)
    entries = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]
    entries += [piece.encode() for piece in [*letters, *parts]]
    entries = (entries + [b"unused %d" % i for i in range(512)])[:512]
    tokenizer = anepy.PieceTokenizer(entries, np.arange(512.0))
    tokenizer.save(made / "tokenizer.bin")
    tokenizer.save(made / "tok512.bin")
    anepy.Model.init(anepy.PRESETS["stories260K"], seed=0).save(made / "model.bin")
    for name, told in texts.items():
        (made / f"{name}.txt").write_text("\n<|endoftext|>\n".join(told))
        anepy.prepare(made / f"{name}.txt", tokenizer, made / f"{name}.bin")
    return made


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment whose `anepy` is this one, and whose probes stay out of the cache."""
    programs = tmp_path_factory.mktemp("bin")
    for name, words in {"anepy": "-m anepy", "python": ""}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (programs / name).chmod(0o755)
    home = str(Path(anepy.__file__).resolve().parents[1])
    return os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": home}


def run(block: Block, text: str, where: Path, environment: dict[str, str]) -> str:
    shell = ["bash", "-euo", "pipefail", "-c"]
    text = re.sub(r"--minutes [0-9]+\b", "--minutes 0.05", text)  # of a reader's time
    command = [sys.executable, "-c"] if block.language == "python" else shell
    result = subprocess.run(
        [*command, text],
        cwd=where, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, f"line {block.line}:\n{text}\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.mark.parametrize("document", having("sh", "python"))
def test_blocks_do_what_they_show(
    document: str, folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for block in blocks(document):
        if block.language not in ("sh", "python") or block.needs:
            continue
        printed = run(block, block.text, tmp_path, environment)
        if block.output is not None:
            assert printed == block.output, f"{document}, line {block.line}"


@functools.cache
def help_of(*words: str) -> str:
    command = [sys.executable, "-m", "anepy", *words, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if result.returncode else result.stdout


def faults_of(line: str) -> Iterator[str]:
    """Say what is unknown in a line of shell that is not run: commands, options, scripts."""
    for command in re.split(r"&&|\||;", line):
        words = shlex.split(command, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            del words[0]
        if not words:
            continue
        if words[0].endswith("python") and words[1].endswith(".py"):
            script = ROOT / words[1]
            if not script.is_file():
                yield f"{words[1]} does not exist"
                continue
            known = "".join(p.read_text("utf-8") for p in script.parent.glob("*.py"))
            yield from (w for w in words if w.startswith("--") and f'"{w}"' not in known)
        if words[0].rpartition("/")[2] != "anepy":
            continue
        names = [word for word in words[1:3] if word.isalpha()]
        if len(names) == 2 and "Commands:" not in help_of(names[0]):
            del names[1]
        known = help_of(*names)
        if not known:
            yield f"anepy {' '.join(names)}"
            continue
        for word in words:
            option = word.partition("=")[0]
            if re.match(r"--?[a-z]", option) and not re.search(rf"{option}\b(?!-)", known):
                yield f"anepy {' '.join(names)} {option}"


@pytest.mark.parametrize("document", having("sh"))
def test_commands_that_are_not_run_exist(document: str) -> None:
    faults = [
        f"line {block.line}: {fault}"
        for block in blocks(document)
        if block.language == "sh" and block.needs
        for line in block.text.replace("\\\n", " ").splitlines()
        for fault in faults_of(line)
    ]
    assert faults == []


def test_unknown_commands_are_noticed() -> None:
    assert list(faults_of("anepy train m.bin --data d.bin --steps 3 && FOO=1 anepy lib path")) == []
    assert list(faults_of(".venv/bin/anepy trane # x")) == ["anepy trane"]
    assert list(faults_of("anepy train --stepz 3 --step 4")) == [
        "anepy train --stepz",
        "anepy train --step",
    ]
    assert list(faults_of("anepy lib pfad")) != []
    assert list(faults_of("python tests/peers/none.py")) == ["tests/peers/none.py does not exist"]
    assert list(faults_of("python tests/peers/step.py --rounds 3 --roundz 4")) == ["--roundz"]


def test_every_shell_block_is_a_block_of_sh() -> None:
    """Another language would hide commands from the tests above."""
    known = {"sh", "python", "text", "json", "c", "mil"}
    odd = [(d, b.line, b.language) for d in DOCUMENTS for b in blocks(d) if b.language not in known]
    assert odd == []
