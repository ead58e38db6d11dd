"""The caption server's client against servers that answer well, late, wrongly or not at all."""

from __future__ import annotations

import io
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxalign.core.types import UserError
from jaxalign.rewards import caption_server, captions
from jaxalign.rewards.host import HostReward

PROMPTS = ("a cat washing dishes", "a dog", "a bee playing chess")
PICTURES = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full((5, 8, 6, 3), 50, np.uint8)
BATCH = {"prompt": np.array([2, 0, 1, 1, 0])}


@pytest.fixture(autouse=True)
def _direct(monkeypatch):
    """No proxy of this machine stands between."""
    monkeypatch.setenv("no_proxy", "*")


@contextmanager
def running(server: HTTPServer):
    """The server's address while it answers."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/recall"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def answering(*answers: tuple[int, bytes] | float):
    """A server that gives these answers in turn, the last for ever; a number is a wait before."""
    asked: list[dict] = []

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = answers[min(len(asked), len(answers)) - 1]
            if isinstance(answer, float):
                time.sleep(answer)
                return
            self.send_response(answer[0])
            self.end_headers()
            self.wfile.write(answer[1])

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    with running(HTTPServer(("127.0.0.1", 0), Answer)) as url:
        yield url, asked


def recall(*numbers: object) -> tuple[int, bytes]:
    return 200, json.dumps({"recall": numbers}).encode()


GOOD = recall(0.5, 0.25, 1, 0.0, -0.125)


def complaint(*answers, **options) -> str:
    """The one line of a score that fails."""
    with answering(*answers) as (url, asked), pytest.raises(UserError) as caught:
        captions.caption_score(url, PROMPTS, pause=0.01, **options)(PICTURES, BATCH)
    text = str(caught.value)
    assert asked and "\n" not in text
    assert text.startswith(f"caption server {url}: ")
    return text


# --- the whole way -------------------------------------------------------------------------------


def test_pictures_and_prompts_arrive_and_numbers_come_back():
    """Through the frame of a server, three requests of at most two pictures, as a host reward."""
    asked = []

    def brightness(pictures: list[bytes], prompts: list[str]) -> list[float]:
        asked.append(prompts)
        opened = [Image.open(io.BytesIO(picture)) for picture in pictures]
        assert {(image.format, image.size) for image in opened} == {("JPEG", (6, 8))}
        return [np.asarray(image).mean() + len(p) for image, p in zip(opened, prompts, strict=True)]

    with running(caption_server.make_server(brightness, 0)) as url:
        score = captions.caption_score(url, PROMPTS, batch=2)
        with HostReward("captions", score) as reward:
            rows = {"prompt": jnp.asarray(BATCH["prompt"]), "target": {}}
            found = reward.result(reward.submit(jnp.asarray(PICTURES), rows))
    texts = [PROMPTS[row] for row in BATCH["prompt"]]
    assert asked == [texts[:2], texts[2:4], texts[4:]]
    expected = [50 * i + len(text) for i, text in enumerate(texts)]
    np.testing.assert_allclose(found, expected, atol=1.0)  # a JPEG is not exact


def test_a_failing_captioner_and_a_wrong_question():
    def broken(pictures, prompts):
        raise ValueError("no memory")

    assert caption_server._answer(broken, b'{"pictures": [], "prompts": []}')[0] == 500
    assert caption_server._answer(broken, b'{"pictures": 3}')[0] == 400
    assert caption_server._answer(broken, b"anything")[0] == 400
    with running(caption_server.make_server(broken, 0)) as url:
        score = captions.caption_score(url, PROMPTS, pause=0.01)
        with pytest.raises(UserError, match="status 500 at try 4 of 4"):
            score(PICTURES, BATCH)


# --- servers that are in trouble -----------------------------------------------------------------


def test_a_server_that_fails_at_first():
    with answering((500, b""), (503, b"loading"), GOOD) as (url, asked):
        found = captions.caption_score(url, PROMPTS, pause=0.01)(PICTURES, BATCH)
    np.testing.assert_array_equal(found, [0.5, 0.25, 1, 0, -0.125])
    assert len(asked) == 3 and asked[0] == asked[2]


def test_waits_grow(monkeypatch):
    waits = []
    monkeypatch.setattr(captions.time, "sleep", waits.append)
    with answering((503, b""), (503, b""), (503, b""), GOOD) as (url, _):
        captions.caption_score(url, PROMPTS)(PICTURES, BATCH)
    assert waits == [0.5, 1, 2]


def test_a_server_that_is_slow():
    assert "timed out at try 2 of 2" in complaint(0.3, timeout=0.1, tries=2)


def test_a_server_that_refuses():
    with answering((404, b"")) as (url, asked):
        with pytest.raises(UserError, match="status 404 at try 1 of 4"):
            captions.caption_score(url, PROMPTS)(PICTURES, BATCH)
        assert len(asked) == 1


def test_a_server_that_is_down():
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    url = f"http://127.0.0.1:{server.server_port}"
    server.server_close()
    with pytest.raises(UserError, match="refused at try 2 of 2; see that it") as caught:
        captions.caption_score(url, PROMPTS, tries=2, pause=0.01)(PICTURES, BATCH)
    assert f"caption server {url}: " in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (recall(0.5, 0.25), "gave 2 numbers for 5 pictures"),
        (recall(0.5, float("nan"), 1, 1, float("inf")), "gave 2 numbers that are not finite"),
        (recall(0.5, None, 1, 1, 1), "answered"),
        ((200, b"all is well"), "answered b'all is well', not"),
        ((200, b"[1, 2, 3, 4, 5]"), "answered"),
        ((200, b"\xff" * 1000), "answered"),
    ],
)
def test_answers_that_are_wrong(answer, said):
    text = complaint(answer)
    assert said in text and "mend the server" in text and len(text) < 400


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("localhost:8000", {}, "must begin with http"),
        ("http://localhost:8000", {"batch": 0}, "batch = 0"),
        ("http://localhost:8000", {"timeout": 0.0}, "timeout = 0"),
    ],
)
def test_settings_that_cannot_be(url, options, said):
    with pytest.raises(UserError, match=said):
        captions.caption_score(url, PROMPTS, **options)
