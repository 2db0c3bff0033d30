"""Asks a vision-language model on an OpenAI-compatible server, such as `vllm serve`, for a caption.

``VisionServer`` finds the model that the server has, and sends the frames of a clip to it. A request that fails because
the server is busy or cannot be reached is repeated a limited number of times.
"""

import base64
import difflib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cogvideox.config.flags import CaptionFlags
from cogvideox.data.media.pixels.stills import Stills
from cogvideox.errors import UsageError, one_line, plural

KEY_VARIABLE = "OPENAI_API_KEY"
BUSY = {408, 409, 425, 429, 500, 502, 503, 504}  # HTTP statuses after which the same request may succeed
REFUSED_FOR_ALL = {401, 403, 404, 405}  # HTTP statuses that every other request would have, too
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two attempts; each pause is twice the one before
LOOPBACK = {"localhost", "127.0.0.1", "::1"}  # names of this machine
MOST_BYTES = 16 * 2**20  # of an answer
# What reasoning models put before their answer. Some chat templates begin it, so that the answer has only its end.
_THOUGHTS = re.compile(r".*</think>", re.DOTALL)
_SENTENCES = re.compile(r".*[.!?](?=\s|$)", re.DOTALL)


class ClipRefused(Exception):
    """Says in one line why the model did not describe one clip. Other clips may have no problem."""


class ClipUnreadable(ClipRefused):
    """Says in one line why the model was not asked: the clip has no frames that can be read."""


Request = tuple[Stills, str]  # frames of a clip, and the instruction for it
Answer = str | ClipRefused  # the caption of a clip, or why there is none


@dataclass
class VisionServer:
    """A server, and the model on it.

    Attributes:
        flags: The flags of captions.
        pause: Waits for a number of seconds.
        model: Name of the model, which ``connect`` finds.
        threads: Number of threads that may call ``describe``.
        batch_size: Number of clips of one call.
    """

    flags: CaptionFlags
    pause: Callable[[float], None] = time.sleep
    model: str = field(default="", init=False)
    threads: int = field(init=False)
    batch_size: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        self.threads = self.flags.concurrency

    def connect(self) -> None:
        """Finds the model on the server.

        Raises:
            UsageError: The server cannot be reached, or does not have the model.
        """
        wanted = self.flags.caption_model
        try:
            status, answer = self._exchange("models", None)
        except OSError as error:
            raise UsageError(self._unreachable(error)) from None
        if status in (404, 405, 501) and wanted:  # some servers do not list their models
            self.model = wanted
            return
        names = _names(answer) if status == 200 else None
        if names is None:
            fix = "the URL of most servers ends in /v1" if status in (200, 404) else f"{KEY_VARIABLE} holds the key"
            raise UsageError(f"{self._flag}/models: status {status}: {_message(answer)}; {fix}")
        if wanted is None and len(names) != 1:
            listed = ", ".join(names[:10]) or "no model"
            raise UsageError(f"{self._flag}: the server has {listed}; choose a model with --caption_model")
        if wanted is not None and wanted not in names:
            near = difflib.get_close_matches(wanted, names, 1, 0.0)
            nearest = f"nearest: --caption_model {near[0]}" if near else "it has none"
            raise UsageError(f"--caption_model {wanted}: the server at {self._url} lacks it; {nearest}")
        self.model = wanted or names[0]

    def describe(self, requests: Sequence[Request]) -> list[Answer]:
        """Returns the answer for each clip; see ``VisionModel.describe``. Several threads may call this."""
        answers: list[Answer] = []
        for stills, instruction in requests:
            try:
                answers.append(self.caption(stills, instruction))
            except ClipRefused as error:
                answers.append(error)
        return answers

    def caption(self, stills: Stills, instruction: str) -> str:
        """Returns the caption of a clip.

        Args:
            stills: Frames of the clip.
            instruction: What the model is asked for.

        Raises:
            ClipRefused: The server refuses this request, or gives no text.
            UsageError: The server cannot be reached, or would refuse every request.
        """
        urls = [f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" for jpeg in stills.jpegs]
        content = message_parts(stills, instruction, [{"type": "image_url", "image_url": {"url": url}} for url in urls])
        messages = [{"role": "user", "content": content}]
        request = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.flags.caption_tokens,
            "temperature": 0,
        }
        return caption_in(self._patiently(request))

    def _patiently(self, request: dict[str, object]) -> Any:
        """Sends a request as often as --request_attempts allows, and returns the answer."""
        for attempt in range(self.flags.request_attempts):
            if attempt:
                self.pause(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1)))
            try:
                status, answer = self._exchange("chat/completions", request)
            except OSError as error:
                problem = self._unreachable(error)
                continue
            if status == 200:
                return answer
            problem = f"{self._flag}/chat/completions: status {status}: {_message(answer)}"
            if status in REFUSED_FOR_ALL:
                raise UsageError(f"{problem}; check --endpoint, --caption_model and {KEY_VARIABLE}")
            if status not in BUSY:
                raise ClipRefused(problem)
        tried = f"tried {plural(self.flags.request_attempts, 'time')}"
        raise UsageError(f"{problem}; {tried}; captions so far are written, and the same command continues")

    def _exchange(self, path: str, body: dict[str, object] | None) -> tuple[int, Any]:
        """Returns the status and the parsed body of one answer.

        Raises:
            OSError: The server cannot be reached, or the connection broke.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}/{path}", data, headers)
        # A proxy in the environment cannot connect to a server on this machine.
        proxies = [urllib.request.ProxyHandler({})] if self._host in LOOPBACK else []
        try:
            with urllib.request.build_opener(*proxies).open(request, timeout=self.flags.request_timeout) as answer:
                return answer.status, _parsed(answer.read(MOST_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _parsed(error.read(MOST_BYTES))
        except http.client.HTTPException as error:
            raise ConnectionError(f"the connection broke ({type(error).__name__})") from None

    @property
    def _url(self) -> str:
        return (self.flags.endpoint or "").rstrip("/")

    @property
    def _host(self) -> str:
        return urllib.parse.urlsplit(self._url).hostname or ""

    @property
    def _flag(self) -> str:
        return f"--endpoint {self._url}"

    def _unreachable(self, error: OSError) -> str:
        cause = getattr(error, "reason", error)
        text = "timed out" if isinstance(cause, TimeoutError) else getattr(cause, "strerror", None) or str(cause)
        fix = "start a server, for example with: vllm serve Qwen/Qwen2.5-VL-7B-Instruct"
        if isinstance(cause, TimeoutError):
            fix = "raise --request_timeout or lower --concurrency"
        elif self._host not in LOOPBACK and urllib.parse.urlsplit(self._url).scheme in urllib.request.getproxies():
            fix += f"; the environment sets a proxy, which no_proxy={self._host} avoids"
        return one_line(f"{self._flag}: {text}; {fix}")


def message_parts(stills: Stills, instruction: str, pictures: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Returns the parts of a message: each picture after its time, and the instruction at the end."""
    parts: list[dict[str, object]] = []
    for seconds, picture in zip(stills.times, pictures, strict=True):
        parts += [{"type": "text", "text": f"Frame at {seconds:.1f} s:"}, picture]
    return [*parts, {"type": "text", "text": instruction}]


