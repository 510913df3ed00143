"""Which rooms the Python package has, and which of them import which.

A room is a folder of `anepy/`, or a module that lies directly in it. An arrow from one room to
another is at least one import, wherever it stands: at the top of a module, in a function, or for
type checkers only. An arrow points up if it leads to a floor that is not lower; in a tree with
other rooms than those of `FLOORS` the floors are found from the arrows themselves. Also run by
hand, on the files of any commit:

    python tests/helpers/import_rooms.py [--tree CHECKOUT]
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
# From the ground up. Rooms of one floor do not import each other.
FLOORS = (
    ("errors",),
    ("system",),
    ("native",),
    ("models",),
    ("engine",),
    ("bench", "hardware", "text"),
    ("training",),
    ("comparing",),
    ("console",),
    ("cli",),
    ("__init__", "__main__"),
)

Arrow = tuple[str, str]


@dataclass(frozen=True)
class Plan:
    """What was found.

    Attributes:
        floors: rooms from the ground up.
        arrows: (importing room, imported room) -> the imports, as `file:line`.
        upward: the arrows that lead to the same floor or a higher one.
        circles: groups of rooms that reach each other.
    """

    floors: tuple[tuple[str, ...], ...]
    arrows: Mapping[Arrow, list[str]]
    upward: list[Arrow]
    circles: list[tuple[str, ...]]

    @property
    def rooms(self) -> list[str]:
        """All rooms, from the ground up."""
        return [room for floor in self.floors for room in floor]


def survey(tree: Path) -> Plan:
    """Read every import of the package in a checkout."""
    package = tree / "anepy"
    modules = sorted(package.rglob("*.py"))
    rooms = {_room(package, path) for path in modules}
    arrows: dict[Arrow, list[str]] = {}
    for path in modules:
        here = _room(package, path)
        for line, there in _imported(package, path, rooms):
            if there != here:
                place = f"{path.relative_to(tree)}:{line}"
                arrows.setdefault((here, there), []).append(place)
    # What a package offers its users stands above its parts, and is no reason for a circle.
    faces = {"__init__", "__main__"} & rooms
    inner = [(a, b) for a, b in arrows if a not in faces]
    declared = rooms == {room for floor in FLOORS for room in floor}
    floors = FLOORS if declared else (*_levels(rooms - faces, inner), tuple(sorted(faces)))
    level = {room: number for number, floor in enumerate(floors) for room in floor}
    upward = [(a, b) for a, b in arrows if level[b] >= level[a]]
    return Plan(tuple(floors), arrows, upward, _circles(rooms - faces, inner))


def _room(package: Path, path: Path) -> str:
    first = path.relative_to(package).parts[0]
    return first.removesuffix(".py")


def _imported(package: Path, path: Path, rooms: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield line and room of everything a module imports from its own package."""
    folder = [package.name, *path.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) + 1 - node.level] if node.level else []
            base = start + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == package.name:
                yield node.lineno, name[1] if len(name) > 1 and name[1] in rooms else "__init__"


def _reached(start: str, arrows: Iterable[Arrow]) -> set[str]:
    """Return the rooms that a room imports, directly or through others."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        room = waiting.pop()
        following = {b for a, b in arrows if a == room} - found
        found |= following
        waiting += following
    return found


def _circles(rooms: Iterable[str], arrows: Iterable[Arrow]) -> list[tuple[str, ...]]:
    reached = {room: _reached(room, arrows) for room in rooms}
    groups = {
        tuple(sorted(other for other in reached[room] if room in reached.get(other, ())))
        for room in rooms
        if room in reached[room]
    }
    return sorted(groups)


def _levels(rooms: Iterable[str], arrows: Iterable[Arrow]) -> list[tuple[str, ...]]:
    """Put every room above all that it imports, but for as few arrows as close a circle."""
    left, floors = set(rooms), []
    while left:
        waiting = {room: {b for a, b in arrows if a == room and b in left} for room in left}
        floor = {room for room, others in waiting.items() if not others}
        # In a circle none is lowest: the room that waits for the fewest and that most wait for.
        wanted = {room: sum(room in others for others in waiting.values()) for room in left}
        floor = floor or {min(left, key=lambda r: (len(waiting[r]), -wanted[r], r))}
        floors.append(tuple(sorted(floor)))
        left -= floor
    return floors


def main() -> None:
    """Print the rooms of a checkout."""
    parser = argparse.ArgumentParser(description="Print rooms, floors and arrows of anepy.")
    parser.add_argument("--tree", type=Path, default=CHECKOUT, help="a checkout; this one if none")
    plan = survey(parser.parse_args().tree.resolve())
    for number, floor in reversed(list(enumerate(plan.floors))):
        for room in floor:
            below = sorted(b for a, b in plan.arrows if a == room)
            print(f"{number:3} {room:18} {' '.join(below)}".rstrip())
    for a, b in plan.upward:
        print(f"upward: {a} -> {b} ({', '.join(plan.arrows[a, b])})")
    for circle in plan.circles:
        print(f"circle: {' '.join(circle)}")
    print(
        f"{len(plan.rooms)} rooms, {len(plan.floors)} floors, {len(plan.arrows)} arrows, "
        f"{len(plan.upward)} upward, {len(plan.circles)} circles"
    )


if __name__ == "__main__":
    main()
