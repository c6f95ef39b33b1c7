"""examples/serve.py: right answers to concurrent clients, errors where they belong, no growth."""

import base64
import copy
import gc
import http.client
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")

from model_cases import small, spread
from PIL import Image

from examples import serve
from ssd_ext import export
from ssd_ext.data import read_image

ROOT = Path(__file__).resolve().parent.parent
PHOTOGRAPHS = sorted((ROOT / "samples/playing_cards/JPEGImages").glob("*.jpg"))
CLASSES = ["ten", "jack", "queen"]


@pytest.fixture(scope="module")
def model():
    return spread(small()).eval()


@pytest.fixture(scope="module")
def detector(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("serve") / "detector.pt2"
    export.save(model, path, classes=CLASSES)
    return serve.Detector(path, threshold=0.4)


@pytest.fixture(scope="module")
def server(detector):
    with serve.Server(("127.0.0.1", 0), detector) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def ask(connection, body, path="/detect", method="POST", headers=()):
    connection.request(method, path, body, dict(headers))
    response = connection.getresponse()
    return response.status, json.loads(response.read())


@pytest.fixture
def client(server):
    """A connection to the server."""
    made = http.client.HTTPConnection(*server.server_address, timeout=60)
    yield made
    made.close()


def request(*images):
    texts = [base64.b64encode(x).decode() if isinstance(x, bytes) else x for x in images]
    return json.dumps({"images": texts})


@torch.inference_mode()
def expected(model, path):
    """What the model itself finds, as the server tells it."""
    (found,) = model([read_image(path) / 255])
    return [
        (CLASSES[label - 1], score, box)
        for label, score, box in zip(*(found[k].tolist() for k in ("labels", "scores", "boxes")), strict=True)
        if score > 0.4
    ]


def assert_told(answer, wanted):
    """Each is in the other, but for what the last bits of a score decide: order, and the threshold."""
    told = [(found["label"], found["score"], found["box"]) for found in answer["detections"]]
    assert len(wanted) > 5
    for ours, theirs in ((told, wanted), (wanted, told)):
        for label, score, box in ours:
            assert score < 0.401 or any(
                label == other and abs(score - its_score) < 1e-3 and box == pytest.approx(its_box, abs=0.2)
                for other, its_score, its_box in theirs
            )


def test_answers_are_the_models(client, model):
    status, answer = ask(client, request(*(path.read_bytes() for path in PHOTOGRAPHS[:3])))
    assert status == 200
    for image, path in zip(answer["images"], PHOTOGRAPHS, strict=False):
        assert_told(image, expected(model, path))


def test_concurrent_requests_get_their_own_answers(server, model):
    wanted = [expected(model, path) for path in PHOTOGRAPHS]
    data = [path.read_bytes() for path in PHOTOGRAPHS]
    assert len({json.dumps(x) for x in wanted}) == len(wanted), "no two alike"

    def many(start):
        connection = http.client.HTTPConnection(*server.server_address, timeout=60)
        for k in range(start, start + 6):
            chosen = [(k + i) % len(data) for i in range(1 + k % 3)]
            status, answer = ask(connection, request(*(data[i] for i in chosen)))
            assert status == 200 and len(answer["images"]) == len(chosen)
            for image, i in zip(answer["images"], chosen, strict=True):
                assert_told(image, wanted[i])
        connection.close()

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(many, range(24)))


def png(*size):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


def claims_to_be(*size):
    """A small file with the header of a large picture."""
    data = png(1, 1)
    header = b"IHDR" + struct.pack(">II", *size) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


GOOD = PHOTOGRAPHS[0].read_bytes()
BROKEN = [
    (b"no image", "not an image of a known kind, or broken"),
    (b"", "not an image of a known kind, or broken"),
    (GOOD[:-5000], "cannot be decoded: image file is truncated"),
    (png(6000, 6000), "an image may have 25000000 pixels, got 6000 x 6000"),
    (claims_to_be(20_000, 20_000), "an image may have 25000000 pixels: "),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "not an image of a known kind"),
    ("%%%", "not base64: "),
    ("é", "not base64: "),
    (17, "an image must be a string of base64, got 17"),
    (None, "an image must be a string of base64, got null"),
]


@pytest.mark.parametrize(("broken", "message"), BROKEN, ids=[message[:24] for _, message in BROKEN])
def test_a_broken_image_harms_no_other(client, model, broken, message):
    status, answer = ask(client, request(GOOD, broken, GOOD))
    assert status == 200
    first, second, third = answer["images"]
    assert second.keys() == {"error"} and second["error"].startswith(message)
    for image in (first, third):
        assert_told(image, expected(model, PHOTOGRAPHS[0]))
    assert ask(client, request(broken)) == (200, {"images": [second]})


