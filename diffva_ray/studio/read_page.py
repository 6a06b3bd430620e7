"""The page of a reader: one item of a study after the other, three questions each, and the time they take."""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np
from PIL import Image as Pillow

from diffva_ray.studio.pages import ADDED, LOCAL, NOTICE, figure
from diffva_ray.studio.study import QUESTIONS, Sheet
from diffva_ray.studio.workspace import safe_name

CHOICES = ["yes", "no"]


def build(gradio: Any, sheet: Sheet) -> Any:
    """The page as Gradio's Blocks. A reader who comes back under the same name continues."""
    with gradio.Blocks(title="Reader study", analytics_enabled=False) as page:
        gradio.HTML(f"<h1>Reader study</h1>{NOTICE.format(LOCAL)}")
        state = gradio.State({})
        with gradio.Column(visible=True) as start:
            gradio.HTML(f"{sheet.items} images. You can stop at any time and continue under the same name.")
            name = gradio.Textbox(label="Your name or initials", max_lines=1)
            begin = gradio.Button("Begin or continue", variant="primary")
        with gradio.Column(visible=False) as reading:
            image = gradio.HTML()
            first, second, third = list(QUESTIONS.values())
            finding = gradio.Radio(CHOICES, label=first)
            realistic = gradio.Radio(CHOICES, label=second)
            region = gradio.Radio([*CHOICES, "no finding"], label=third, visible=False)
            forward = gradio.Button("Save and show the next", variant="primary", interactive=False)
        outputs = [state, image, finding, realistic, region, forward, start, reading]

        def show(reader: str) -> list[Any]:
            """The next item of a reader, without answers; or the end."""
            item = sheet.next_item(reader)
            over = item > sheet.items
            content = "<p role='status'>Thank you: all images are read.</p>" if over else picture(sheet, item)
            asking = gradio.Radio(value=None, visible=not over)
            return [{"reader": reader, "item": item, "since": time.monotonic()}, content, asking, asking,
                    gradio.Radio(value=None, visible=False), gradio.Button(interactive=False, visible=not over),
                    gradio.Column(visible=False), gradio.Column(visible=True)]  # fmt: skip

        def started(given: str) -> list[Any]:
            return show(safe_name(given)) if given.strip() else [gradio.skip()] * len(outputs)

        def answered(now: dict[str, Any], *answers: str | None) -> list[Any]:
            """Show the region after the first two answers, which it would suggest; the button after the third."""
            both = bool(answers[0] and answers[1])
            content = picture(sheet, now["item"], marked=True) if both else gradio.skip()
            return [content, gradio.Radio(visible=both), gradio.Button(interactive=both and bool(answers[2]))]

        def saved(now: dict[str, Any], *answers: str | None) -> list[Any]:
            given = {key: value if value in CHOICES else "" for key, value in zip(QUESTIONS, answers, strict=True)}
            sheet.answer(now["reader"], now["item"], given, time.monotonic() - now["since"])
            return show(now["reader"])

        begin.click(started, [name], outputs)
        name.submit(started, [name], outputs)
        for radio in (finding, realistic, region):
            radio.input(answered, [state, finding, realistic, region], [image, region, forward], show_progress="hidden")
        forward.click(saved, [state, finding, realistic, region], outputs)
    return page


def picture(sheet: Sheet, item: int, marked: bool = False) -> str:
    """An item as HTML, with the outline of its region if it is ``marked``."""
    pixels = np.asarray(Pillow.open(io.BytesIO(sheet.image(item))))
    if marked:
        region = np.asarray(Pillow.open(io.BytesIO(sheet.image(item, ".region")))) > 0
        padded = np.pad(region, 1)
        inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        pixels = np.repeat(pixels[..., None], 3, axis=2)
        pixels[region & ~inner] = ADDED
    caption = f"Image {item} of {sheet.items}" + (", marked region outlined in blue" if marked else "")
    return f"<div class='item'>{figure(pixels, caption, caption)}</div>"
