"""Imitates an OpenAI-compatible server with a vision-language model, as `vllm serve` is one."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

Answer = tuple[int, object]


def says(text: str, finish_reason: str = "stop") -> Answer:
    """Returns the answer of a chat with this text."""
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}]}


@dataclass
class CaptionServer:
    """Records every request, and answers with the number of its pictures unless ``answer`` says something else.

    Attributes:
        models: The names of the models.
        answer: Returns the answer to a request, from its number, counted from 0, and its body.
        requests: The bodies of all requests for captions.
        keys: The values of the header Authorization, of all requests.
        most: Largest number of requests at the same time.
        url: The value of --endpoint.
    """

    models: tuple[str, ...] = ("tiny-vl",)
    answer: Callable[[int, dict[str, Any]], Answer] = lambda number, body: says(f"Pictures: {len(pictures(body))}.")
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most: int = 0
    url: str = ""
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, path: str, body: bytes, key: str | None) -> Answer:
        """Returns the answer to one request."""
        with self._lock:
            self.keys.append(key)
            if path == "/v1/models":
                return 200, {"data": [{"id": name} for name in self.models]}
            if path != "/v1/chat/completions":
                return 404, {"detail": "Not Found"}
            number = len(self.requests)
            self.requests.append(json.loads(body))
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            return self.answer(number, self.requests[number])
        finally:
            with self._lock:
                self._now -= 1


def pictures(body: dict[str, Any]) -> list[Image.Image]:
    """Returns the pictures of a request, decoded."""
    parts = [part for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    urls = [part["image_url"]["url"] for part in parts]
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def texts(body: dict[str, Any]) -> list[str]:
    """Returns the texts of a request."""
    return [part["text"] for part in body["messages"][0]["content"] if part["type"] == "text"]


@contextmanager
def serving(server: CaptionServer) -> Iterator[CaptionServer]:
    """Runs the server on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(b"")

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers["Content-Length"])))

        def _answer(self, body: bytes) -> None:
            status, answer = server.reply(self.path, body, self.headers.get("Authorization"))
            content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listener.server_address[1]}/v1"
    thread = threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
