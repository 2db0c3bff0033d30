"""Tests the Dockerfile: what it copies, and, in a clean Debian root without Docker, each of its steps."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import image_steps
import pytest
from running import ROOT

INSTRUCTIONS = image_steps.instructions((ROOT / "Dockerfile").read_text())
RULES = ["*", "!training", "!one.txt", "!docs/images", "**/__pycache__"]
PROBLEM = next((f"needs {name}" for name in ("debootstrap", "unshare", "chroot") if not shutil.which(name)), "")


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("my-clips/rabbit.mp4", True),
        ("training", False),
        ("training/cogvideox/loop.py", False),
        ("training/cogvideox/__pycache__/loop.pyc", True),
        ("one.txt", False),
        ("another/one.txt", True),
        ("docs/guide.md", True),
        ("docs/images/demo.png", False),
    ],
)
def test_the_last_matching_rule_decides(path: str, ignored: bool) -> None:
    assert image_steps.is_ignored(PurePosixPath(path), RULES) is ignored


def test_the_image_has_what_users_run_and_nothing_else() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    copied = [path for path in tracked if not image_steps.is_ignored(PurePosixPath(path), image_steps.rules_of(ROOT))]
    assert {PurePosixPath(path).parts[0] for path in tracked} - {PurePosixPath(path).parts[0] for path in copied} == {
        *(".ci", ".dockerignore", ".github", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CITATION.cff"),
        *("CONTRIBUTING.md", "CREDITS.md", "Dockerfile", "README.ja.md", "README.md", "README.zh.md"),
        *("benchmarks", "docs", "pyproject.toml", "tests"),
    }


def test_clips_in_the_checkout_stay_out_of_the_image(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    for name in ("my-clips/a.mp4", "training/doctor.py", "training/__pycache__/doctor.pyc", ".git/HEAD", "LICENSE"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert image_steps.context(tmp_path) == [Path("LICENSE"), Path("training/doctor.py")]


def test_every_instruction_is_known() -> None:
    assert [name for name, _ in INSTRUCTIONS if not hasattr(image_steps.Image, f"_{name.lower()}")] == []
    with pytest.raises(image_steps.DockerfileError, match="HEALTHCHECK"):
        image_steps.Image(Path(), ROOT, {}, {}).execute("HEALTHCHECK", "NONE")


def test_a_file_that_is_not_let_through_cannot_be_copied(tmp_path: Path) -> None:
    image = image_steps.Image(tmp_path, ROOT, {}, {})
    image.execute("COPY", "requirements.txt constraints.txt ./")
    assert (tmp_path / "constraints.txt").read_bytes() == (ROOT / "constraints.txt").read_bytes()
    with pytest.raises(image_steps.DockerfileError, match="pyproject"):
        image.execute("COPY", "requirements.txt pyproject.toml ./")


def test_variables_and_folders_are_those_of_docker(tmp_path: Path) -> None:
    image = image_steps.Image(tmp_path, ROOT, {"GIVEN": "-r one -r two"}, {})
    for name, text in INSTRUCTIONS[INSTRUCTIONS.index(("WORKDIR", "/app")) - 2 :]:
        if name in ("ARG", "ENV", "WORKDIR", "USER", "CMD"):
            image.execute(name, text)
    image.execute("ARG", 'GIVEN="-r one"')
    assert image.build == {"PIP_ARGUMENTS": "-r requirements.txt", "GIVEN": "-r one -r two"}
    assert image.environment["PATH"] == f"/opt/venv/bin:{image_steps.PATH}"
    assert (image.folder, image.user, image.command[0]) == ("/app", "trainer", "python")


def test_settings_of_pip_are_seen_in_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nextra-index-url = file:///a/b https://example.org/c\ncert = /etc/x.crt\ntimeout = 5\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    settings = image_steps.settings_of_pip()
    assert settings["PIP_EXTRA_INDEX_URL"] == "file:///mnt/host/a/b https://example.org/c"
    assert (settings["PIP_CERT"], settings["PIP_TIMEOUT"]) == ("/mnt/host/etc/x.crt", "5")


def test_the_public_ci_builds_the_image_as_the_guide_does() -> None:
    built = re.search(r"^docker build .*$", (ROOT / "docs" / "guide.md").read_text(), re.MULTILINE)
    assert built
    assert f"- run: {built[0]}" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


@pytest.mark.long
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, for chroot")
@pytest.mark.skipif(PROBLEM != "", reason=PROBLEM)
def test_every_step_succeeds_in_a_clean_root() -> None:
    tool = [sys.executable, str(ROOT / "tests" / "tools" / "image_steps.py")]
    subprocess.run(tool, check=True)
