"""What a run has come to so far, on disk, so that another goes on from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from .judgement import Judgement
from .settings import Setting


@dataclass(frozen=True)
class Group:
    """Triplets that are made together.

    Args:
        first: the held-out seed of the first triplet.
        count: of triplets.
        seed: which of a triplet's seeds, from 0.
    """

    first: int
    count: int
    seed: int

    @property
    def seeds(self) -> list[int]:
        """The noise's seed of each picture; those of the evaluation where `seed` is 0."""
        return [1 + self.first + i + 10_000 * self.seed for i in range(self.count)]


class Work:
    """A folder with a line for each group and setting.

    Args:
        folder: made where it is missing.
        identity: of the model; lines of another are not read.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder, self._identity = folder, identity
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "groups.jsonl"
        self._found: dict[tuple[Group, str], dict[str, Any]] = {}
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            entry = json.loads(line)
            if entry["identity"] == identity:
                self._found[Group(**entry["group"]), entry["setting"]] = entry

    def has(self, group: Group, setting: Setting) -> bool:
        """Whether a group's pictures of a setting are judged."""
        return (group, setting.name) in self._found

    def add(self, group: Group, setting: Setting, judged: Sequence[Judgement], denoising_s: float, decoding_s: float) -> None:
        """Keep what a group came to."""
        entry = {
            "identity": self._identity,
            "group": asdict(group),
            "setting": setting.name,
            "denoising_s": denoising_s,
            "decoding_s": decoding_s,
            "judged": [asdict(one) for one in judged],
        }
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self._found[group, setting.name] = entry

    def complete(self, settings: Iterable[Setting]) -> list[Group]:
        """The groups in which every setting is there.

        Raises:
            SystemExit: there are none.
        """
        names = [setting.name for setting in settings]
        seen = dict.fromkeys(group for group, _ in self._found)
        found = [group for group in seen if all((group, name) in self._found for name in names)]
        if not found:
            raise SystemExit(
                f"no group is complete in {self._path}: expected every setting of at least one; give more --minutes"
            )
        return found

    def judged(self, setting: Setting, chosen: Iterable[Group]) -> dict[int, list[Judgement]]:
        """The pictures of each triplet, by its held-out seed."""
        found: dict[int, list[Judgement]] = {}
        for group in chosen:
            for i, one in enumerate(self._found[group, setting.name]["judged"]):
                found.setdefault(group.first + i, []).append(Judgement(**one))
        return found

    def seconds(self, setting: Setting, chosen: Sequence[Group]) -> tuple[float, float]:
        """Processor seconds of denoising and of decoding, of one picture."""
        entries = [self._found[group, setting.name] for group in chosen]
        pictures = sum(group.count for group in chosen)
        denoising, decoding = (sum(entry[key] for entry in entries) / pictures for key in ("denoising_s", "decoding_s"))
        return denoising, decoding

    def keep_pictures(self, group: Group, setting: Setting, pictures: Sequence[Image.Image]) -> None:
        """Keep a group's pictures of a setting: to be compared with, or looked at."""
        for path, picture in zip(self._paths(group, setting), pictures, strict=True):
            picture.save(path)

    def has_pictures(self, group: Group, setting: Setting) -> bool:
        """Whether they were kept."""
        return all(path.exists() for path in self._paths(group, setting))

    def pictures(self, group: Group, setting: Setting) -> list[Image.Image]:
        """The pictures that were kept."""
        found = []
        for path in self._paths(group, setting):
            with Image.open(path) as picture:
                found.append(picture.convert("RGB"))
        return found

    def _paths(self, group: Group, setting: Setting) -> list[Path]:
        folder = self._folder / self._identity / setting.name
        folder.mkdir(parents=True, exist_ok=True)
        return [folder / f"{group.first + i}-{group.seed}.png" for i in range(group.count)]

    def sheet(self, settings: Iterable[Setting], columns: int) -> Image.Image:
        """A row of kept pictures for each setting, its name at the left."""
        group = Group(0, columns, 0)
        rows = [(s.name, self._paths(group, s)) for s in settings if self.has_pictures(group, s)]
        side, label = 96, 130
        sheet = Image.new("RGB", (label + columns * side, len(rows) * side), "white")
        pen = ImageDraw.Draw(sheet)
        for y, (name, paths) in enumerate(rows):
            pen.text((4, y * side + side // 2 - 6), name, fill="black")
            for x, path in enumerate(paths):
                with Image.open(path) as picture:
                    sheet.paste(picture.resize((side, side)), (label + x * side, y * side))
        return sheet
