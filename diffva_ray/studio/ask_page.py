"""The page of ``diffva studio``: open an image, ask in words, compare, and say whether the answer is right."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffva_ray.config.methods import METHODS
from diffva_ray.config.recipe import RecipeError
from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.encoding import quantise
from diffva_ray.data.images import BadImage
from diffva_ray.evaluate.records import read_source
from diffva_ray.evaluate.tables import known
from diffva_ray.generate.run import FingerprintDiffers, PlanError
from diffva_ray.model.card import UnusableModel
from diffva_ray.storage.store import StoreError
from diffva_ray.studio.feedback import VERDICTS, save_verdict
from diffva_ray.studio.pages import LOCAL, NOTICE, SHOWN, enlarged, figure, overlaid, text
from diffva_ray.studio.workspace import Question, Reply, Workspace

FILES = [".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm", ".dicom"]
ERRORS = (UnusableData, BadImage, PlanError, RecipeError, FingerprintDiffers, UnusableModel, StoreError, OSError)
SECOND, EARLIER = "Second prompt, to compare", "Earlier results, two to compare"
SHOWS = "What the image shows"
SEVERITY = "Severity: from the healthy prompt (0) to the prompt (1)"
BOX = "Or a region without the brush: left, top, right, bottom in percent"
NONE = "(none)"  # no second prompt
MASKED = (0.6, 3.0, 20)  # strength, guidance and steps for a painted region, by a model that takes one step else
NUMBERS = {  # shown of a record
    "judge_image": "judge: healthy, image", "judge_counterfactual": "judge: healthy, counterfactual", "ssim": "SSIM",
    "ms_ssim": "MS-SSIM", "psnr": "PSNR (dB)", "l1": "L1", "attribution_energy": "map energy",
}  # fmt: skip


def build(gradio: Any, workspace: Workspace, uploads: Path, service: str | None = None) -> Any:
    """The page as Gradio's Blocks. Open files lie in ``uploads``; ``service``: address of the HTTP service that runs
    the networks, if one does."""
    config = workspace.recipe.generate
    with gradio.Blocks(title="diffva studio", analytics_enabled=False) as page:
        where = LOCAL if service is None else f"Images are sent to {text(service)}."
        gradio.HTML(f"<h1>diffva studio</h1>{NOTICE.format(where)}")
        replies = gradio.State([])
        with gradio.Row():
            with gradio.Column(scale=2, min_width=320):
                file = gradio.File(label="Image: PNG, JPEG, TIFF or DICOM", file_types=FILES, height=160)
                status = gradio.HTML(message("Open an image to begin."))
                editor = gradio.ImageEditor(
                    label="Image; paint a region with the brush", sources=(), transforms=(), layers=False,
                    type="numpy", brush=gradio.Brush(default_size=40, colors=["#f25a1a"], color_mode="fixed"),
                    canvas_size=(SHOWN, SHOWN), fixed_canvas=True, height=420, visible=False,
                )  # fmt: skip
                box = gradio.Textbox(label=BOX, placeholder="for example 10 40 45 90", max_lines=1)
                inside = gradio.Checkbox(label="Change only the region (method masked)")
                prompts = workspace.prompts
                prompt = gradio.Dropdown(prompts, value=prompts[0], label="Prompt", allow_custom_value=True)
                second = gradio.Dropdown([NONE, *prompts], value=NONE, label=SECOND, allow_custom_value=True)
                words = gradio.HTML()
                severity = gradio.Slider(0, 1, 1, step=0.05, label=SEVERITY)
                strength = gradio.Slider(0.05, 1, config.strength, step=0.05, label="Strength: how much may change")
                least = min(1.0, config.guidance_scale)  # below 1, guidance is off
                guidance = gradio.Slider(least, 15, config.guidance_scale, step=0.5, label="Guidance to the prompt")
                ask = gradio.Button("Generate", variant="primary")
                done = gradio.HTML()
                with gradio.Accordion("More settings", open=False):
                    methods = [name for name, of in METHODS.items() if not of.needs and name != "text-to-image"]
                    method = gradio.Dropdown(methods, value=config.method, label="Method")
                    steps = gradio.Slider(1, 100, config.num_inference_steps, step=1, label="Steps at strength 1")
                    seed = gradio.Number(workspace.recipe.seed, precision=0, label="Seed")
            with gradio.Column(scale=3, min_width=320):
                earlier = gradio.Dropdown([], value=[], label=EARLIER, multiselect=True, max_choices=2)
                with gradio.Column(visible=False, elem_id="answer") as answer:
                    with gradio.Row():
                        threshold = gradio.Slider(0.01, 0.5, 0.05, step=0.01, label="Threshold of the map")
                        opacity = gradio.Slider(0, 1, 0.6, step=0.05, label="Opacity of the map")
                    result = gradio.HTML()
                    with gradio.Accordion("Is the answer right?", open=False):
                        labels = list(workspace.recipe.data.prompts)
                        verdict = gradio.Radio(list(VERDICTS), label="Verdict on the first answer")
                        label = gradio.Dropdown(labels, value=None, label=SHOWS, allow_custom_value=True)
                        gradio.HTML("The region in the image is saved as the place of the finding.")
                        save = gradio.Button("Save the verdict")
                        saved = gradio.HTML()

        def opened(path: str | None) -> tuple[Any, str]:
            closed = gradio.ImageEditor(value=None, visible=False)
            if path is None:
                return closed, message("Open an image to begin.")
            try:
                pixels = quantise(workspace.preview(Path(path).read_bytes()))
            except ERRORS as error:
                return closed, message(f"{Path(path).name}: {error}", problem=True)
            shown = np.repeat(enlarged(pixels)[..., None], 3, axis=2)
            drawn = {"background": shown, "layers": [], "composite": shown}
            return gradio.ImageEditor(value=drawn, visible=True), message(f"{Path(path).name} is open.")

        def for_region(only: bool) -> list[Any]:
            """MASKED, where the model's own settings are too few steps for method ``masked``; else its own."""
            own = (config.strength, config.guidance_scale, config.num_inference_steps)
            return list(MASKED if only and own[2] < MASKED[2] else own)

        def unknown(*prompts: str | None) -> str:
            return "".join(f"<p role='note'>{text(note)}</p>" for note in workspace.notes(asked(*prompts)))

        def generate(
            path: str | None, painted: Any, box: str, only: bool, one: str, two: str, severe: float, opaque: float,
            above: float, seed: int, *values: Any, progress: Any = gradio.Progress(),  # noqa: B008, Gradio finds it here
        ) -> tuple[Any, ...]:  # fmt: skip
            try:
                region = chosen_region(painted, box)
                if path is None:
                    raise UnusableData("open an image first")
                if only and region is None:
                    raise UnusableData("choose the region that may change, or clear the checkbox")
                names = ("strength", "guidance_scale", "num_inference_steps", "method")
                settings = [f"generate.{name}={value}" for name, value in zip(names, values, strict=True)]
                scheduler = METHODS[values[-1]].scheduler
                settings += [f"generate.scheduler={scheduler}"] if scheduler else []
                found = []
                name, data, region = Path(path).name, Path(path).read_bytes(), region if only else None
                for wanted in asked(one, two) or [""]:
                    graded = workspace.graded(wanted, severe)
                    question = Question(name, data, graded, (*settings, f"seed={int(seed)}"), region)
                    found.append(workspace.ask(question, lambda *calls: progress(calls, "denoising", unit="passes")))
            except ERRORS as error:
                return [], "", message(str(error), problem=True), gradio.skip(), gradio.Column(visible=False), ""
            names_of = [reply.run.store.uri.rpartition("/")[2] for reply in found]
            shown = "".join(rendered(reply, above, opaque) for reply in found)
            said = message(f"Done. Kept in {workspace.uri}/runs/{', '.join(names_of)}")
            choices = gradio.Dropdown(choices=workspace.history(), value=[])
            return names_of, shown, said, choices, gradio.Column(visible=True), ""

        def render(names: list[str], above: float, opaque: float) -> str:
            return "".join(rendered(workspace.reply(name), above, opaque) for name in names)

        def reopen(names: list[str], path: str | None, above: float, opaque: float) -> tuple[Any, ...]:
            """Show earlier answers, and open the image of the first."""
            if not names:
                return gradio.skip(), [], "", gradio.Column(visible=False), ""
            try:
                reply = workspace.reply(names[0])
                if not shows(path, reply):
                    path = str(uploads / Path(reply.record["image_path"]).name)
                    Path(path).write_bytes(read_source(reply.run.data, reply.record))
                return path, names, render(names, above, opaque), gradio.Column(visible=True), ""
            except ERRORS as error:
                return gradio.skip(), [], message(str(error), problem=True), gradio.Column(visible=True), ""

        def judge(
            names: list[str], path: str | None, said: str | None, label: str | None, painted: Any, box: str
        ) -> str:
            if not names or said is None or not label:
                return message("choose a verdict, and what the image shows", problem=True)
            try:
                reply = workspace.reply(names[0])
                region = chosen_region(painted, box) if shows(path, reply) else None
                saved = save_verdict(workspace, reply, said, label, region)
            except ERRORS as error:
                return message(str(error), problem=True)
            return message(f"Saved in {saved}" + (", with the region" if region is not None else ""))

        page.load(lambda: gradio.Dropdown(choices=workspace.history()), None, [earlier])
        file.change(opened, [file], [editor, status])
        for asking_for in (prompt, second):
            asking_for.change(unknown, [prompt, second], [words])
        inputs = [file, editor, box, inside, prompt, second, severity, opacity, threshold, seed, strength, guidance,
                  steps, method]  # fmt: skip
        inside.change(for_region, [inside], [strength, guidance, steps])
        asking = ask.click(generate, inputs, [replies, result, done, earlier, answer, saved], show_progress_on=[done])
        asking.then(None, js="() => document.getElementById('answer')?.scrollIntoView()")
        for slider in (threshold, opacity):
            slider.change(render, [replies, threshold, opacity], [result], show_progress="hidden")
        earlier.input(reopen, [earlier, file, threshold, opacity], [file, replies, result, answer, saved])
        save.click(judge, [replies, file, verdict, label, editor, box], [saved])
    return page


