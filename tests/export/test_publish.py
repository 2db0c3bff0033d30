"""publish.py: what is published was reloaded and gives the same; inference.py is safe and says the same."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import PLAIN, options_of, run_alone
from running import PROMPT, WEIGHTS, lora_flags, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogvideox.evaluation.validation import Validator
from cogvideox.export import card, publish
from cogvideox.export.card import CARD_NAME
from cogvideox.export.publish import INFERENCE_NAME, MIN_COSINE, RECIPE_NAME, compare, faithful, inference_script
from cogvideox.model.methods import Lora
from cogvideox.model.tasks import TextToVideo
from cogvideox.model.vae_decoder import PUBLISHED, tiles_from

HOSTILE = [
    'it\'s "quoted"',
    "'''",
    '"""',
    "three ''' and \"\"\" and \\",
    "two\nlines\r\n\u2028and more",
    "C:\\new\\table\\x41\\",
    "{prompt} {0} {} %s %(a)s",
    "\\N{BELL} \\u0041 \\",
    "')\nimport os; os.system('touch PWNED')\n('",
    "# not a comment",
    "\U0001f525 日本語 \x00\x1b[31m",
    "",
]
SAMPLING = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 6.0}


# -- compared ----------------------------------------------------------------------------------------------------------


def test_a_wrong_scale_is_not_faithful() -> None:
    """Doubling a small effect leaves the cosine near 1: the effect itself is what is compared."""
    base = torch.linspace(-1.0, 1.0, 101)
    effect = 1e-3 * torch.linspace(-1.0, 1.0, 101).square()
    assert compare(base + effect, base + 2 * effect)[1] > MIN_COSINE
    assert not faithful(base, base + effect, base + 2 * effect)
    assert not faithful(base, base + effect, base)
    assert not faithful(base, base + effect, torch.full_like(base, torch.nan))
    assert faithful(base, base + effect, base + effect)
    assert faithful(base, base, base)


