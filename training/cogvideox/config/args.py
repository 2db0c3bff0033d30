"""Parses the command line of a script, reports all problems at once, and sets the exit status.

``run_script`` is the entry point of each script; ``parse`` returns its options. The command line becomes strings
(argparse), then typed groups of flags (``read_flags``), then options with derived values, and finally one message with
all problems. flags.py defines the flags, options.py what each script accepts, and conflicts.py what contradicts what.
This module needs only the standard library, so that --help takes half a second.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import logging
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

from cogvideox import __version__, caches, console, stopping
from cogvideox.config.conflicts import flag_problems, remarks
from cogvideox.config.flags import HIDDEN, INFORMATION, MAIN_FLAGS
from cogvideox.config.foreign_flags import AcceptedFlag, accepted_flags, request_problems
from cogvideox.config.launch import check_launch
from cogvideox.config.options import (
    LoraOptions,
    Options,
    ScriptOptions,
    derive,
    derive_video_size,
    fields_of,
    names_of,
)
from cogvideox.config.prepared_flags import as_prepared
from cogvideox.config.presets import fill_in
from cogvideox.errors import (
    LostRankError,
    NonFiniteError,
    UsageError,
    limit_problem,
    one_line,
    plural,
    public_urls,
)
from cogvideox.files import disk_errors_converted

EPILOG = "To see every flag of this script, use --help_all."
ALL_EPILOG = "Flags of the suite's other scripts are accepted and reported as having no effect."
IDLE_HEADING = "accepted from other commands, without effect in this script"
NO_EFFECT = "no effect"  # origin of the value of a flag that the script does not use
ERROR_EXIT, USAGE_EXIT, NON_FINITE_EXIT = 1, 2, 3
# Loggers of packages that, when merely installed, warn about extras that the suite does not use, and of one that warns
# of a home folder that cannot be written.
NOISY = (
    "bitsandbytes",
    "torchao",
    "torch.utils._pytree",
    "diffusers.quantizers.torchao.torchao_quantizer",
    "matplotlib",
)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows for each flag the values that it accepts, although argparse accepts any number of strings."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return str(action.metavar) if action.nargs == "*" else super()._format_args(action, default_metavar)


def value_type(annotation: Any) -> tuple[type, bool]:
    """Returns the type of one value of a flag, and whether the flag takes several values."""
    arguments = [a for a in typing.get_args(annotation) if a not in (NoneType, Ellipsis)]
    return (arguments[0] if arguments else annotation), typing.get_origin(annotation) is tuple


class ShowAll(argparse.Action):
    """Prints the help with every flag and ends the script. ``const`` is a function that returns the parser for it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        self.const().print_help()
        parser.exit()


