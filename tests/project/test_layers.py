"""Tests that imports in training/cogvideox go downward only, and that light modules do not import torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

TRAINING = Path(__file__).parents[2] / "training"
PACKAGE = TRAINING / "cogvideox"
MOST_MODULES = 16  # in one folder

# From bottom to top: folders, and the modules next to them. A module imports from its own folder and from lower rows.
LAYERS = (
    (
        *("caches", "console", "errors", "files", "finite", "host_memory", "locks", "progress", "rng", "stopping"),
        "tensor_files",
    ),
    ("config",),
    ("data.media",),
    ("data.media.colors", "data.media.container"),
    ("data.media.pixels",),
    ("data.forms",),
    ("data",),
    ("memory",),
    ("model",),
    ("optimizer",),
    ("runtime",),
    ("preparation",),
    ("preparation.captioning", "preparation.scenes"),
    ("planning",),
    ("evaluation",),
    ("export",),
    ("checks", "loop"),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


FILES = {name_of(path): path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}


def layer_of(module: str) -> str:
    """Returns the folder of a module, or its own name if it is in none."""
    return module.rpartition(".")[0] or module


# Without torch, scripts show --help and report all problems, and workers start.
WITHOUT_TORCH = (
    *(name for name in FILES if layer_of(name).split(".")[0] in ("config", "data")),
    *("caches", "errors", "files", "locks", "rng", "stopping", "runtime.sheets", "runtime.curves"),
)
WITHOUT_TORCH = tuple(name for name in WITHOUT_TORCH if name != "data.dataset")
STANDARD_LIBRARY_ONLY = (
    *("caches", "console", "errors", "files", "locks", "rng", "stopping"),
    *("config.flags", "config.options", "config.conflicts", "config.args", "config.lora_file", "config.prompts"),
    *("config.buckets", "data.cache", "data.sampler", "data.media.faults", "data.media.workers"),
    *(name for name in FILES if layer_of(name) == "data.forms"),
)


def imports(tree: ast.AST) -> Iterator[str]:
    """Returns the full name of everything that a file imports, also within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Returns the modules of the library that a file imports."""
    found = set()
    for full in imports(ast.parse(path.read_text())):
        if full.split(".")[0] == "cogvideox" and full != "cogvideox.__version__":
            rest = full.removeprefix("cogvideox").removeprefix(".")
            candidates = [rest, rest.rpartition(".")[0]]
            module = next((name for name in candidates if name in FILES), None)
            assert module is not None, f"{path}: imports {full}, which is not a module of the library"
            found.add(module)
    return found


def test_every_module_has_its_layer() -> None:
    assert {layer_of(module) for module in FILES} == set(LEVEL)
    assert len(LEVEL) == sum(map(len, LAYERS))


@pytest.mark.parametrize("module", FILES)
def test_imports_go_downward(module: str) -> None:
    layer = layer_of(module)
    upward = {
        name for name in own_imports(FILES[module]) if layer_of(name) != layer and LEVEL[layer_of(name)] >= LEVEL[layer]
    }
    # Modules next to the folders share a row without being in one folder.
    upward = {name for name in upward if LEVEL[layer_of(name)] > LEVEL[layer] or "." in name}
    assert not upward, f"{module} imports from above: {sorted(upward)}"


def test_no_modules_import_each_other() -> None:
    try:
        TopologicalSorter({name: own_imports(path) for name, path in FILES.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_no_two_files_of_tests_have_one_name() -> None:
    """The folders of tests are no packages, so pytest stops at the second file of a name before it runs any test."""
    names = [path.name for path in (TRAINING.parent / "tests").rglob("test_*.py")]
    assert [name for name, number in Counter(names).items() if number > 1] == []


def test_no_folder_is_crowded() -> None:
    folders = [path for path in (PACKAGE, *PACKAGE.rglob("*")) if path.is_dir() and path.name != "__pycache__"]
    crowded = {folder.name: len(list(folder.glob("*.py"))) for folder in folders}
    assert not {name for name, count in crowded.items() if count > MOST_MODULES + 1}  # __init__.py


def test_the_test_sees_imports() -> None:
    """Imports have several forms: from cogvideox import x, from cogvideox.x import y, and both within functions."""
    found = own_imports(FILES["preparation.prepare"])
    assert {"model.encode", "model.models", "data.cache", "config.flags"} <= found
    assert {"data.forms.folders"} <= own_imports(FILES["data.forms.samples"])
    assert "huggingface_hub.hf_hub_download" in set(imports(ast.parse(FILES["config.geometry"].read_text())))


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
    """Imports each module in one interpreter with some packages blocked, and returns the failures."""
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
    found = import_with_blocked((*WITHOUT_TORCH, "model.diffusion"), blocked, tmp_path)
    assert found == ["model.diffusion torch is blocked"]


def test_modules_of_the_standard_library_import_nothing_else(tmp_path: Path) -> None:
    blocked = ("torch", "numpy", "av", "safetensors", "huggingface_hub", "tqdm")
    modules = (*STANDARD_LIBRARY_ONLY, "config.geometry", "data.media.transforms")
    assert import_with_blocked(modules, blocked, tmp_path) == ["data.media.transforms numpy is blocked"]