def shows(path: str | None, reply: Reply) -> bool:
    """Whether the opened file is the image of the reply."""
    return path is not None and hashlib.sha256(Path(path).read_bytes()).hexdigest() == reply.record["image_sha256"]


def asked(*prompts: str | None) -> list[str]:
    """The prompts that are not empty, each once."""
    return list(dict.fromkeys(prompt.strip() for prompt in prompts if prompt and prompt.strip() not in ("", NONE)))


def message(line: str, problem: bool = False) -> str:
    """The line above the result; screen readers read it when it changes."""
    return f"<p role='alert' class='problem'>{text(line)}</p>" if problem else f"<p role='status'>{text(line)}</p>"


def chosen_region(painted: Any, box: str) -> NDArray[np.bool_] | None:
    """What was painted in an ImageEditor and the box in percent, bool [SHOWN, SHOWN]; None for nothing.

    Raises UnusableData for a box that is not one."""
    parts = [layer[..., 3] > 0 for layer in (painted or {}).get("layers", []) if layer is not None]
    if box.strip():
        left, top, right, bottom = (round(SHOWN * percent / 100) for percent in box_percent(box))
        inside = np.zeros((SHOWN, SHOWN), bool)
        inside[top:bottom, left:right] = True
        parts.append(inside)
    return np.any(parts, axis=0) if np.any(parts) else None