@pytest.mark.parametrize(
    ("body", "options", "status", "message"),
    [
        ("{", {}, 400, "the body is not JSON"),
        ("[" * 100_000, {}, 400, "the body is not JSON"),
        (b"\xff", {}, 400, "the body is not JSON"),
        ("[]", {}, 400, 'the body must be {"images"'),
        ('{"images": "x"}', {}, 400, 'the body must be {"images"'),
        (request(*["x"] * 33), {}, 413, "a request may have 32 images, got 33"),
        (None, {"headers": {"Content-Length": str(2**40)}.items()}, 413, "may have 33554432 bytes, got 1099511627776"),
        (None, {"headers": {"Content-Length": "-1"}.items()}, 400, "must be a number of bytes, got '-1'"),
        (None, {"headers": {"Content-Length": "9" * 5000}.items()}, 400, "must be a number of bytes, got '999"),
        (None, {"headers": {"Transfer-Encoding": "chunked"}.items()}, 411, "Content-Length is missing"),
        ("{}", {"path": "/other"}, 404, "no such path: /other"),
        (None, {"method": "GET"}, 405, "POST to /detect"),
        ("{}", {"method": "PUT"}, 405, "POST to /detect"),
    ],
)
def test_a_broken_request(client, body, options, status, message):
    found, answer = ask(client, body, **options)
    assert found == status
    assert answer.keys() == {"error"} and message in answer["error"]
    client.close()
    assert ask(client, request()) == (200, {"images": []}), "the next one is answered"


def test_a_client_that_goes_away(server, client):
    with socket.create_connection(server.server_address) as lost:
        lost.sendall(b"POST /detect HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{")
    assert ask(client, request()) == (200, {"images": []})


def test_a_failure_inside_is_told(client, server, monkeypatch, capfd):
    def fails(texts):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patched:
        patched.setattr(server, "detector", fails)
        status, answer = ask(client, request(GOOD))
    assert status == 500 and answer.keys() == {"error"}
    assert "out of luck" in capfd.readouterr().err
    assert ask(client, request(GOOD))[0] == 200


def test_no_more_requests_are_read_than_there_are_places(server, client):
    for _ in range(serve.MAX_WAITING):
        server.places.acquire()
    with ThreadPoolExecutor(1) as pool:
        try:
            waiting = pool.submit(ask, client, request(GOOD))
            assert not wait([waiting], timeout=0.5).done
        finally:
            server.places.release(serve.MAX_WAITING)
        assert waiting.result()[0] == 200


def test_a_file_without_metadata_gives_numbers(detector, model, tmp_path):
    torch.export.save(export.program(model), tmp_path / "plain.pt2")
    (named,), (numbered,) = (
        made([base64.b64encode(GOOD).decode()])
        for made in (detector, serve.Detector(tmp_path / "plain.pt2", threshold=0.4))
    )
    assert {found["label"] for found in named["detections"]} == set(CLASSES)
    told = [found | {"label": CLASSES[found["label"] - 1]} for found in numbered["detections"]]
    assert told == named["detections"], "resized with antialiasing, too"


def test_images_are_resized_as_the_model_was_trained(model, tmp_path):
    text = base64.b64encode(GOOD).decode()
    with_antialiasing = expected(model, PHOTOGRAPHS[0])
    without = copy.deepcopy(model)
    without.antialias = False
    export.save(without, tmp_path / "without.pt2", classes=CLASSES)
    (answer,) = serve.Detector(tmp_path / "without.pt2", threshold=0.4)([text])
    assert_told(answer, expected(without, PHOTOGRAPHS[0]))
    with pytest.raises(AssertionError):
        assert_told(answer, with_antialiasing)


@pytest.mark.parametrize("page", ["docs/export.md", "examples/README.md"])
def test_the_pages_send_a_large_photograph(page, tmp_path):
    (line,) = re.findall(r"^printf .*", (ROOT / page).read_text(), re.MULTILINE)
    photograph = os.urandom(200_000)
    (tmp_path / "photograph.jpg").write_bytes(photograph)
    done = subprocess.run(["bash", "-c", "curl() { cat; }; " + line], cwd=tmp_path, capture_output=True, check=True)
    assert base64.b64decode(json.loads(done.stdout)["images"][0]) == photograph


def test_the_command(model, tmp_path):
    export.save(model, tmp_path / "detector.pt2", classes=CLASSES)
    arguments = ["detector.pt2", "--threshold", "0.4", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, serve.__file__, *arguments], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as started:
        try:
            address = re.search(r"http://([\d.]+):(\d+)/detect", started.stdout.readline()).groups()
            connection = http.client.HTTPConnection(*address, timeout=60)
            status, answer = ask(connection, request(GOOD))
        finally:
            started.terminate()
    assert status == 200
    assert_told(answer["images"][0], expected(model, PHOTOGRAPHS[0]))


def resident():
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def growth(server, requests):
    """Bytes by which the process grows over that many requests, after as many as warm it up."""
    bodies = [request(png(20 + k, 30)) for k in range(5)] + [request(png(32, 32), b"broken")]

    def send(count):
        connection = http.client.HTTPConnection(*server.server_address, timeout=60)
        for k in range(count):
            assert ask(connection, bodies[k % len(bodies)])[0] == 200
        connection.close()

    def send_all(count):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(send, [count // 4] * 4))

    send_all(1000)
    before = resident()
    send_all(requests)
    return resident() - before


BOUND = 8 * 2**20  # in 10,000 requests, 840 bytes each


@pytest.mark.slow
@pytest.mark.parametrize(("requests", "leak"), [(10_000, 0), (1000, 16_384)])
def test_memory_does_not_grow(server, detector, monkeypatch, requests, leak):
    """The second time something is kept of each request, twice the bound in all, which must show."""
    kept = []

    def leaking(texts):
        kept.append(b"x" * leak)
        return detector(texts)

    monkeypatch.setattr(detector, "threshold", 0.9)  # short answers: the time goes into JSON
    monkeypatch.setattr(server, "detector", leaking)
    monkeypatch.setattr(serve.Handler, "log_message", lambda *arguments: None)
    assert (growth(server, requests) > BOUND) == (leak > 0)
