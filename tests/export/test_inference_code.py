"""inference_code.py: no text of a user runs as code, and inference.py samples as the validation does."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import PLAIN, options_of, run_alone
from PIL import Image
from running import PROMPT, ROOT, frames_of, lora_flags, train
from safetensors.torch import load_file, save_file
from torch import nn

from cogvideox.data.media.pixels.pictures import probe_picture, read_picture
from cogvideox.evaluation.validation import Validator
from cogvideox.export.inference_code import inference_script, literal
from cogvideox.export.publish import INFERENCE_NAME
from cogvideox.model.methods import FullFinetune, Lora
from cogvideox.model.tasks import ImageToVideo, TextToVideo
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


def script_of(output: Path, *flags: object) -> ast.Module:
    return ast.parse(code_of(output, TextToVideo, PLAIN, *flags))


def code_of(output: Path, task: Any, lora: Any, *flags: object) -> str:
    """Returns inference.py of a run of the task; its method is a LoRA, or all weights if ``lora`` is None."""
    options = options_of(output, *flags)
    validator: Any = SimpleNamespace(
        sampling=SAMPLING, whole_fps=8, flags=options.validation, pipeline=None, size_multiple=16
    )
    validator.tiles = Validator.tiles.fget(validator)  # type: ignore[attr-defined]
    full: Any = SimpleNamespace(transformer=nn.Linear(1, 1), result=FullFinetune.result)
    method: Any = SimpleNamespace(
        inference=lambda *code: Lora.inference(lora, *code) if lora else FullFinetune.inference(full, *code)
    )
    return inference_script(options, task, method, validator, run_alone(output))


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


def defaults(tree: ast.Module) -> dict[str, Any]:
    """Returns the literal default values of the flags."""
    added = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    flags = [call for call in added if ast.unparse(call.func) == "parser.add_argument" and values(call)]
    return {ast.literal_eval(call.args[0]): values(call)["default"] for call in flags if "default" in values(call)}


def prompt_in(tree: ast.Module) -> str:
    return defaults(tree)["--prompt"]


def statements(tree: ast.Module) -> list[str]:
    return [type(node).__name__ for node in ast.walk(tree)]


def test_only_the_script_of_a_run_with_a_prompt_promises_its_video(tmp_path: Path) -> None:
    video, example = "The default values make the first validation video.", "The default prompt is only an example"
    with_prompt = ast.get_docstring(script_of(tmp_path, "--validation_prompt", "a cat")) or ""
    assert (video in with_prompt, example in with_prompt) == (True, False)
    without = ast.get_docstring(script_of(tmp_path)) or ""
    assert (video in without, example in without) == (False, True)


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
    tree = script_of(tmp_path, *flags)
    lines = [ast.unparse(statement) for statement in tree.body]
    assert [line for line in lines if line.startswith("pipe.vae.enable")] == slicing
    assert f"tiles = {tiles}" in [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Assign)]


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
    call, given = calls(tree, "pipe"), defaults(tree)
    used = {k.arg: given[f"--{k.value.attr}"] for k in call.keywords if isinstance(k.value, ast.Attribute)}
    assert used.pop("prompt") == PROMPT
    assert values(call) | used == sampling | {"negative_prompt": "it's"}
    assert ast.unparse(calls(tree, "torch.Generator().manual_seed").args[0]) == "args.seed"
    assert given["--seed"] == called[-1]["generator"] == 7
    assert values(calls(tree, "encode_video"))["fps"] == 12
    assert ast.unparse(calls(tree, "pipe.set_adapters").args[1]) == "[args.strength]"
    assert given["--strength"] == 1


@pytest.mark.parametrize(("given", "whole"), [(0.4, 1), (7.6, 8), (12, 12)])
def test_inference_writes_whole_frames_per_second_and_the_run_says_so(
    model: Path, tensors: Path, tmp_path: Path, given: float, whole: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--load_tensors", "--max_train_steps", 1, "--validation_fps", given)
    assert train(lora_flags(model, tensors, tmp_path / "lora", *flags)) == 0
    tree = ast.parse((tmp_path / "lora" / INFERENCE_NAME).read_text())
    assert values(calls(tree, "encode_video"))["fps"] == whole
    rate = "1 frame" if whole == 1 else f"{whole} frames"
    said = f"inference.py writes {rate} per second, because diffusers takes whole numbers only; "
    assert (said in capsys.readouterr().err) == (given != whole)


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
    monkeypatch.setattr("sys.argv", ["inference.py"])
    tree.body = tree.body[:end]
    monkeypatch.setattr("diffusers.__version__", version)
    message = f"diffusers {version} is too old: pip install -U 'diffusers>=0.40'"
    with pytest.raises(SystemExit, match=re.escape(message)) if old else nullcontext():
        exec(compile(tree, "inference.py", "exec"), {"__file__": "inference.py"})


@pytest.mark.parametrize("flags", [(), ("--revision", "main", "--variant", "fp16", "--enable_slicing")])
@pytest.mark.parametrize("lora", [PLAIN, SimpleNamespace(ignores_positions=True), None])
@pytest.mark.parametrize("task", [TextToVideo, ImageToVideo])
def test_the_script_is_formatted(tmp_path: Path, task: Any, lora: Any, flags: tuple[str, ...]) -> None:
    path = tmp_path / "inference.py"
    path.write_text(code_of(tmp_path, task, lora, *flags), encoding="utf-8")
    assert_formatted(path)


@pytest.mark.parametrize("text", [*HOSTILE, "a long one " * 9, "a long one " * 99])
def test_texts_are_literals_with_the_quotes_of_the_formatter(tmp_path: Path, text: str) -> None:
    assert ast.literal_eval(literal(text)) == text
    path = tmp_path / "inference.py"
    prompt = ("--validation_prompt", f"a{text}z", "--negative_prompt", text)
    path.write_text(code_of(tmp_path, TextToVideo, PLAIN, *prompt), encoding="utf-8")
    assert_formatted(path)


def assert_formatted(path: Path) -> None:
    """Compares a file with what ruff format makes of it, with the settings of this project."""
    command = [sys.executable, "-m", "ruff", "format", "--diff", "--config", ROOT / "pyproject.toml", path]
    assert not subprocess.run(command, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize(("lora", "task"), [(PLAIN, TextToVideo), (None, ImageToVideo)])
def test_help_lists_the_flags_and_makes_no_video(tmp_path: Path, lora: Any, task: Any) -> None:
    path = tmp_path / "inference.py"
    path.write_text(code_of(tmp_path, task, lora, "--validation_prompt", "50% of it: %(prog)s"), encoding="utf-8")
    (tmp_path / "torch.py").write_text("raise ImportError('the help imports torch')")
    done = subprocess.run([sys.executable, path, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    listed = set(re.findall(r"^  (--\w+)", done.stdout, re.MULTILINE))
    expected = {"--prompt", "--output", "--seed", "--steps", "--guidance", "--frames", "--height", "--width"}
    assert listed == expected | ({"--strength"} if lora else set()) | ({"--image"} if task is ImageToVideo else set())
    assert "what the video shows (default: 50% of it: %(prog)s)" in " ".join(done.stdout.split())
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("a cat", "red.png", "cat.mp4", "--seed", "3"),
        ("--seed", "3", "a cat", "red.png", "cat.mp4"),
        ("a cat", "--seed", "3", "red.png", "cat.mp4"),
        ("a cat", "red.png", "--seed", "3", "--output", "cat.mp4"),
        ("--prompt", "a cat", "--image", "red.png", "--output", "cat.mp4", "--seed", "3"),
    ],
)
def test_values_are_given_with_flags_or_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    tree = ast.parse(code_of(tmp_path, ImageToVideo, PLAIN))
    end = next(i for i, node in enumerate(tree.body) if ast.unparse(node).startswith("args = "))
    tree.body = tree.body[: end + 1]
    monkeypatch.setattr("sys.argv", ["inference.py", *arguments])
    variables: dict[str, Any] = {"__file__": "inference.py"}
    exec(compile(tree, "inference.py", "exec"), variables)
    args = variables["args"]
    assert (args.prompt, args.image, args.output, args.seed) == ("a cat", "red.png", "cat.mp4", 3)
    assert (args.steps, args.guidance, args.strength) == (2, 6, 1)
    assert (args.frames, args.height, args.width) == (9, 64, 96)


def image_of(path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str, mode: str = "center") -> Image.Image:
    """Runs inference.py up to the model, and returns the image that the pipeline would get."""
    tree = ast.parse(code_of(path.parent, ImageToVideo, PLAIN, "--video_reshape_mode", mode))
    end = next(i for i, node in enumerate(tree.body) if ast.unparse(node).startswith("pipe = "))
    name = ast.unparse(next(k.value for k in calls(tree, "pipe").keywords if k.arg == "image"))
    tree.body = tree.body[:end]
    monkeypatch.setattr("sys.argv", ["inference.py", "a cat", str(path), *arguments])
    variables: dict[str, Any] = {"__file__": "inference.py"}
    exec(compile(tree, "inference.py", "exec"), variables)
    image: Image.Image = variables[name]
    return image


def saved(kind: str, folder: Path) -> Path:
    """Saves an image of a kind, of the shape of the videos."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 4), np.uint8)
    path, image = folder / f"{kind}.png", Image.fromarray(pixels)
    exif = Image.Exif()
    if kind == "16 bits":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif kind == "transparent color":
        image.convert("RGB").quantize().save(path, transparency=3)
        return path
    elif kind == "rotated":
        image, exif[0x0112] = Image.fromarray(pixels[..., :3]).rotate(90, expand=True), 6
    elif kind != "RGBA":
        image = image.convert(kind)
    image.save(path, exif=exif)
    return path


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "L", "LA", "1", "P", "16 bits", "transparent color", "rotated"])
def test_images_are_read_as_training_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """By itself, diffusers makes images of 16 bits white, and shows the colors of transparent pixels."""
    path = saved(kind, tmp_path)
    expected = read_picture(path, probe_picture(path), 1, 64, 96)[0].astype(int)
    assert np.abs(np.asarray(image_of(path, monkeypatch)).astype(int) - expected).max() <= 1