def box_percent(box: str) -> list[float]:
    """Left, top, right and bottom in percent of the image. Raises UnusableData."""
    with suppress(ValueError):
        numbers = [float(part) for part in box.replace(",", " ").replace("%", " ").split()]
        if len(numbers) == 4 and 0 <= numbers[0] < numbers[2] <= 100 and 0 <= numbers[1] < numbers[3] <= 100:
            return numbers
    raise UnusableData(f"region {box!r}: give left, top, right and bottom in percent, as in 10 40 45 90")


def rendered(reply: Reply, threshold: float, opacity: float) -> str:
    """A reply as HTML: image, counterfactual and attribution map, numbers, and the command that makes it again."""
    images, record = reply.images, reply.record
    prompt, name, image = record["prompt"], record["image_path"], quantise(images.image)
    marked = (np.abs(images.signed_map) > threshold).mean()
    colours = ": orange was taken away, blue was put in" if marked else ": nothing"
    panels = [
        figure(image, "image", f"The image {name}"),
        figure(
            quantise(images.counterfactual),
            "counterfactual; swipe to the image",
            f"Counterfactual of {name} under “{prompt}”",
            before=image,
        ),
        figure(
            overlaid(images.image, images.signed_map, threshold, opacity),
            f"attribution above {threshold:g}{colours}",
            f"Attribution map of “{prompt}” over {name}: {marked:.1%} of the image is marked",
        ),
    ]
    values = ((title, record[key]) for key, title in NUMBERS.items())  # type: ignore[literal-required]
    numbers = [f"<li>{title} <b>{value:.3g}</b></li>" for title, value in values if known(value)]
    settings = f"{record['method']}, strength {record['strength']:g}, guidance {record['guidance_scale']:g}"
    region = ", region only" if record["lung_mask_path"] else ""
    return (
        f"<section class='reply'><h3>“{text(prompt)}”</h3><p>{text(name)}: {text(settings)}{region}</p>"
        f"<div class='panels'>{''.join(panels)}</div><ul class='numbers'>{''.join(numbers)}</ul>"
        f"<details><summary>Command that makes it again</summary><pre class='command'>{text(reply.command)}</pre>"
        "</details></section>"
    )
