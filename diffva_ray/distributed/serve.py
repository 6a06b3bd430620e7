"""Serves counterfactuals over HTTP on Ray Serve: ``serve run diffva_ray.distributed.serve:application model=small``.

One deployment answers HTTP; the other holds the model, one replica for each GPU, and puts waiting requests of equal
settings into the engine's micro-batch. A request gives the pixels of ``diffva generate`` for the same file name,
settings and seed. Nothing is stored.
"""

import asyncio
import hmac
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.exceptions import BackPressureError

from diffva_ray._version import __version__

TOKEN = "DIFFVA_SERVE_TOKEN"  # environment variable of every node, with the token that clients send
MAX_UPLOAD = 64_000_000  # bytes of a request; the largest detectors make files of 40 MB
api = FastAPI(
    title="diffva-ray", version=__version__, description="Counterfactuals of chest X-rays. Not for clinical use."
)


@serve.deployment
class Engine:
    """The model; every call is one image. Images are decoded, measured and encoded in threads of their own. Whatever
    waits when the networks become free is the next micro-batch; ``serve.batch`` would close it while they are busy,
    and the padding of small batches costs as much as images."""

    def __init__(self, model: str, overrides: tuple[str, ...], device: str | None) -> None:
        from diffva_ray.explain.requests import Responder  # loads torch

        self.responder, self.networks = Responder(model, overrides, device), ThreadPoolExecutor(1)
        self.free, self.waiting = asyncio.Lock(), list[tuple[Any, asyncio.Future[Any]]]()

    async def about(self) -> dict[str, Any]:
        return self.responder.about

    async def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        prepared = await asyncio.to_thread(self.responder.prepare, request)
        if isinstance(prepared, dict):
            return prepared
        loop = asyncio.get_running_loop()
        own = (prepared, loop.create_future())
        self.waiting.append(own)
        try:
            async with self.free:
                if not own[1].done():  # nobody has taken this request along
                    batch = self.waiting[: self.responder.batch]
                    requests = [one for one, _ in batch]
                    made = await loop.run_in_executor(self.networks, self.responder.generate, requests)
                    for (_, answer), result in zip(batch, made, strict=True):
                        answer.set_result(result)
        finally:  # also when the client has gone: the next in line then generates for the others
            self.waiting = [one for one in self.waiting if one is not own and not one[1].done()]
        return await asyncio.to_thread(self.responder.finish, own[1].result())


@api.middleware("http")
async def guarded(request: Request, call_next: Any) -> Any:
    """Refuse requests without the token, and too large ones, before their bodies are read."""
    given, length = request.headers.get("authorization", ""), request.headers.get("content-length", "")
    if request.url.path.startswith("/v1/"):
        if not hmac.compare_digest(given.encode(), f"Bearer {os.environ[TOKEN]}".encode()):
            return JSONResponse({"detail": "give the token as Authorization: Bearer TOKEN"}, 401)
        if request.method == "POST" and not length.isdecimal():
            return JSONResponse({"detail": "give the request a Content-Length"}, 411)
        if int(length or 0) > MAX_UPLOAD:
            return JSONResponse({"detail": f"the request has {length} bytes; at most {MAX_UPLOAD} are read"}, 413)
    return await call_next(request)


@api.exception_handler(RequestValidationError)
async def one_line(request: Request, error: RequestValidationError) -> JSONResponse:
    """The first problem of a request in one line, as of all other errors."""
    first = error.errors()[0]
    return JSONResponse({"detail": f"{first['loc'][-1]}: {first['msg']}"}, 422)


@serve.deployment(max_ongoing_requests=1000)
@serve.ingress(api)
class Api:
    """The HTTP side, without torch."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    @api.get("/healthz")
    def health(self) -> dict[str, str]:
        """Whether the service answers; needs no token."""
        return {"status": "ok", "version": __version__}

    @api.get("/v1/model")
    async def model(self) -> dict[str, Any]:
        """What decides the pixels besides a request: digest of the model, settings, device, versions."""
        about: dict[str, Any] = await self.engine.about.remote()
        return about

    @api.post("/v1/counterfactuals")
    async def counterfactuals(
        self,
        image: Annotated[UploadFile, File(description="PNG, JPEG, TIFF or DICOM; its name decides the noise")],
        prompt: Annotated[
            str, Form(description="what the counterfactual should show; default: the healthy prompt")
        ] = "",
        mask: Annotated[UploadFile | None, File(description="PNG mask; white may change (method masked)")] = None,
        seed: Annotated[int, Form(description="seed of the run, as in diffva generate")] = 0,
        method: Annotated[str | None, Form()] = None,
        scheduler: Annotated[str | None, Form()] = None,
        strength: Annotated[float | None, Form()] = None,
        guidance_scale: Annotated[float | None, Form()] = None,
        num_inference_steps: Annotated[int | None, Form()] = None,
        reconstruction: Annotated[bool, Form(description="answer with the autoencoder's image, too")] = False,
    ) -> dict[str, Any]:
        """Generate the counterfactual of an image: its metrics, and counterfactual (8-bit grey) and attribution map
        (16-bit grey, zero is 32768) as PNG in base64."""
        settings = {"method": method, "scheduler": scheduler, "strength": strength, "guidance_scale": guidance_scale,
                    "num_inference_steps": num_inference_steps}  # fmt: skip
        request = {
            "name": image.filename or "image", "data": await image.read(), "prompt": prompt, "seed": seed,
            "mask": await mask.read() if mask else b"",
            "reconstruction": reconstruction,
            "settings": {key: value for key, value in settings.items() if value is not None},
        }  # fmt: skip
        try:
            answer: dict[str, Any] = await self.engine.remote(request)
        except BackPressureError:
            raise HTTPException(429, "the queue is full; try again later", {"Retry-After": "5"}) from None
        if "error" in answer:
            raise HTTPException(422, answer["error"])
        return answer


def application(args: dict[str, Any]) -> serve.Application:
    """The application for ``serve run`` and ``serveConfigV2``.

    ``args``: ``model``; ``queue`` (requests that wait at most, default 256), ``min_replicas`` (default 1; 0 gives the
    GPUs back), ``max_replicas`` (default 1), ``gpus`` per replica (default 0), ``set``: overrides of the recipe."""
    if not os.environ.get(TOKEN):
        raise ValueError(f"set {TOKEN}, the token that clients have to send")
    gpus = float(args.get("gpus", 0))
    overrides = tuple(str(args["set"]).split()) if args.get("set") else ()
    engine = Engine.options(  # type: ignore[attr-defined]
        max_ongoing_requests=64, max_queued_requests=int(args.get("queue", 256)),
        ray_actor_options={"num_gpus": gpus, "num_cpus": 1},
        autoscaling_config={**{key: int(args.get(key, 1)) for key in ("min_replicas", "max_replicas")},
                            "target_ongoing_requests": 16},
    ).bind(str(args["model"]), overrides, "cuda" if gpus else "cpu")  # fmt: skip
    api_options = {"ray_actor_options": {"num_cpus": 0}}
    return Api.options(**api_options).bind(engine)  # type: ignore[attr-defined, no-any-return]