def test_an_image_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in (b"text", saved("RGB", tmp_path).read_bytes()[:300]):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(SystemExit):
            image_of(tmp_path / "bad.png", monkeypatch)
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"inference.py: error: --image {tmp_path / 'bad.png'}: ")


def test_a_result_without_a_block_is_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(model / "transformer", tmp_path / "transformer")
    (path,) = (tmp_path / "transformer").glob("*.safetensors")
    kept = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("transformer_blocks.1.")}
    save_file(kept, path, {"format": "pt"})
    code = code_of(tmp_path, TextToVideo, None, "--pretrained_model_name_or_path", model)
    script = tmp_path / "inference.py"
    script.write_text(code.replace("diffusers.Linear", "diffusers.CogVideoXTransformer3DModel"))
    rule = f"{tmp_path / 'transformer'}: its files lack transformer_blocks.1."
    with pytest.raises(SystemExit, match=re.escape(rule)):
        frames_of(script, monkeypatch)


@pytest.mark.parametrize(
    ("mode", "arguments", "size", "note"),
    [
        ("center", (), (64, 43), "is 64x96, and the video is 96x64: only the middle of the image, 64x43, is used"),
        ("random", ("--height", "96"), (64, 64), "is 64x96, and the video is 96x96: only the middle of the image, "),
        ("center", ("--height", "96", "--width", "64"), (64, 96), None),
        ("none", (), (64, 96), "is 64x96 and is stretched to 96x64, as clips were in training; "),
    ],
)
def test_an_image_of_another_shape_is_fitted_as_clips_are(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    arguments: tuple[str, ...],
    size: tuple[int, int],
    note: str | None,
) -> None:
    Image.new("RGB", (64, 96)).save(tmp_path / "red.png")
    assert image_of(tmp_path / "red.png", monkeypatch, *arguments, mode=mode).size == size
    said = capsys.readouterr().out
    assert said.startswith(f"--image {tmp_path / 'red.png'}: {note}") if note else not said


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("a cat", "red.png", "cat"), "--output cat: must end in .mp4, .mov or .mkv"),
        (("a cat", "red.png", "cat.gif"), "--output cat.gif: must end in .mp4, .mov or .mkv"),
        (
            ("a cat", "red.png", "clip.mp4"),
            "--output clip.mp4: exists and would be replaced; move it away, or give another name",
        ),
        (("a cat", "red.png", "--height", "72"), "--height 72: must be a multiple of 16"),
        (("a cat", "red.png", "--width", "100"), "--width 100: must be a multiple of 16"),
        (("a cat", "blue.png", "cat.mp4"), "--image blue.png: no such file; give a path or URL of the first frame"),
        (
            ("a cat", "--image", "red.png", "cat.mp4"),
            "--image cat.mp4: no such file; give a path or URL of the first frame",
        ),
    ],
)
def test_values_that_cannot_work_are_refused_before_anything_is_loaded(
    tmp_path: Path, arguments: tuple[str, ...], problem: str
) -> None:
    """The video would only be written after minutes of sampling, and diffusers finds some sizes as late."""
    (tmp_path / "inference.py").write_text(code_of(tmp_path, ImageToVideo, PLAIN), encoding="utf-8")
    (tmp_path / "red.png").touch()
    (tmp_path / "clip.mp4").touch()
    command = [sys.executable, "inference.py", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"inference.py: error: {problem}"


def test_the_default_output_replaces_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = code_of(tmp_path, TextToVideo, PLAIN)
    for name in ("output.mp4", "output-2.mp4"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["inference.py"])
    found: dict[str, Any] = {"__file__": str(tmp_path / "inference.py")}
    exec(code.split("# These packages")[0], found)
    assert found["args"].output == "output-3.mp4"