def test_compare() -> None:
    one = torch.tensor([[3.0, 4.0]])
    assert compare(one, one) == (0.0, pytest.approx(1.0))
    assert compare(one, -one) == (8.0, pytest.approx(-1.0))
    assert compare(one, torch.tensor([[4.0, -3.0]])) == (7.0, pytest.approx(0.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_never_pass(bad: float) -> None:
    one = torch.tensor([1.0, bad])
    for first, second in ((one, one), (one, torch.ones(2)), (torch.ones(2), one)):
        assert not compare(first, second)[1] >= MIN_COSINE


def not_finite(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(publish, "forward", lambda *_: torch.full((4,), float("nan")))


def after_writing(change: Callable[[Path], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """Changes the weights between writing and reloading them."""

    def fault(patch: pytest.MonkeyPatch) -> None:
        write = publish.write_weights

        def written(method: Any, folder: Path) -> dict[str, Any]:
            about = write(method, folder)
            change(folder / WEIGHTS)
            return about

        patch.setattr(publish, "write_weights", written)

    return fault


def rewrite(path: Path, keep_metadata: bool, factor: float) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * factor}, path, metadata if keep_metadata else {"format": "pt"})


def without_one(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "blocks.1" not in name}, path, metadata)


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FAULTS = {
    "NaN": not_finite,
    "a tensor changed": after_writing(lambda path: rewrite(path, True, 1.001)),
    "a block missing": after_writing(without_one),
    "no scale": after_writing(lambda path: rewrite(path, False, 1.0)),
    "torn": after_writing(torn),
}


@pytest.mark.filterwarnings("ignore:.*inconsistency was discovered")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.fault("export: weights that reload as something else")
def test_what_reloads_as_something_else_is_not_published(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    output = tmp_path / "lora"
    scale = ["--lora_alpha", 6]  # of 1.5, which the metadata say
    flags = lora_flags(model, tensors, output, "--load_tensors", "--max_train_steps", 2, *scale)
    with monkeypatch.context() as patch:
        FAULTS[fault](patch)
        expected = (
            "incomplete|deserializing|file" if fault == "torn" else f"{WEIGHTS}: reloaded, it gives another output"
        )
        with pytest.raises(Exception, match=expected):
            train(flags)
    assert not (output / RECIPE_NAME).exists()
    assert not (output / INFERENCE_NAME).exists()
    assert train(flags) == 0  # the checkpoint is whole; only the result is written again
    assert json.loads((output / RECIPE_NAME).read_text())["verification"]["max_difference"] == 0


def test_rewriting_alone_is_not_what_is_found(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other side of the test above: the same tensors and metadata, written by somebody else, pass."""
    after_writing(lambda path: rewrite(path, True, 1.0))(monkeypatch)
    assert train(lora_flags(model, tensors, tmp_path / "lora", "--load_tensors", "--max_train_steps", 1)) == 0


# -- in which order ----------------------------------------------------------------------------------------------------


def test_the_recipe_comes_last(model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, there = tmp_path / "lora", {}
    write = publish.write_atomically

    def watched(path: Path, content: bytes) -> None:
        there[path.name] = {
            name for name in (WEIGHTS, INFERENCE_NAME, CARD_NAME, RECIPE_NAME) if (output / name).exists()
        }
        write(path, content)

    monkeypatch.setattr(publish, "write_atomically", watched)
    monkeypatch.setattr(card, "write_atomically", watched)
    assert train(lora_flags(model, tensors, output, "--load_tensors", "--max_train_steps", 1)) == 0
    written = [WEIGHTS, INFERENCE_NAME, CARD_NAME, RECIPE_NAME]
    assert list(there) == written[1:]
    assert there == {name: set(written[:place]) for place, name in enumerate(written) if place}
    assert not list(output.rglob("*.tmp"))


def test_an_extended_run_is_not_finished_until_it_is(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe.json beside weights that it does not describe would call an unfinished folder finished."""
    output = tmp_path / "lora"
    assert train(lora_flags(model, tensors, output, "--load_tensors", "--max_train_steps", 1)) == 0
    after_writing(lambda path: rewrite(path, True, 2.0))(monkeypatch)
    with pytest.raises(RuntimeError, match="another output"):
        train(lora_flags(model, tensors, output, "--load_tensors", "--max_train_steps", 2))
    assert not (output / RECIPE_NAME).exists()


def test_the_recipe_says_how_it_was_made(reference: Path) -> None:
    made = json.loads((reference / RECIPE_NAME).read_text())
    assert made["step"] == 6
    assert made["method"] == "Lora"
    assert made["flags"]["validation_prompt"] == PROMPT
    assert made["verification"]["max_difference"] == 0


# -- inference.py ------------------------------------------------------------------------------------------------------


TILES = tiles_from(*PUBLISHED)


def script_of(output: Path, *flags: object, sampling: dict[str, Any] | None = None) -> ast.Module:
    options = options_of(output, *flags)
    validator: Any = SimpleNamespace(sampling=sampling or SAMPLING, fps=8.0, flags=options.validation, pipeline=None)
    validator.tiles = Validator.tiles.fget(validator)  # type: ignore[attr-defined]
    method = SimpleNamespace(inference=lambda dtype: Lora.inference(PLAIN, dtype))
    task: Any = TextToVideo
    return ast.parse(inference_script(options, task, method, validator, run_alone(output)))


def calls(tree: ast.Module, name: str) -> ast.Call:
    """The only call of a function or method of this name."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]
    assert len(found) == 1
    return found[0]


def values(call: ast.Call) -> dict[str, Any]:
    """The keyword arguments that are written out."""
    return {
        str(k.arg): ast.literal_eval(k.value)
        for k in call.keywords
        if isinstance(k.value, ast.Constant | ast.UnaryOp | ast.Tuple | ast.List)
    }


def prompt_in(tree: ast.Module) -> str:
    found = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "PROMPT"]
    return ast.literal_eval(found[0])


def statements(tree: ast.Module) -> list[str]:
    return [type(node).__name__ for node in ast.walk(tree)]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.fault("security: code in prompts and paths of inference.py")
def test_hostile_texts_stay_texts(tmp_path: Path, text: str) -> None:
    plain = statements(script_of(tmp_path, "--validation_prompt", "a", "--negative_prompt", "b"))
    tree = script_of(tmp_path, "--validation_prompt", f"a{text}z", "--negative_prompt", text)
    assert prompt_in(tree) == f"a{text}z"
    assert values(calls(tree, "pipe"))["negative_prompt"] == text
    assert statements(tree) == plain
    name = text.replace("/", "") or "x"
    more = ["--pretrained_model_name_or_path", f"hub/{name}", "--revision", name, "--variant", name, "--id_token", name]
    tree = script_of(tmp_path, *more)
    assert prompt_in(tree) == f"{name} a video".strip()
    loaded = calls(tree, "diffusers.CogVideoXPipeline.from_pretrained")
    assert ast.literal_eval(loaded.args[0]) == f"hub/{name}"
    assert values(loaded) == {"revision": name, "variant": name}
    assert statements(tree) == plain


def test_the_first_prompt_is_the_script_s(tmp_path: Path) -> None:
    assert prompt_in(script_of(tmp_path, "--validation_prompt", " one ::: two")) == "one"
    assert prompt_in(script_of(tmp_path)) == "a video"


@pytest.mark.parametrize(
    ("flags", "slicing", "tiles"),
    [((), [], [None, *TILES]), (("--enable_tiling", "--enable_slicing"), ["pipe.vae.enable_slicing()"], TILES)],
)
def test_tiling_and_slicing_are_the_validation_s(
    tmp_path: Path, flags: tuple[str, ...], slicing: list[str], tiles: list[tuple[int, int]]
) -> None:
    lines = [ast.unparse(statement) for statement in script_of(tmp_path, *flags).body]
    assert [line for line in lines if line.startswith("pipe.vae.enable")] == slicing
    assert f"TILES = {tiles}" in lines


def test_the_script_samples_as_the_validation_does(
    model: Path, tensors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags of which none is a default, against what the stock pipeline is called with."""
    import diffusers

    called: list[dict[str, Any]] = []
    call = diffusers.CogVideoXPipeline.__call__

    def watched(self: Any, **arguments: Any) -> Any:
        called.append(arguments | {"generator": arguments["generator"].initial_seed()})
        return call(self, **arguments)

    monkeypatch.setattr(diffusers.CogVideoXPipeline, "__call__", watched)
    output = tmp_path / "lora"
    flags = ["--load_tensors", "--validation_prompt", PROMPT, "--max_train_steps", 1, "--num_inference_steps", 3]
    flags += ["--guidance_scale", 2.5, "--use_dynamic_cfg", "--height", 32, "--width", 48, "--validation_frames", 5]
    flags += ["--negative_prompt", "it's", "--seed", 7, "--validation_fps", 12]
    assert train(lora_flags(model, tensors, output, *map(str, flags))) == 0
    sampling = {
        k: v
        for k, v in called[-1].items()
        if not k.endswith("embeds") and k not in ("generator", "callback_on_step_end")
    }
    assert sampling | {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 3} == sampling
    assert sampling | {"guidance_scale": 2.5, "use_dynamic_cfg": True} == sampling
    tree = ast.parse((output / INFERENCE_NAME).read_text())
    assert values(calls(tree, "pipe")) == sampling | {"negative_prompt": "it's"}
    assert ast.literal_eval(calls(tree, "torch.Generator().manual_seed").args[0]) == called[-1]["generator"] == 7
    assert values(calls(tree, "encode_video"))["fps"] == 12
    assert ast.literal_eval(calls(tree, "pipe.set_adapters").args[1]) == [1.0]


@pytest.mark.fault("flags: inference.py under a diffusers that is too old")
@pytest.mark.parametrize(
    ("version", "old"), [("0.39.9", True), ("0.40.0", False), ("0.41.0.dev0", False), ("1.0", False)]
)
def test_an_old_diffusers_is_named_before_anything_is_imported_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, old: bool
) -> None:
    """Before 0.39 there is no encode_video, and dtype= is ignored before 0.40."""
    tree = script_of(tmp_path)
    end = next(i for i, node in enumerate(tree.body) if ast.unparse(node).startswith("from diffusers"))
    tree.body = tree.body[:end]
    monkeypatch.setattr("diffusers.__version__", version)
    told = f"diffusers {version} is too old; 0.40 or newer is needed: pip install -U diffusers"
    with pytest.raises(SystemExit, match=re.escape(told)) if old else nullcontext():
        exec(compile(tree, "inference.py", "exec"), {})
