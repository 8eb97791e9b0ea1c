"""The episode as a small animated picture, collected while it runs."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from vlm2vla_schema.types import Frame

WIDTH, HEIGHT = 320, 240
MAX_PICTURES = 160
COLOURS = 96
PICTURE_MS = 100
LAST_PICTURE_MS = 1500


class Animation:
    """Keeps small pictures; when there are too many, every second one is let go and the rest come half as often."""

    def __init__(self) -> None:
        self._pictures: list[Image.Image] = []
        self._every = 1
        self._seen = 0

    def __len__(self) -> int:
        return len(self._pictures)

    def add(self, frame: Frame) -> None:
        """Keeps the frame if it is this one's turn."""
        self._seen += 1
        if self._seen % self._every:
            return
        picture = Image.fromarray(frame.image).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
        self._pictures.append(picture)
        if len(self._pictures) > MAX_PICTURES:
            self._pictures = self._pictures[::2]
            self._every *= 2

    def save(self, path: Path) -> Path | None:
        """Writes an endless GIF; None when there is no picture. One palette for all keeps it small and calm."""
        if not self._pictures:
            return None
        palette = self._palette()
        frames = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in self._pictures]
        durations = [PICTURE_MS] * (len(frames) - 1) + [LAST_PICTURE_MS]
        temporary = path.with_name(path.name + ".part")
        frames[0].save(
            temporary, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=False
        )
        os.replace(temporary, path)
        return path

    def _palette(self) -> Image.Image:
        """Colours of eight pictures spread over the episode, so that what appears late is not left out."""
        some = self._pictures[:: max(1, len(self._pictures) // 8)][:8]
        sheet = Image.new("RGB", (WIDTH, HEIGHT * len(some)))
        for place, picture in enumerate(some):
            sheet.paste(picture, (0, HEIGHT * place))
        return sheet.quantize(COLOURS, dither=Image.Dither.NONE)
