"""A machine-learning service in miniature, which can be told to compute otherwise."""

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

DIM = 64


@dataclass(frozen=True)
class MiniService:
    """A service in miniature: real decoding and resizing, a random projection for a network."""

    swap_channels: bool = False
    crop: bool = False
    seed: int = 0
    dim: int = DIM
    face_noise: float = 0.0
    faces: int = 2
    garble_text: bool = False
    fail: tuple[str, ...] = ()

    def _project(self, pixels: np.ndarray[Any, Any], stream: int) -> str:
        rng = np.random.default_rng([self.seed, stream])
        weights = rng.standard_normal((self.dim, pixels.size))
        vector = weights @ (pixels.astype(np.float64).ravel() - 127)
        return json.dumps([float(x) for x in vector / np.linalg.norm(vector)])

    def _pixels(self, picture: Image.Image) -> np.ndarray[Any, Any]:
        if self.crop:
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            picture = picture.crop((left, top, left + side, top + side))
        pixels = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC))
        return pixels[:, :, ::-1] if self.swap_channels else pixels

    def clip(self, picture: Image.Image | None, text: str) -> str:
        if picture is not None:
            return self._project(self._pixels(picture), 1)
        return self._project(np.frombuffer(text.encode().ljust(64)[:64], np.uint8), 2)

    def detect(self, picture: Image.Image) -> list[dict[str, Any]]:
        w, h = picture.size
        found = []
        for k in range(self.faces):
            box = (w * k // 4, h // 4, w * (k + 1) // 4, h * 3 // 4)
            vector = np.array(json.loads(self._project(self._pixels(picture.crop(box)), 3 + k)))
            noise = np.random.default_rng(k).standard_normal(self.dim)
            vector += self.face_noise * noise / np.linalg.norm(noise)
            sides = dict(zip(("x1", "y1", "x2", "y2"), map(float, box), strict=True))
            embedding = json.dumps(vector.tolist())
            found.append({"boundingBox": sides, "embedding": embedding, "score": 0.9})
        return found

    def read(self, picture: Image.Image) -> dict[str, Any]:
        lines = [f"{picture.width} x {picture.height}", "total 12.50"]
        told = [line[::-1] for line in lines] if self.garble_text else lines
        return {"text": told, "box": [0.0] * 16, "boxScore": [1.0] * 2, "textScore": [1.0] * 2}

    async def predict(self, request: Request) -> Response:
        async with request.form() as form:
            (task,) = json.loads(str(form["entries"]))
            upload, text = form.get("image"), str(form.get("text", ""))
            image = await upload.read() if isinstance(upload, UploadFile) else None
        return self.answer(task, image, text)

    def answer(self, task: str, image: bytes | None, text: str) -> Response:
        picture = None
        if image is not None:
            try:
                picture = Image.open(io.BytesIO(image)).convert("RGB")
            except OSError:
                return PlainTextResponse("not a picture", 400)
        if task in self.fail:
            return PlainTextResponse("Internal Server Error", 500)
        if task == "clip":
            return JSONResponse({"clip": self.clip(picture, text)})
        assert picture is not None
        return JSONResponse({task: self.read(picture) if task == "ocr" else self.detect(picture)})

    @property
    def app(self) -> Starlette:
        """The service, to be served on loopback."""

        async def ping(_: Request) -> Response:
            return PlainTextResponse("pong")

        routes = [Route("/ping", ping), Route("/predict", self.predict, methods=["POST"])]
        return Starlette(routes=routes)
