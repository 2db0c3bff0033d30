"""Imports inside training/cogvideox go downward only, and what must stay light does not import torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TRAINING = Path(__file__).parent.parent / "training"
PACKAGE = TRAINING / "cogvideox"

# From bottom to top. A module imports from the layers below its own, never from its own or from above.
LAYERS = (
    ("errors", "host_memory", "stopping"),
    ("files",),
    ("flags", "draws", "sheets", "curves", "finite", "data.workers", "locks"),
    ("options", "data.buckets", "data.transforms", "data.columns", "data.faults", "data.icc", "data.planes"),
    ("conflicts", "geometry", "hub", "lora_file", "prepared", "prompts"),
    ("data.alpha", "data.colors", "data.frames", "data.joined", "data.keyframes", "data.mpeg4"),
    ("data.paths", "data.tables"),
    ("args", "data.cache", "data.forms", "data.packets", "data.pictures", "data.decord_reader"),
    ("data.proposals",),
    ("data.decode", "data.index"),
    ("data.clips", "data.sampler", "data.shared_memory"),
    ("diffusion", "rope", "lora", "streaming", "quant", "graphs"),
    ("data.dataset", "t5_stream", "vae_encoder", "vae_decoder"),
    ("encode", "models"),
    ("factory", "prepare", "optimizers", "captions"),
    ("causes",),
    ("report", "verify", "checks", "masters"),
    ("tasks", "methods", "optim"),
    ("offload", "ema", "plan", "ranks", "attention"),
    ("engine", "blocks"),
    ("run", "stack"),
    ("images", "layerwise", "tensors"),
    ("execution",),
    ("checkpoint", "validation"),
    ("before_after", "best", "block_check", "held_out", "parity", "skipped", "warm_up"),
    ("card", "pipeline_folder"),
    ("publish",),
    ("loop",),
)
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


FILES = {name_of(path): path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}


# Scripts end with --help or with all problems, and workers start, without torch.
WITHOUT_TORCH = (
    *("flags", "options", "conflicts", "args", "errors", "files", "draws", "geometry", "hub", "lora_file"),
    *("optimizers", "prompts", "sheets", "curves", "stopping", "locks"),
    *(name for name in FILES if name.startswith("data.") and name != "data.dataset"),
)
LIGHT_DATA = ("buckets", "cache", "columns", "faults", "forms", "index", "paths", "sampler", "tables", "workers")
FLAGS = ("flags", "options", "conflicts", "args")
LIGHT = ("errors", "files", "locks", "draws", "lora_file", "prompts", "stopping")
STANDARD_LIBRARY_ONLY = (*FLAGS, *LIGHT, *(f"data.{name}" for name in LIGHT_DATA))


def imports(tree: ast.AST) -> Iterator[str]:
    """The full name of everything that is imported, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """The modules of the library that a file imports."""
    found = set()
    for full in imports(ast.parse(path.read_text())):
        if full.split(".")[0] == "cogvideox":
            rest = full.removeprefix("cogvideox").removeprefix(".")
            candidates = [rest, rest.rpartition(".")[0]]
            module = next((name for name in candidates if name in FILES), None)
            assert module is not None, f"{path}: imports {full}, which is no module of the library"
            found.add(module)
    return found


def test_every_module_has_its_layer() -> None:
    assert set(LEVEL) == set(FILES)
    assert len(LEVEL) == sum(map(len, LAYERS))


@pytest.mark.parametrize("module", FILES)
def test_imports_go_downward(module: str) -> None:
    upward = {name for name in own_imports(FILES[module]) if LEVEL[name] >= LEVEL[module]}
    assert not upward, f"{module} imports from its own layer or above: {sorted(upward)}"


def test_the_test_sees_imports() -> None:
    """Of each form: from cogvideox import x, from cogvideox.x import y, and inside functions."""
    assert {"encode", "models", "data.cache", "options"} <= own_imports(FILES["prepare"])
    assert {"data.forms"} <= own_imports(FILES["data.index"])
    assert "huggingface_hub.hf_hub_download" in set(imports(ast.parse(FILES["geometry"].read_text())))


@pytest.mark.parametrize("module", FILES)
def test_the_library_never_imports_a_script(module: str) -> None:
    scripts = {path.stem for path in TRAINING.glob("*.py")}
    assert scripts
    assert not {name.split(".")[0] for name in imports(ast.parse(FILES[module].read_text()))} & (scripts | {"training"})


@pytest.mark.parametrize("script", sorted(path.name for path in TRAINING.glob("*.py")))
def test_scripts_do_not_import_each_other(script: str) -> None:
    scripts = {path.stem for path in TRAINING.glob("*.py")}
    assert not {name.split(".")[0] for name in imports(ast.parse((TRAINING / script).read_text()))} & scripts
    own_imports(TRAINING / script)


def import_with_blocked(modules: tuple[str, ...], blocked: tuple[str, ...], folder: Path) -> list[str]:
    """Tries each module in one interpreter; returns what failed."""
    for name in blocked:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise ImportError('{name} is blocked')\n")
    code = f"""
import importlib, sys
sys.path.insert(0, {str(TRAINING)!r})
for name in sys.argv[1:]:
    try:
        importlib.import_module("cogvideox." + name)
    except ImportError as error:
        print(name, error)
"""
    env = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code, *modules], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_light_modules_import_no_torch(tmp_path: Path) -> None:
    blocked = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")
    assert import_with_blocked((*WITHOUT_TORCH, "diffusion"), blocked, tmp_path) == ["diffusion torch is blocked"]


def test_modules_of_the_standard_library_import_nothing_else(tmp_path: Path) -> None:
    blocked = ("torch", "numpy", "av", "safetensors", "huggingface_hub", "tqdm")
    found = import_with_blocked((*STANDARD_LIBRARY_ONLY, "geometry", "data.transforms"), blocked, tmp_path)
    assert found == ["data.transforms numpy is blocked"]
