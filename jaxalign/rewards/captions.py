"""BERTScore of captions: a server describes each picture, and the reward is how much of the prompt
its words recall.

Black et al. 2024 (DDPO, arXiv 2305.13301), section 5.1 and appendix: LLaVA is asked what is going
on, and the recall of BERTScore (Zhang et al. 2020, arXiv 1904.09675, equation 1) between its answer
and the prompt is the reward. Both networks live in the server, so that it can be of any library
and on any machine; `rewards.caption_server` is the frame of one.

The protocol, JSON over HTTP. Asked by POST for at most `batch` pictures:

    {"pictures": ["<JPEG, quality 80, base64>", ...], "prompts": ["a cat washing dishes", ...]}

the server answers 200 with one number for each, in their order:

    {"recall": [0.61, ...]}

503 or another status from 500 on, and an answer that fails to come, are asked again after
0.5, 1, 2, ... seconds; all else is an error.

Departures: none; what is asked and which networks answer is the server's choice.

Dimensions: B pictures, H W their sides.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign.core.types import UserError
from jaxalign.rewards.host import Score

QUALITY = 80
FAULTY = 500  # the first status that says that the server failed, and not the question
PAUSE = 0.5  # seconds before the second try; each further one waits twice as long


def caption_score(
    url: str,
    prompts: Sequence[str],
    *,
    batch: int = 32,
    timeout: float = 60.0,
    tries: int = 4,
    pause: float = PAUSE,
) -> Score:
    """A score for `HostReward`: `(pictures [B, H, W, 3] u8, {"prompt": [B], ...}) -> [B] f64`.

    url: of the server, "http://host:port/...". prompts: the run's, to which batch["prompt"] points.
    batch: pictures a request. timeout: seconds that one may take, with those of the run's other
        processes before it. tries: of each request, `pause` seconds after the first failure, then
        twice as long each time.
    Give the `HostReward` a timeout that holds for all requests of a call.
    Raises: UserError for a url that is not of http, or numbers out of range; when scoring, one that
        names the url if the server cannot be reached, fails or answers something else.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"caption server {url!r}: must begin with http:// or https://; mend it")
    if min(batch, tries) < 1 or timeout <= 0:
        raise UserError(
            f"batch = {batch}, tries = {tries}, timeout = {timeout:g}: must be positive; mend them"
        )

    def score(pictures: np.ndarray, rows: Mapping[str, Any]) -> np.ndarray:
        texts = [prompts[row] for row in np.asarray(rows["prompt"])]
        found = []
        for first in range(0, len(pictures), batch):
            some = slice(first, first + batch)
            body = _question(pictures[some], texts[some])
            found += _recall(url, _ask(url, body, timeout, tries, pause), len(texts[some]))
        return np.array(found)

    return score


def jpeg(picture: np.ndarray) -> bytes:
    """The file of a picture `[H, W, 3] u8`, at quality 80."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def _question(pictures: np.ndarray, prompts: Sequence[str]) -> bytes:
    files = [base64.b64encode(jpeg(picture)).decode() for picture in pictures]
    return json.dumps({"pictures": files, "prompts": list(prompts)}).encode()


def _ask(url: str, body: bytes, timeout: float, tries: int, pause: float) -> bytes:
    """The server's answer, asked for up to `tries` times."""
    for trial in range(1, tries + 1):
        try:
            return _post(url, body, timeout)
        except (OSError, http.client.HTTPException) as error:
            status = getattr(error, "code", FAULTY)
            if status < FAULTY or trial == tries:
                raise UserError(
                    f"caption server {url}: {_said(error)} at try {trial} of {tries}; see that it "
                    "runs there, and its log"
                ) from error
        time.sleep(pause * 2 ** (trial - 1))
    raise AssertionError("unreachable")


def _post(url: str, body: bytes, timeout: float) -> bytes:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.read()


def _said(error: Exception) -> str:
    """The error in a few words, on one line."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        return f"status {error.code}"
    reason = getattr(error, "reason", error)
    return " ".join(str(reason).split()) or type(error).__name__


def _recall(url: str, answer: bytes, count: int) -> list[float]:
    """The numbers of an answer, checked."""
    try:
        found = json.loads(answer)["recall"]
        numbers = [float(number) for number in found]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'caption server {url}: answered {answer[:60]!r}, not {{"recall": [...]}}; mend the '
            "server"
        ) from error
    bad = [number for number in numbers if not math.isfinite(number)]
    if len(numbers) != count or bad:
        what = f"{len(bad)} numbers that are not finite" if bad else f"{len(numbers)} numbers"
        raise UserError(f"caption server {url}: gave {what} for {count} pictures; mend the server")
    return numbers
