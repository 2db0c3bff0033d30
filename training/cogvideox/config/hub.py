"""Uploads the result of a run to a repository on the Hugging Face Hub.

``check_hub`` checks the flags without a network. ``open_repository`` creates the repository at the start of the run, so
that a wrong token or a missing permission is reported before training. ``upload`` adds the result in one commit. The
token is used only in the headers of requests and is never written to a file, a message or a log.

A repository belongs to the run whose id is in its recipe.json. huggingface_hub would replace the files of any other
repository that the token may write to, and mix them with those that are left. Such a repository is refused, unless it
has only what the website writes into a new one.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cogvideox.config.flags import HIDDEN, HubFlags
from cogvideox.config.options import TrainOptions
from cogvideox.errors import UsageError, first_names, public_urls

WAITS = (2.0, 8.0, 30.0)  # seconds before the second, third and fourth attempt
PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses after which another attempt may succeed
REFUSALS = {
    401: "the hub does not know this token; give another one with `hf auth login`, HF_TOKEN or --hub_token",
    403: "this token may not write there; give one that may, or another --hub_model_id",
    404: "there is no such namespace, or this token may not see it; give another --hub_model_id",
}

RECIPE_NAME = "recipe.json"  # the settings of a finished run, with its id
CARD_NAME = "README.md"  # the model card
MADE_BY_THE_HUB = {".gitattributes", CARD_NAME}  # a new repository has the first; one from the website often has both
NAMED = 3  # files that a message names

Result = TypeVar("Result")
Say = Callable[[str], None]


def token_of(hub: HubFlags) -> str | None:
    """Returns the token of the flag, else of HF_TOKEN, else of the saved login."""
    from huggingface_hub import get_token

    return hub.hub_token or get_token()


def repository_name(options: TrainOptions) -> str:
    """Returns --hub_model_id, or else the name of the output folder."""
    return options.hub.hub_model_id or Path(options.train.output_dir).resolve().name


def check_hub(options: TrainOptions) -> Iterator[str]:
    """Yields problems of --push_to_hub, for args.parse. Uses no network."""
    if not options.hub.push_to_hub:
        return
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if constants.HF_HUB_OFFLINE:
        yield "--push_to_hub: HF_HUB_OFFLINE is set; unset it, or leave the flag out"
    if not token_of(options.hub):
        yield "--push_to_hub: there is no token; run `hf auth login`, set HF_TOKEN, or give --hub_token"
    try:
        validate_repo_id(repository_name(options))
    except HFValidationError:
        name = options.hub.hub_model_id
        subject = f"--output_dir {options.train.output_dir}" if name is None else f"--hub_model_id {name}"
        rule = "is not a valid name of a repository, which has letters and digits, with single -, _ or . between them"
        yield f"{subject}: {rule}; give --hub_model_id NAME or NAMESPACE/NAME"


def open_repository(options: TrainOptions, run_id: str, say: Say) -> str | None:
    """Creates or finds the repository, and checks that the token has write access and that no other files are lost.

    Args:
        options: The flags.
        run_id: The id of the run, which its recipe.json has.
        say: Prints a line.

    Returns:
        The namespace/name of the repository, or None without --push_to_hub.

    Raises:
        UsageError: The hub refuses, or cannot be reached, or the repository has files of something else.
    """
    hub, name = options.hub, repository_name(options)
    if not hub.push_to_hub:
        return None
    from huggingface_hub import HfApi

    token = token_of(hub)
    api = HfApi(token=token)

    def make() -> str:
        repository = api.create_repo(name, private=hub.hub_private or None, exist_ok=True).repo_id
        api.auth_check(repository, write=True)  # An existing repository may belong to somebody else.
        if CARD_NAME in check_content(repository, hub, run_id):
            say(f"{repository}: the model card will replace its {CARD_NAME}, which stays in the history")
        return repository

    try:
        return patiently(make, say)
    except ForeignFilesError as error:
        raise UsageError(f"--push_to_hub: {error}") from None
    except failures() as error:
        usual = "fix that, or train without the flag; afterwards the same command with it uploads"
        rule = REFUSALS.get(http_status(error) or 0, usual)
        raise UsageError(f"--push_to_hub: {name}: {reason(error, token)}: {rule}") from None


class ForeignFilesError(UsageError):
    """Reports that a repository has files of something else than this run."""


def check_content(repository: str, hub: HubFlags, run_id: str) -> set[str]:
    """Checks that a repository is new or has the result of this run, unless --hub_overwrite is given.

    Returns:
        The names of the files of a new repository; an empty set if the repository is not new, or was not checked.

    Raises:
        ForeignFilesError: It has files of something else.
    """
    from huggingface_hub import HfApi

    if hub.hub_overwrite:
        return set()
    names = {file.rfilename for file in HfApi(token=token_of(hub)).model_info(repository).siblings or []}
    if names <= MADE_BY_THE_HUB:
        return names
    if RECIPE_NAME in names and run_id_in(repository, hub) == run_id:
        return set()
    shown = first_names(sorted(names - {".gitattributes"}), NAMED)
    fix = "give another --hub_model_id, or --hub_overwrite, which replaces its files of the same names"
    raise ForeignFilesError(f"{repository}: has files that are not from this run ({shown}); {fix}")


def run_id_in(repository: str, hub: HubFlags) -> str | None:
    """Returns the id of the run whose result is in a repository, which must have a recipe.json; None without an id."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = f"{HfApi().endpoint}/{repository}/resolve/main/{RECIPE_NAME}"
    answer = get_session().get(url, headers=build_hf_headers(token=token_of(hub)))
    hf_raise_for_status(answer)
    try:
        recipe = json.loads(answer.content)
    except ValueError:
        return None
    return recipe.get("run") if isinstance(recipe, dict) else None


