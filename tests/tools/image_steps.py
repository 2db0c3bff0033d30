"""Executes the steps of the Dockerfile in a clean Debian root, for machines without Docker.

python tests/tools/image_steps.py --keep /tmp/image    # as root, with debootstrap; takes some minutes

debootstrap makes the root, with the packages of the base image. Each RUN is executed there with chroot, and /dev/shm
has 64 MiB as in a container. At the end, the CMD of the image is executed as its user, with a short training. The
settings of pip on this machine, such as a mirror, are also used in the root.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from string import Template

ROOT = Path(__file__).parents[2]
BASE = re.compile(r"debian:(\w+)-slim")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # as Docker sets it
HOST = "/mnt/host"  # where RUN sees the files of this machine, which settings of pip may name
# Mounts are made in a namespace of their own, so none remain, and no process of a step survives it.
ENTER = f"""set -e
root=$1 user=$2 host=$3; shift 3
mount -t proc proc "$root/proc"
mount -t tmpfs -o size=64m,mode=1777 shm "$root/dev/shm"
[ -z "$host" ] || mount --bind -o ro "$host" "$root{HOST}"
exec chroot --userspec="$user" "$root" "$@"
"""
ENTER_COMMAND = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, "sh")


class DockerfileError(ValueError):
    """Reports an instruction that this tool does not know."""


def instructions(text: str) -> list[tuple[str, str]]:
    """Returns the name and the arguments of each instruction of a Dockerfile."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    words = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in words]


def context(folder: Path) -> list[Path]:
    """Returns the files of a folder that .dockerignore lets through, relative to it."""
    rules = rules_of(folder)
    # Docker walks through folders that are excluded, as any of their files may be included again. Here, the first rule
    # excludes everything, and only whole folders at the top are included again.
    tops = [path for path in folder.iterdir() if not is_ignored(PurePosixPath(path.name), rules)]
    files = [file for top in tops for file in (top.rglob("*") if top.is_dir() else [top]) if file.is_file()]
    relative = [file.relative_to(folder) for file in files]
    return sorted(path for path in relative if not is_ignored(PurePosixPath(path), rules))


def rules_of(folder: Path) -> list[str]:
    """Returns the patterns of .dockerignore."""
    return [line for line in (folder / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]


def is_ignored(path: PurePosixPath, rules: list[str]) -> bool:
    """Returns whether .dockerignore excludes a path. The last rule that matches it or a parent folder decides."""
    ignored = False
    for rule in rules:
        if any(matches(place, rule.removeprefix("!")) for place in (path, *path.parents[:-1])):
            ignored = not rule.startswith("!")
    return ignored


def matches(path: PurePosixPath, pattern: str) -> bool:
    """Returns whether a pattern of .dockerignore is for this path itself; `*` does not match a slash."""
    if pattern.startswith("**/"):
        return fnmatchcase(path.name, pattern[3:])
    parts = PurePosixPath(pattern).parts
    return len(parts) == len(path.parts) and all(map(fnmatchcase, path.parts, parts))


@dataclass
class Image:
    """A root folder, and what the instructions of a Dockerfile say about it.

    Attributes:
        root: The folder of the root.
        source: The folder of the Dockerfile.
        arguments: Values of ARG that replace those of the Dockerfile.
        pip: Settings of pip, by their environment variables.
    """

    root: Path
    source: Path
    arguments: dict[str, str]
    pip: dict[str, str]
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    build: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "root"
    command: list[str] = field(default_factory=list)

    def execute(self, name: str, text: str) -> None:
        """Executes an instruction.

        Raises:
            DockerfileError: This tool does not know the instruction.
            subprocess.CalledProcessError: A command of RUN failed.
        """
        handler = getattr(self, f"_{name.lower()}", None)
        if handler is None:
            raise DockerfileError(f"{name} {text}: this instruction is not known")
        handler(text)

    def run(self, command: list[str]) -> None:
        """Runs a command in the root, as the user and in the folder that the last instructions set."""
        variables = {**self.environment, **self.build, **self.pip}
        inside = ["env", "-i", f"--chdir={self.folder}", *(f"{name}={value}" for name, value in variables.items())]
        place = [str(self.root), self.user, "/" if self.pip else ""]
        subprocess.run([*ENTER_COMMAND, *place, *inside, *command], check=True)

    def _from(self, text: str) -> None:
        if (base := BASE.fullmatch(text)) is None:
            raise DockerfileError(f"FROM {text}: only debian:NAME-slim can be made here")
        subprocess.run(["debootstrap", "--variant=minbase", base[1], self.root], check=True)
        shutil.copy("/etc/resolv.conf", self.root / "etc")
        (self.root / HOST[1:]).mkdir()

    def _arg(self, text: str) -> None:
        name, _, default = text.partition("=")
        self.build[name] = self.arguments.get(name, " ".join(shlex.split(default)))

    def _env(self, text: str) -> None:
        pairs = [word.partition("=") for word in shlex.split(text)]
        known = {**self.build, **self.environment}
        self.environment |= {name: Template(value).substitute(known) for name, _, value in pairs}

    def _workdir(self, text: str) -> None:
        self.folder = text
        (self.root / text[1:]).mkdir(parents=True, exist_ok=True)

    def _copy(self, text: str) -> None:
        *sources, target = text.split()
        place = self.root / str(PurePosixPath(self.folder, target))[1:]
        wanted = [path for path in context(self.source) if "." in sources or str(path) in sources]
        if "." not in sources and len(wanted) != len(sources):
            raise DockerfileError(f"COPY {text}: .dockerignore lets only {', '.join(map(str, wanted))} through")
        for path in wanted:
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.source / path, place / path)

    def _run(self, text: str) -> None:
        self.run(["/bin/sh", "-c", text])

    def _volume(self, text: str) -> None:
        (self.root / text[1:]).mkdir(parents=True, exist_ok=True)

    def _user(self, text: str) -> None:
        self.user = text

    def _cmd(self, text: str) -> None:
        self.command = json.loads(text)


def settings_of_pip() -> dict[str, str]:
    """Returns the settings of pip on this machine as environment variables for RUN, with paths as RUN sees them."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True)
    variables: dict[str, str] = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        words = [re.sub(r"^(file://)?(?=/)", rf"\1{HOST}", word) for word in ast.literal_eval(value).split()]
        # The first line of a setting is the one that pip uses.
        variables.setdefault("PIP_" + name.rpartition(".")[2].upper().replace("-", "_"), " ".join(words))
    return variables


def build(image: Image) -> None:
    """Executes the Dockerfile, then the command of the image, which is doctor.py, and lets it try a training."""
    for name, text in instructions((image.source / "Dockerfile").read_text()):
        print(f"{name} {text}", flush=True)
        image.execute(name, text)
    image.build, image.pip = {}, {}  # these are not part of an image
    image.run([*image.command, "--try_training"])


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a new folder for the root, which is not deleted")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as of docker build")
    return parser


def main() -> None:
    """Builds the root in the folder of --keep, or in a temporary folder."""
    options = build_parser().parse_args()
    arguments = dict(text.split("=", 1) for text in options.build_arg)
    with tempfile.TemporaryDirectory() as folder:
        build(Image(options.keep or Path(folder, "root"), ROOT, arguments, settings_of_pip()))
    print("all steps of the Dockerfile and a short training succeeded")


if __name__ == "__main__":
    main()
