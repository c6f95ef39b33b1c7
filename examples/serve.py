"""A detector behind HTTP: JSON with images in, JSON with what is on them out.

    ssd_ext export --weights best.pt --out cards.pt2
    python examples/serve.py cards.pt2

``POST /detect`` takes ``{"images": [base64 of an image file, ...]}`` and answers, in their order,
``{"images": [{"detections": [{"label", "score", "box": [x1, y1, x2, y2]}, ...]} or {"error": "..."}, ...]}``:
boxes in pixels of the image (turned upright by its EXIF orientation), by descending score. A request that cannot be
understood gets a status of 4xx and ``{"error": "..."}``.
"""

import argparse
import base64
import io
import json
import re
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import BoundedSemaphore

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ssd_ext import export, ops
from ssd_ext.data import read_image
from ssd_ext.inference import as_json, filter_by_score

MAX_BODY = 32 * 2**20  # bytes of a request
MAX_IMAGES = 32  # of a request
MAX_PIXELS = 25_000_000  # of an image: a small file can hold a huge one
MAX_WAITING = 8  # requests in memory; the others wait unread
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # PIL knows more, of which some start other programs


class Detector:
    """The exported program, from base64 to what the answer says.

    Args:
        path: of what :func:`ssd_ext.export.save` wrote. Without its metadata, as plain ``torch.export.save`` writes,
            labels are told as numbers, and images are resized with antialiasing.
        threshold: of the scores that are told.
    """

    def __init__(self, path: str | Path, *, threshold: float = 0.5):
        """See the class for the arguments."""
        extra = {export.METADATA_FILE: ""}
        program = torch.export.load(path, extra_files=extra)
        (self.example,), _ = program.example_inputs
        self.module, self.threshold = program.module(), threshold
        metadata = json.loads(extra[export.METADATA_FILE] or "{}")
        self.classes = metadata.get("classes", [])
        self.antialias = metadata.get("preprocessing", {}).get("antialias", True)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> list[dict]:
        """``{"detections": [...]}`` or ``{"error": "..."}`` of each image."""
        answers: list[dict] = [{} for _ in texts]
        inputs, scales = {}, {}
        rows, columns = self.example.shape[-2:]
        for i, text in enumerate(texts):
            try:
                image = decode(text)
            except ValueError as error:
                answers[i]["error"] = str(error)
                continue
            inputs[i] = self._resized(image)
            scales[i] = torch.tensor([image.shape[2] / columns, image.shape[1] / rows] * 2)
        if inputs:
            found = ops.unpad(*(x.cpu() for x in self.module(torch.cat(list(inputs.values())))))
            for i, of_image in zip(inputs, found, strict=True):
                of_image["boxes"] = of_image["boxes"] * scales[i]
                answers[i]["detections"] = as_json(filter_by_score(of_image, self.threshold), self.classes)
        return answers

    def _resized(self, image: Tensor) -> Tensor:
        image = image.to(self.example.device, self.example.dtype)[None] / 255
        size = self.example.shape[-2:]
        return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=self.antialias)


def decode(text: str) -> Tensor:
    """The image file in ``text``, base64, as uint8 ``[3, h, w]``; ValueError says what is wrong with it."""
    if not isinstance(text, str):
        raise ValueError(f"an image must be a string of base64, got {json.dumps(text)[:40]}")
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"not base64: {error}") from error
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            width, height = header.size
    except Image.DecompressionBombError as error:
        raise ValueError(f"an image may have {MAX_PIXELS} pixels: {error}") from error
    except Exception as error:  # what PIL raises for a broken header is not documented
        raise ValueError("not an image of a known kind, or broken") from error
    if width * height > MAX_PIXELS:
        raise ValueError(f"an image may have {MAX_PIXELS} pixels, got {width} x {height}")
    try:
        return read_image(io.BytesIO(data))
    except ValueError as error:
        raise ValueError(f"cannot be decoded: {error.__cause__}") from error


class Refused(Exception):
    """A request that gets no answer but this one."""

    def __init__(self, status: int, message: str):
        """``status``: of HTTP, 4xx."""
        super().__init__(message)
        self.status = status


class Server(ThreadingHTTPServer):
    """A thread for each connection, one more for the detector.

    A detector in each thread would start its own OpenMP workers there, and images of all requests would lie in
    memory decoded at once. Of requests that are not decoded yet, a few are read.
    """

    request_queue_size = 128

    def __init__(self, address: tuple[str, int], detector: Detector):
        """``address``: host and port; port 0 takes a free one, see ``server_address``."""
        super().__init__(address, Handler)
        self.detector, self.worker = detector, ThreadPoolExecutor(1)
        self.places = BoundedSemaphore(MAX_WAITING)

    def detect(self, texts: Sequence[str]) -> list[dict]:
        """The detector's answers; waits for its turn."""
        return self.worker.submit(self.detector, texts).result()

    def server_close(self):
        """Let the detector finish."""
        super().server_close()
        self.worker.shutdown()


class Handler(BaseHTTPRequestHandler):
    """Requests of one connection, one after the other."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds without a byte from the client
    disable_nagle_algorithm = True  # else a body waits for the client to acknowledge its headers

    def do_POST(self):
        """Answer ``/detect``."""
        try:
            with self.server.places:
                status, answer = 200, {"images": self.server.detect(self._texts())}
        except Refused as refusal:
            status, answer = refusal.status, {"error": str(refusal)}
            self.close_connection = True  # its body may not have been read
        except OSError:
            raise
        except Exception:
            traceback.print_exc()
            status, answer = 500, {"error": "the detector failed; the server's log says why"}
            self.close_connection = True
        self._send(status, answer)

    def send_error(self, code, message=None, explain=None):
        """What the base class refuses: other methods than POST, and what is not HTTP."""
        self.close_connection = True
        if code == 501:
            code, message = 405, "POST to /detect"
        self._send(code, {"error": message or self.responses[code][0]})

    def _texts(self) -> list[str]:
        if self.path != "/detect":
            raise Refused(404, f"no such path: {self.path}; POST to /detect")
        length = self.headers.get("Content-Length")
        if length is None:
            raise Refused(411, "Content-Length is missing")
        if not re.fullmatch("[0-9]{1,19}", length):
            raise Refused(400, f"Content-Length must be a number of bytes, got {length[:40]!r}")
        if int(length) > MAX_BODY:
            raise Refused(413, f"a request may have {MAX_BODY} bytes, got {length}")
        try:
            request = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON: {error}") from error
        texts = request.get("images") if isinstance(request, dict) else None
        if not isinstance(texts, list):
            raise Refused(400, 'the body must be {"images": [base64, ...]}')
        if len(texts) > MAX_IMAGES:
            raise Refused(413, f"a request may have {MAX_IMAGES} images, got {len(texts)}")
        return texts

    def _send(self, status: int, answer: dict) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(description="Serve a detector over HTTP.")
    made.add_argument("detector", metavar="FILE.pt2", help="written by ssd_ext export")
    made.add_argument("--threshold", type=float, default=0.5, help="least score (default: %(default)s)")
    made.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    made.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    return made


def main(argv: list[str] | None = None) -> None:
    """The command; ``argv`` is by default that of the process."""
    args = parser().parse_args(argv)
    detector = Detector(args.detector, threshold=args.threshold)
    with Server((args.host, args.port), detector) as server:
        host, port = server.server_address
        print(f"serving {args.detector} at http://{host}:{port}/detect", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
