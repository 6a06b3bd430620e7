"""What both pages share: how they look, how images become HTML, and a server for this machine alone."""

from __future__ import annotations

import base64
import html
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from diffva_ray.data.encoding import encode_png, quantise
from diffva_ray.data.images import MAX_BYTES
from diffva_ray.schema import Image

LOOPBACK = "127.0.0.1"
NOTICE = "<p class='notice' role='note'>Not for clinical use. {}</p>"
LOCAL = "Everything stays on this machine."
SHOWN = 512  # side of displayed images in pixels; what is stored keeps the model's resolution
REMOVED, ADDED = (242, 90, 26), (64, 158, 255)  # as in the sheets: the image is brighter or darker there
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'"
)
CSS = """
.notice { background: #8a1c1c; color: #fff; padding: .4rem .8rem; border-radius: .4rem; font-weight: 600; margin: 0 }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 11rem), 1fr)); gap: .6rem }
figure { margin: 0 } figure img { width: 100%; background: #000; border-radius: .3rem; display: block }
figcaption { font-size: .9rem; padding: .2rem 0 }
figure > button { float: right; width: 1.8rem; height: 1.8rem; padding: 0; margin: .2rem 0 .2rem .4rem;
  border: 1px solid #8888; border-radius: .3rem; font-size: 1.3rem; line-height: 1 }
figure:fullscreen { background: #000; color: #fff; overflow: auto; text-align: center }
figure:fullscreen figcaption { color: #fff } figure:not(:fullscreen) .zoom { display: none }
figure:fullscreen img { width: calc(var(--zoom, 1) * min(100vw, 78vh)); max-width: none; margin: auto }
figure:fullscreen div { width: fit-content; margin: auto }
.zoom { position: fixed; bottom: 0; left: 0; right: 0; background: #000c } .zoom input { width: min(70vw, 20rem) }
.swipe div { position: relative } .swipe img + img { position: absolute; top: 0; left: 0;
  clip-path: inset(0 0 0 var(--at)) } .swipe > input { width: 100%; max-width: 84vh; margin: 0 }
figure input { height: 1.6rem }
[role=status], [role=alert], [role=note] { overflow-wrap: anywhere }
.reply { margin: .6rem 0 1.4rem } .reply h3 { margin: .2rem 0; overflow-wrap: anywhere }
.numbers { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: .4rem 0; padding: 0; list-style: none }
.numbers b { font-variant-numeric: tabular-nums }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere; background: #f1f3f5; color: #1c2328; padding: .5rem }
.problem { border-left: .3rem solid #c62828; padding: .2rem .6rem; font-weight: 600 }
.item { max-width: 512px; margin: auto }
:focus-visible { outline: 3px solid #1d6fd8 !important; outline-offset: 2px }
"""


def figure(pixels: NDArray[np.uint8], caption: str, description: str, before: NDArray[np.uint8] | None = None) -> str:
    """A figure with the pixels [H, W] or [H, W, 3], enlarged; ``description`` is for screen readers.

    Full screen has a slider that magnifies up to six times. With ``before``, a slider under the pixels swipes between
    the two; Gradio's ImageSlider knows neither the keyboard nor names for screen readers."""
    shown = f"<img src='{_source(pixels)}' alt='{text(description)}'>"
    if before is not None:
        shown = (
            f"<div><img src='{_source(before)}' alt=''>{shown}</div><input type='range' value='0' "
            "aria-label='Swipe from the counterfactual to the image' "
            "oninput=\"this.parentNode.style.setProperty('--at', this.value + '%')\">"
        )
    button = (
        f"<button type='button' title='Enlarge, or back' aria-label='Enlarge: {text(caption)}' onclick='"
        "document.fullscreenElement ? document.exitFullscreen() : this.parentNode.requestFullscreen()'>+</button>"
    )
    zoom = (
        "<label class='zoom'>Zoom <input type='range' min='1' max='6' step='0.25' value='1' "
        "oninput=\"this.closest('figure').style.setProperty('--zoom', this.value)\"></label>"
    )
    kind = "" if before is None else " class='swipe' style='--at: 0%'"
    about = f"{button}<figcaption>{text(caption)}</figcaption>{zoom}"  # below the pixels: nothing covers one
    return f"<figure{kind}>{shown}{about}</figure>"


def _source(pixels: NDArray[np.uint8]) -> str:
    return f"data:image/png;base64,{base64.b64encode(encode_png(enlarged(pixels))).decode()}"


def enlarged(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pixels [H, W] or [H, W, 3] as they are displayed, SHOWN pixels wide."""
    return np.asarray(Pillow.fromarray(pixels).resize((SHOWN, SHOWN), Pillow.Resampling.BICUBIC))


def overlaid(image: Image, signed_map: Image, threshold: float, opacity: float) -> NDArray[np.uint8]:
    """The image [H, W] as [H, W, 3] with REMOVED where the map exceeds ``threshold``, ADDED where it is below
    -``threshold``."""
    pixels = np.repeat(quantise(image)[..., None], 3, axis=2).astype(np.float32)
    for above, colour in ((signed_map > threshold, REMOVED), (-signed_map > threshold, ADDED)):
        pixels[above] = (1 - opacity) * pixels[above] + opacity * np.array(colour, np.float32)
    return np.rint(pixels).astype(np.uint8)


def text(value: object) -> str:
    """A text that others wrote, for HTML; a dollar sign would begin one of Gradio's templates."""
    return html.escape(str(value)).replace("$", "&#36;")


def import_gradio(uploads: str) -> Any:
    """Gradio without analytics, whose uploaded files lie in the folder ``uploads``."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads, "HF_HUB_OFFLINE": "1"}
    import gradio

    return gradio


def serve(gradio: Any, page: Any, port: int, announce: Callable[[str], None]) -> None:
    """Serve a page on the loopback address until interrupted; requests under other host names are refused, because they
    may be a DNS rebinding attack. Raises OSError when the port is taken."""
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[LOOPBACK, "localhost"])

    @app.middleware("http")
    async def closed(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY  # no other host, whatever Gradio's own page asks for
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # others are downloaded
    theme = gradio.themes.Default(primary_hue="blue", **fonts)
    gradio.mount_gradio_app(
        app, page, "/", footer_links=[], css=CSS, theme=theme, max_file_size=MAX_BYTES,
        server_name=LOOPBACK, ssr_mode=False, show_error=False,
    )  # fmt: skip
    with socket.create_server((LOOPBACK, port)) as listening:
        announce(f"open http://{LOOPBACK}:{listening.getsockname()[1]}/ (Ctrl-C ends)")
        # Open pages hold a connection, which would keep the server for ever.
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def local_folder(uri: str) -> Path:
    """The folder at ``uri``, which is made if it is missing."""
    folder = Path(uri).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
