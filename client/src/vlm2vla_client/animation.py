"""The episode as a small animated picture, collected while it runs."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlm2vla_schema.types import Frame

WIDTH, HEIGHT = 480, 360
BAR_PX = 30
MAX_PICTURES = 160
COLOURS = 128
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

    def add(self, frame: Frame, caption: str = "") -> None:
        """Keeps the frame, with a line of words under it, if it is this one's turn."""
        self._seen += 1
        if self._seen % self._every:
            return
        self._pictures.append(_captioned(frame, caption))
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
        height = HEIGHT + BAR_PX
        sheet = Image.new("RGB", (WIDTH, height * len(some)))
        for place, picture in enumerate(some):
            sheet.paste(picture, (0, height * place))
        return sheet.quantize(COLOURS, dither=Image.Dither.NONE)


def _captioned(frame: Frame, caption: str) -> Image.Image:
    picture = Image.new("RGB", (WIDTH, HEIGHT + BAR_PX), (24, 26, 30))
    picture.paste(Image.fromarray(frame.image).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR), (0, 0))
    # The font that comes with Pillow knows Latin letters only; others would be drawn as boxes.
    words = caption.encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(picture).text((10, HEIGHT + 6), words, fill=(235, 235, 230), font=ImageFont.load_default(size=15))
    return picture