def check_endpoint(flags: CaptionFlags) -> Iterator[str]:
    """Yields a problem if --endpoint is not a URL."""
    url = flags.endpoint
    if url is not None and not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", url):
        yield f"--endpoint {url}: is not the URL of a server; give one such as http://localhost:8000/v1"


def caption_in(answer: Any) -> str:
    """Returns the caption in an answer of a chat, without the thoughts of the model and without half a sentence.

    Raises:
        ClipRefused: There is none.
    """
    try:
        choice = answer["choices"][0]
        text = _THOUGHTS.sub("", choice["message"]["content"] or "").strip()
        is_cut = choice.get("finish_reason") == "length"
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ClipRefused(f"the answer of the server has no text: {_message(answer)}") from None
    if is_cut:
        whole = _SENTENCES.match(text)
        text = whole[0] if whole and "<think>" not in text else ""
        if not text:
            raise ClipRefused("the answer has no complete sentence; raise --caption_tokens")
    if not text:
        raise ClipRefused("the answer is empty; try another --caption_prompt")
    return text


def _names(answer: Any) -> list[str] | None:
    """Returns the names in a list of models; None if the answer is none."""
    try:
        return [str(model["id"]) for model in answer["data"]]
    except (KeyError, TypeError):
        return None


def _parsed(body: bytes) -> Any:
    """Returns the value of a JSON text, or else the text itself."""
    text = body.decode(errors="replace")
    try:
        return json.loads(text)
    except ValueError:
        return text


def _message(answer: Any) -> str:
    """Returns the server's own message in an answer, in one line."""
    if isinstance(answer, dict):
        inner = answer.get("error") or answer.get("message") or answer.get("detail") or answer
        answer = inner.get("message", inner) if isinstance(inner, dict) else inner
    return one_line(str(answer).strip() or "no message")
