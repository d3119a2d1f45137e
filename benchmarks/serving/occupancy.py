"""A picture of how many requests took each step, over time, one strip for each policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw

from .policies import Policy, Replay

WIDTH, HEIGHT, MARGIN = 1200, 160, 40


def draw_occupancy(replays: Mapping[Policy, Replay], path: Path) -> None:
    """Write the picture."""
    image = Image.new("RGB", (WIDTH + 2 * MARGIN, (HEIGHT + MARGIN) * len(replays) + MARGIN), "white")
    draw = ImageDraw.Draw(image)
    end_s = max(replay.end_s for replay in replays.values())
    most = max(members for replay in replays.values() for _, members in replay.occupancy)
    for row, (policy, replay) in enumerate(replays.items()):
        bottom = (HEIGHT + MARGIN) * (row + 1)
        draw.text((MARGIN, bottom - HEIGHT - 14), f"{policy}: requests in a step, up to {most}", fill="black")
        draw.line([(MARGIN, bottom), (MARGIN + WIDTH, bottom)], fill="black")
        before_s = 0.0
        for moment_s, members in replay.occupancy:
            left = MARGIN + WIDTH * max(before_s, moment_s - 1) / end_s
            right = MARGIN + WIDTH * moment_s / end_s
            draw.rectangle([left, bottom - HEIGHT * members / most, max(left, right), bottom], fill=(70, 110, 180))
            before_s = moment_s
        for second in range(0, int(end_s) + 1, max(1, int(end_s) // 10)):
            x = MARGIN + WIDTH * second / end_s
            draw.text((x, bottom + 4), f"{second} s", fill="black")
    image.save(path)
