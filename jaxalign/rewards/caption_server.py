"""The frame of a caption server, the other side of `rewards.captions`, whose docstring has the
protocol: fill in the captioner.

    from jaxalign.rewards.caption_server import serve

    def recall(pictures, prompts):  # JPEG files as bytes, prompts -> a number each
        captions = my_captioner(pictures, "Describe concisely what is going on in the picture.")
        references = [f"The image contains {prompt}" for prompt in prompts]
        return my_bert_score(captions, references).recall

    serve(recall, port=8000)

The standard library alone, so that it runs in the captioner's own environment. Requests are
answered one after the other, as one captioner would; those of a run's other processes wait.

Dimensions: B pictures of a request.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer

WAITING = 128  # requests that may wait, of so many processes

# (B JPEG files, B prompts) -> B numbers
Recall = Callable[[list[bytes], list[str]], Sequence[float]]


def serve(recall: Recall, port: int, host: str = "127.0.0.1") -> None:
    """Answers until it is interrupted. host: "0.0.0.0" for other machines too."""
    with make_server(recall, port, host) as server:
        server.serve_forever()


def make_server(recall: Recall, port: int, host: str = "127.0.0.1") -> HTTPServer:
    """The server, which has its port and answers nothing yet; port: 0 for any that is free."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, answer = _answer(recall, body)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            logging.info(format, *args)

    class Server(HTTPServer):
        request_queue_size = WAITING

    return Server((host, port), Answer)


def _answer(recall: Recall, body: bytes) -> tuple[int, bytes]:
    """Status and body of the answer: 400 for a question of another form, 500 if `recall` failed."""
    try:
        question = json.loads(body)
        pictures = [base64.b64decode(file) for file in question["pictures"]]
        prompts = [str(prompt) for prompt in question["prompts"]]
    except (ValueError, KeyError, TypeError):
        return 400, b'{"error": "not {\\"pictures\\": [...], \\"prompts\\": [...]}"}'
    try:
        numbers = [float(number) for number in recall(pictures, prompts)]
    except Exception:  # the server stays, and the client asks again
        logging.exception("the captioner failed")
        return 500, b'{"error": "the captioner failed; see the server\'s log"}'
    return 200, json.dumps({"recall": numbers}).encode()
