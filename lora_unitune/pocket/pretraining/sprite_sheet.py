"""Renders the sprite sheets of the pocket world's objects from the emoji font.

    python -m lora_unitune.pocket.pretraining.sprite_sheet NotoColorEmoji.ttf

It replaces the sheets in `pocket/world`.
"""

from __future__ import annotations

import click
from PIL import Image, ImageDraw, ImageFont

from ..world.sprites import CELL, COLUMNS, EMOJI, SHEET, UNKNOWN_EMOJI, UNKNOWN_SHEET


@click.command(help=__doc__)
@click.argument("font_file", type=click.Path(exists=True, dir_okay=False))
def main(font_file: str) -> None:
    font = ImageFont.truetype(font_file, 109)  # the only size that the bitmap font has
    unknown = {name: emoji for each in UNKNOWN_EMOJI.values() for name, emoji in each.items()}
    for file, objects in ((SHEET, EMOJI), (UNKNOWN_SHEET, unknown)):
        sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(objects) // COLUMNS) * CELL))
        for index, emoji in enumerate(objects.values()):
            glyph = Image.new("RGBA", (136, 128))
            ImageDraw.Draw(glyph).text((0, 0), emoji, font=font, embedded_color=True)
            glyph = glyph.crop(glyph.getchannel("A").getbbox())
            glyph.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
            row, column = divmod(index, COLUMNS)
            sheet.paste(glyph, (column * CELL + (CELL - glyph.width) // 2, row * CELL + CELL - glyph.height))
        sheet.save(file, optimize=True)


if __name__ == "__main__":
    main()