def build_parser(options_type: type, description: str | None, every: bool = False) -> argparse.ArgumentParser:
    """Returns a parser that leaves every value as the list of strings that was typed.

    Args:
        options_type: The options of the script.
        description: The text at the top of the help.
        every: Show every flag in the help instead of only those of MAIN_FLAGS.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s --flag value ...",
        description=description,
        epilog=ALL_EPILOG if every else EPILOG,
        allow_abbrev=False,
        add_help=False,
        formatter_class=HelpFormatter,
    )
    groups: dict[str, Any] = {}
    for heading, flag in help_rows(options_type):
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        is_shown = (every or heading in MAIN_FLAGS) and not flag.refused
        groups[heading].add_argument(
            *(f"--{name}" for name in flag.names),
            dest=flag.item.name,
            nargs="*",
            default=argparse.SUPPRESS,
            metavar=metavar_of(flag.item, flag.annotation),
            help=help_text(flag).replace("%", "%%") if is_shown else argparse.SUPPRESS,
        )
    add_information_flags(groups[INFORMATION], partial(build_parser, options_type, description, every=True))
    return parser


def add_information_flags(group: Any, all_flags: Callable[[], argparse.ArgumentParser]) -> None:
    """Adds the flags that print something and end the script.

    Args:
        group: The group of argparse that shows them.
        all_flags: Returns the parser for --help_all.
    """
    group.add_argument("-h", "--help", action="help", help="show the flags that most runs need, and exit")
    group.add_argument(
        "--help_all",
        action=ShowAll,
        nargs=0,
        const=all_flags,
        default=argparse.SUPPRESS,
        help="show every flag, and exit",
    )
    group.add_argument("--version", action="version", version=__version__, help="show the version, and exit")


def help_rows(options_type: type) -> Iterator[tuple[str, AcceptedFlag]]:
    """Yields (heading, flag) of each flag that a script accepts, in the order of the help.

    The flags of MAIN_FLAGS come first, then the others by their groups, and the flags without effect last.
    """
    accepted = accepted_flags(options_type)
    used = {flag.item.name: flag for flag in accepted if not flag.unused}
    for heading, names in MAIN_FLAGS.items():
        yield from ((heading, used.pop(name)) for name in names if name in used)
    yield from ((f"more flags: {str(flag.group).replace('_', ' ')}", flag) for flag in used.values())
    yield from ((IDLE_HEADING, flag) for flag in accepted if flag.unused)


def metavar_of(item: "dataclasses.Field[Any]", annotation: Any) -> str:
    """Returns the placeholder for the value of a flag in the help, such as INT, yes|no or [true|false]."""
    of, many = value_type(annotation)
    shown = (*item.metadata["choices"], *(["DOTTED.NAME"] if item.metadata["dotted"] else []))
    value = "|".join(shown) or ("true|false" if of is bool else of.__name__.upper())
    optional = of is bool or item.metadata["const"]
    return f"[{value}]" if optional else (f"{value} ..." if many else value)


def help_text(flag: AcceptedFlag) -> str:
    """Returns the help line of a flag, followed by the default in brackets, or why the script does not use it."""
    if flag.unused:
        return flag.unused
    item, text = flag.item, str(flag.item.metadata["help"])
    if item.default is dataclasses.MISSING:
        return f"{text} [required]"
    shown = " ".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
    return text if shown in (None, "") else f"{text} [{shown}]"


def as_typed(item: "dataclasses.Field[Any]", texts: Sequence[str]) -> str:
    """Returns a flag with its value for messages; for a secret, only the flag."""
    return f"--{item.name}" if item.metadata["secret"] else f"--{item.name} {' '.join(texts)}"


def typed_value(item: "dataclasses.Field[Any]", of: type, text: str) -> Any:
    """Returns the value that one string stands for.

    Args:
        item: The field of the flag.
        of: The type of the value.
        text: The string that was typed.

    Raises:
        UsageError: The value is not accepted; the message has the rule and the nearest fix.
    """
    name = as_typed(item, [text])
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UsageError(f"--{item.name}: contains bytes that are not valid UTF-8")
    if of is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise UsageError(f"{name}: takes true or false, or nothing for true")
        return text.lower() in ("true", "1", "yes")
    choices = item.metadata["choices"]
    if choices and not (item.metadata["dotted"] and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", text)):
        value = next((choice for choice in choices if choice.lower() == text.lower()), None)
        if value is None:
            near = difflib.get_close_matches(text.lower(), choices, 1, 0.4)
            among = f"must be one of {', '.join(choices)}" + (", or a dotted name" if item.metadata["dotted"] else "")
            raise UsageError(f"{name}: {among}" + (f"; nearest: {near[0]}" if near else ""))
        return value
    try:
        value = of(text)
    except ValueError:
        raise UsageError(f"{name}: takes {'a whole number' if of is int else 'a number'}") from None
    least, most, below = item.metadata["least"], item.metadata["most"], item.metadata["below"]
    if of in (int, float) and not math.isfinite(value):
        raise UsageError(f"{name}: must be a finite number")
    if least is not None and not value >= least:  # NaN fails too
        raise UsageError(f"{name}: must be at least {least}; nearest: {least}")
    if most is not None and not value <= most:
        raise UsageError(f"{name}: must be at most {most}; nearest: {most}")
    if below is not None and not value < below:
        raise UsageError(f"{name}: must be less than {below}")
    return value


def read_value(item: "dataclasses.Field[Any]", annotation: Any, given: Sequence[str]) -> Any:
    """Returns the value of a flag.

    Args:
        item: The field of the flag.
        annotation: The type of its value.
        given: The strings that follow the flag on the command line.

    Raises:
        UsageError: There is no value, or too many, or one that is not accepted.
    """
    of, many = value_type(annotation)
    bare = "true" if of is bool else item.metadata["const"]
    texts = list(given) or ([bare] if bare else [])
    if not texts:
        choices = item.metadata["choices"]
        accepted = f", one of {', '.join(choices)}" if choices else ""
        raise UsageError(f"--{item.name}: takes a value{accepted}: {item.metadata['help']}")
    if many:
        return tuple(typed_value(item, of, text) for text in texts)
    if len(texts) > 1:
        raise UsageError(f"{as_typed(item, texts)}: takes one value; quote it if it has spaces")
    return typed_value(item, of, texts[0])


def unknown_flags(rest: Sequence[str], options_type: type) -> Iterator[str]:
    """Yields a problem for each flag that does not exist, with the most similar one. Values of such flags are ignored.

    Args:
        rest: The words of the command line that belong to no known flag.
        options_type: The options of the script, whose flags are suggested.
    """
    own = [name for _, item, _ in fields_of(options_type) for name in names_of(item)]
    known = [*own, "help", "help_all", "version"]
    names = [text.split("=")[0] for text in rest]
    for name in names:
        if name.startswith("--"):
            near = nearest_flag(name.removeprefix("--").replace("-", "_"), known)
            yield f"{name}: no such flag; " + (f"nearest: --{near}" if near else "see --help_all")
        elif name == names[0]:
            yield f"{name}: does not belong to any flag"


def nearest_flag(name: str, known: Sequence[str]) -> str | None:
    """Returns the most similar known flag: one that has all words of the name, or else one with similar letters."""
    words = set(name.split("_"))
    longer = [flag for flag in known if words <= set(flag.split("_"))]
    return next(iter(difflib.get_close_matches(name, longer, 1, 0) or difflib.get_close_matches(name, known, 1)), None)


def spelling(argv: Sequence[str], names: Sequence[str]) -> str:
    """Returns the name under which a flag was given.

    Raises:
        UsageError: The flag was given under two of its names.
    """
    given = {text.split("=")[0] for text in argv}
    used = [name for name in names if f"--{name}" in given]
    if len(used) > 1:
        raise UsageError(f"--{used[0]}: is the same flag as --{used[1]}; give one of them")
    return used[0]


def foreign_remarks(options: ScriptOptions, sources: dict[str, str]) -> Iterator[str]:
    """Yields remarks about flags of other scripts and trainers, which are accepted but have no effect."""
    return (flag.report for flag in accepted_flags(type(options)) if sources.get(flag.item.name) == NO_EFFECT)


def read_flags(
    options_type: type[Options], argv: Sequence[str], description: str | None
) -> tuple[Options, dict[str, str]]:
    """Returns the options with given values and defaults, and where each value comes from, by flag.

    Raises:
        UsageError: There are unknown flags, bad values or missing flags; the error lists all of them.
    """
    namespace, rest = build_parser(options_type, description).parse_known_args(list(argv))
    preset = fill_in(namespace) if issubclass(options_type, LoraOptions) else set()
    problems = list(unknown_flags(rest, options_type))
    values: dict[str, dict[str, Any]] = {name: {} for name in typing.get_type_hints(options_type)}
    sources = {item.name: "default" for _, item, _ in fields_of(options_type)}
    for flag in accepted_flags(options_type):
        item = flag.item
        if not hasattr(namespace, item.name):
            if item.default is dataclasses.MISSING and not flag.unused:
                problems.append(f"--{item.name}: is required: {item.metadata['help']}")
            continue
        try:
            used = item.name if item.name in preset else spelling(argv, flag.names)
            value = read_value(item, flag.annotation, getattr(namespace, item.name))
        except UsageError as error:
            problems.extend(error.problems)
            continue
        if flag.refused and value is not False:
            problems.append(flag.report)
        elif flag.unused and value is not False:
            sources[item.name] = NO_EFFECT
        elif item.name in preset:
            sources[item.name] = "preset"
        else:
            sources[item.name] = "given" if used == item.name else f"given as --{used}"
        if flag.group is not None:
            values[flag.group][item.name] = value
    problems.extend(request_problems(options_type, values))
    if problems:
        raise UsageError(problems)
    groups = {name: of(**values[name]) for name, of in typing.get_type_hints(options_type).items()}
    return options_type(**groups), sources


def config_text(options: ScriptOptions, sources: dict[str, str]) -> str:
    """Returns the text of --print_config: one line per flag with its origin and value."""
    lines = []
    for group_name, item, _ in fields_of(type(options)):
        value = to_show(item, getattr(getattr(options, group_name), item.name))
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        lines.append(f"{item.name:31} {sources[item.name]:30} {shown}".rstrip())
    return "\n".join(lines)


def config_dict(options: ScriptOptions) -> dict[str, object]:
    """Returns all values by flag for config.json, the recipe and trackers, without secrets (also those in URLs)."""
    return {
        item.name: to_show(item, getattr(getattr(options, group), item.name))
        for group, item, _ in fields_of(type(options))
    }


def to_show(item: "dataclasses.Field[Any]", value: object) -> object:
    """Returns a value without what must not be shown: HIDDEN in place of a secret, and URLs without their queries."""
    if item.metadata["secret"] and value is not None:
        return HIDDEN
    if isinstance(value, tuple):
        return tuple(to_show(item, one) for one in value)
    return public_urls(value) if isinstance(value, str) else value


def hide_secrets(options: ScriptOptions) -> None:
    """Removes the values of secrets from sys.argv, which trackers record."""
    values = [(item, getattr(getattr(options, group), item.name)) for group, item, _ in fields_of(type(options))]
    for secret in [value for item, value in values if item.metadata["secret"] and value]:
        sys.argv[1:] = [text.replace(secret, HIDDEN) for text in sys.argv[1:]]
    sys.argv[1:] = [public_urls(text) for text in sys.argv[1:]]


def parse(
    options_type: type[Options],
    description: str | None = None,
    argv: Sequence[str] | None = None,
    checks: Sequence[Callable[[Options], Iterator[str]]] = (),
) -> Options:
    """Returns the options of a script. ``--help`` and ``--print_config`` print their text and exit with status 0.

    Args:
        options_type: The options of the script.
        description: The text at the top of the help.
        argv: The command line; None is that of the process.
        checks: Functions that yield problems of the files and configs (never of weights) that the options name. They
            run after the flags have been read, and not for ``--print_config``.

    Raises:
        UsageError: There are problems; it lists all of them.
    """
    options, sources = read_flags(options_type, sys.argv[1:] if argv is None else argv, description)
    options = derive(options, sources)
    problems = list(flag_problems(options, sources))
    options, found = as_prepared(options, sources, read_value)
    problems.extend(found)
    options = derive_video_size(options, sources)
    if not problems and stopping.speaks():
        for remark in (*foreign_remarks(options, sources), *remarks(options, sources)):
            print(remark, file=sys.stderr)
    if options.script.print_config and not problems:
        print(config_text(options, sources))
        sys.exit(0)
    for check in checks:
        try:
            problems.extend(check(options))
        except UsageError as error:
            problems.extend(error.problems)
    if problems:
        raise UsageError(problems)
    return options


def run_script(
    main: Callable[[Options], int | None],
    options_type: type[Options],
    doc: str | None,
    checks: Sequence[Callable[[Options], Iterator[str]]],
) -> typing.NoReturn:
    """Parses the command line, runs ``main`` with the options, and exits.

    The exit status is that of ``main``, or 1 after one line if another rank has ended, or after a traceback, 2 after
    one line for each problem that the user can fix, 3 after one line if training produced NaN or infinity, or 75 if the
    script was asked to stop.

    Args:
        main: The work of the script; it returns the exit status.
        options_type: The options of the script.
        doc: The text at the top of the help.
        checks: The checks for ``parse``.
    """
    console.protect_output()
    stopping.install()
    caches.use_caches()
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():  # a log would get a line for each change of the bars of other libraries
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Without it, sums that MKL computes on a CPU depend on the memory addresses of the tensors.
    os.environ.setdefault("MKL_CBWR", "AUTO")
    # A notebook sets a backend for its pictures, which matplotlib refuses in another environment of Python.
    os.environ["MPLBACKEND"] = "agg"
    try:
        status = exit_status(main, options_type, doc, checks)
    except stopping.Stopped:
        status = stopped_status()
    except SystemExit as ended:  # --help, --version and --print_config
        status = ended.code if isinstance(ended.code, int) else None
    except Exception as error:
        if stopping.stops_now():
            status = stopped_status()  # another rank stopped first, so a collective operation failed
        elif isinstance(error, LostRankError):
            print(f"{Path(sys.argv[0]).name}: {one_line(str(error))}", file=sys.stderr)
            stopping.leave(ERROR_EXIT, is_cause=False)
        else:
            stopping.record_failure()
            # An error that Python itself reports may abort the process, while another thread is inside a library.
            sys.excepthook(type(error), error, error.__traceback__)
            stopping.leave(ERROR_EXIT, is_cause=False)  # because it may follow from an error of another rank
    if not status and (reason := console.output_problem()):
        print(f"{Path(sys.argv[0]).name}: a part of the standard output is missing: {reason}", file=sys.stderr)
        status = USAGE_EXIT
    if status in (USAGE_EXIT, NON_FINITE_EXIT):
        announce_traceback(status)
    stopping.leave(status)


def announce_traceback(status: int) -> None:
    """Says what the traceback means that a launcher is going to print because this script did not end with 0."""
    if stopping.is_launcher(os.getppid()):
        line = f"A traceback of the launcher follows. It only says that this script ended with {status}."
        stopping.print_once(f"({line})")


def exit_status(
    main: Callable[[Options], int | None],
    options_type: type[Options],
    doc: str | None,
    checks: Sequence[Callable[[Options], Iterator[str]]],
) -> int | None:
    """Returns the status of ``main``, or 2 or 3 after printing what went wrong. Other errors keep their traceback."""
    try:
        with disk_errors_converted(Path("the disk")):  # unless the error names the file
            check_launch()
            options = parse(options_type, doc, None, checks)
            hide_secrets(options)
            return main(options)
    except UsageError as error:
        problems = error.problems
    except (OSError, RuntimeError) as error:
        problem = limit_problem(error)
        if problem is None:
            raise
        problems = (problem,)
    except ModuleNotFoundError:
        if importlib.util.find_spec("torch") is not None:
            raise
        rule = "torch is not installed for this Python; activate the environment: source .venv/bin/activate"
        problems = (f"{sys.executable}: {rule}; docs/troubleshooting.md says how to create it",)
    except NonFiniteError as error:
        if stopping.speaks():
            print(f"{Path(sys.argv[0]).name}: {one_line(str(error))}", file=sys.stderr)
        return NON_FINITE_EXIT
    number = sum(not text.startswith(" ") for text in problems)  # an indented line belongs to the one before
    lines = [f"{Path(sys.argv[0]).name}: {plural(number, 'problem')}", *(f"  {one_line(text)}" for text in problems)]
    stopping.print_once(*lines)
    return USAGE_EXIT


def stopped_status() -> int:
    """Prints the last line of a script that was asked to stop, and returns its exit status."""
    if stopping.says_last_line():
        print(stopping.last_line(), file=sys.stderr)
        announce_traceback(stopping.REQUEUE_EXIT)
    return stopping.REQUEUE_EXIT