def upload(repository: str, hub: HubFlags, run_id: str, folder: Path, files: Sequence[Path], say: Say) -> None:
    """Uploads files of a finished run in one commit. Unchanged files are not sent again.

    The content of the repository is checked again, because another run may have finished since the start of this one.

    Args:
        repository: Its namespace/name.
        hub: The flags.
        run_id: The id of the run.
        folder: The output folder.
        files: The files in it to upload.
        say: Prints a line.

    Raises:
        UsageError: The upload failed. No file on the disk has changed, and the upload can be repeated.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    token = token_of(hub)
    api = HfApi(token=token)

    def commit() -> None:
        check_content(repository, hub, run_id)
        # The operations are created for each attempt, because a commit changes them.
        operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files]
        api.create_commit(repository, operations, commit_message="Add the result of a finished run")

    start = f"{folder}: is finished, but was not uploaded"
    try:
        patiently(commit, say)
    except ForeignFilesError as error:
        raise UsageError(f"{start}: {error}; then the same command only uploads") from None
    except failures() as error:
        again = "the same command again only uploads"
        raise UsageError(f"{start} to {repository}: {reason(error, token)}; {again}") from None
    say(f"uploaded: {public_urls(api.endpoint)}/{repository}")


def patiently(call: Callable[[], Result], say: Say) -> Result:
    """Returns the result of ``call``, and repeats it after each wait if its failure may be temporary."""
    for wait in WAITS:
        try:
            return call()
        except failures() as error:
            if not may_pass(error):
                raise
            say(f"the hub does not answer ({http_status(error) or type(error).__name__}); trying again in {wait:g} s")
        time.sleep(wait)
    return call()


def failures() -> tuple[type[Exception], ...]:
    """Returns the errors that huggingface_hub raises when a request fails."""
    from huggingface_hub.errors import HTTPError

    return (HTTPError, OSError, ValueError, RuntimeError)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, followed by the errors that caused it."""
    while error is not None:
        yield error
        error = error.__cause__


def http_status(error: BaseException) -> int | None:
    """Returns the HTTP status behind an error, or None if there was no answer."""
    responses: list[Any] = [getattr(link, "response", None) for link in chain(error)]
    return next((response.status_code for response in responses if response is not None), None)


def may_pass(error: BaseException) -> bool:
    """Returns whether another attempt may succeed, because the hub had a fault or did not answer.

    The upload of a large file raises a RuntimeError if the hub does not answer.
    """
    from huggingface_hub.errors import HTTPError

    status = http_status(error)
    if status is not None:
        return status in PASSING
    return any(isinstance(link, HTTPError | ConnectionError | TimeoutError | RuntimeError) for link in chain(error))


def reason(error: BaseException, token: str | None) -> str:
    """Returns the messages of an error and its causes, up to the answer of the hub, on one line without the token."""
    texts = []
    for link in chain(error):
        answer = getattr(link, "server_message", None)
        text = " ".join(f"{http_status(link)} {answer}".split() if answer else str(link).split())
        texts.append(text or type(link).__name__)
        if getattr(link, "response", None) is not None:
            break
    text = "; ".join(dict.fromkeys(texts))
    return text.replace(token, HIDDEN) if token else text
