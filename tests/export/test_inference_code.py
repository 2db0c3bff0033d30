"""inference_code.py: no text of a user runs as code, and inference.py samples as the validation does."""

from __future__ import annotations

import ast
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import PLAIN, options_of, run_alone
from running import PROMPT, lora_flags, train

from cogvideox.evaluation.validation import Validator
from cogvideox.export.inference_code import inference_script
from cogvideox.export.publish import INFERENCE_NAME
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
TILES = tiles_from(*PUBLISHED)


def script_of(output: Path, *flags: object, sampling: dict[str, Any] | None = None) -> ast.Module:
    options = options_of(output, *flags)
    validator: Any = SimpleNamespace(sampling=sampling or SAMPLING, fps=8.0, flags=options.validation, pipeline=None)
    validator.tiles = Validator.tiles.fget(validator)  # type: ignore[attr-defined]
    method = SimpleNamespace(inference=lambda dtype: Lora.inference(PLAIN, dtype))
    task: Any = TextToVideo
    return ast.parse(inference_script(options, task, method, validator, run_alone(output)))


def calls(tree: ast.Module, name: str) -> ast.Call:
    """Returns the only call of a function or method of this name."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]
    assert len(found) == 1
    return found[0]


def values(call: ast.Call) -> dict[str, Any]:
    """Returns the keyword arguments with literal values."""
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
    usual = ("--validation_prompt", "a", "--negative_prompt", "b")
    tree = script_of(tmp_path, "--validation_prompt", f"a{text}z", "--negative_prompt", text)
    assert prompt_in(tree) == f"a{text}z"
    assert values(calls(tree, "pipe"))["negative_prompt"] == text
    assert statements(tree) == statements(script_of(tmp_path, *usual))
    name = text.replace("/", "") or "x"
    more = ["--pretrained_model_name_or_path", f"hub/{name}", "--revision", name, "--variant", name, "--id_token", name]
    tree = script_of(tmp_path, *more)
    assert prompt_in(tree) == f"{name} a video".strip()
    loaded = calls(tree, "diffusers.CogVideoXPipeline.from_pretrained")
    assert ast.literal_eval(loaded.args[0]) == f"hub/{name}"
    assert values(loaded) == {"revision": name, "variant": name}
    assert statements(tree) == statements(script_of(tmp_path, *usual, "--revision", "c", "--variant", "d"))


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
    """All flags differ from their defaults, and are compared with the call of the stock pipeline."""
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


@pytest.mark.fault("flags: inference.py with a version of diffusers that is too old")
@pytest.mark.parametrize(
    ("version", "old"), [("0.39.9", True), ("0.40.0", False), ("0.41.0.dev0", False), ("1.0", False)]
)
def test_an_old_diffusers_is_named_before_anything_is_imported_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, old: bool
) -> None:
    """Versions before 0.39 have no encode_video, and versions before 0.40 ignore dtype=."""
    tree = script_of(tmp_path)
    end = next(i for i, node in enumerate(tree.body) if ast.unparse(node).startswith("from diffusers"))
    tree.body = tree.body[:end]
    monkeypatch.setattr("diffusers.__version__", version)
    message = f"diffusers {version} is too old; 0.40 or newer is needed: pip install -U diffusers"
    with pytest.raises(SystemExit, match=re.escape(message)) if old else nullcontext():
        exec(compile(tree, "inference.py", "exec"), {})
