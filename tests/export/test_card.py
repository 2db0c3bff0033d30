"""card.py: any prompt is shown as text, and every file and program in the card works."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from fakes import PLAIN, options_of, run_alone
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token
from running import PROMPT, ROOT

from cogvideox.config.buckets import Bucket
from cogvideox.config.flags import ModelFlags
from cogvideox.data.cache import CachedSample
from cogvideox.errors import UsageError
from cogvideox.evaluation.validation import Validator
from cogvideox.export import card as card_module
from cogvideox.export.card import Facts, Video, card_text, escape_markdown, example, read_license, write_card
from cogvideox.model.methods import Lora

HOSTILE = [
    'it\'s "quoted"',
    "three ''' and \"\"\" and \\ and \\n",
    "two\nlines\r\n\u2028and\x85more",
    "a\n---\nlicense: mit\n---\n# b",
    "---",
    "- a\n- b: {c: d}",
    "yes",
    "1e3",
    "null: ~",
    "!!python/object/apply:os.system ['true']",
    "a: &anchor *alias # comment",
    "{prompt} {0} {} %s ${HOME} $(rm) `rm`",
    "```\n# out of the code\n```",
    "``` a `b` ~~~",
    "a | b || c \\| d |",
    "<script>alert(1)</script> <img src=x onerror=y> <!-- a --> <Gallery />",
    "&lt;b&gt; &amp; &#60;",
    "[a](javascript:b) ![c](d) <https://e.f> [g]: h",
    "*a* __init__ _b_ **c** snake_case ~~d~~ $e$ $$f$$",
    "\n\n# heading\n\n> quote\n\n1. list\n\n\ttab",
    "\U0001f525 日本語 \x00\x1b[31m \u202eright to left",
    " a  b ",
    "x" * 500 + " " + "y " * 500,
]
MADE: dict[str, Any] = {"task": "TextToVideo", "method": "Lora", "step": 3000, "seed": 42, "samples_per_step": 1}
MADE |= {"learning_rate": 1e-4, "lr_scheduler": "constant", "optimizer": "adamw"}
MADE |= {"rank": 128, "lora_alpha": 64.0, "target_modules": ["to_q", "to_out.0"]}
MADE |= {"lora_scale": 0.5, "lora_scale_folded": "exactly"}
MADE |= {"versions": {"torch": "2.13.0+cpu"}, "python": "3.11.7", "device": "x86_64"}
MADE |= {"verification": {"max_difference": 0.25, "cosine": 0.99995}}
CLIPS: Any = SimpleNamespace(samples=[SimpleNamespace(bucket="49x480x720", clip="a", video_keys=("key",))])
SAMPLING = {"height": 480, "width": 720, "num_frames": 49, "guidance_scale": 6.0, "max_sequence_length": 226}


def facts(**changes: Any) -> Facts:
    """Returns the facts of a LoRA on the hub, with changes."""
    usual = {
        "name": "someone/my-lora",
        "on_hub": True,
        "model": ModelFlags("THUDM/CogVideoX-5b"),
        "pipeline": "CogVideoXPipeline",
        "dtype": "bfloat16",
        "code": Lora.inference(PLAIN, "bfloat16"),
        "negative": "",
        "sampling": SAMPLING,
        "decoding": ["enable_tiling"],
        "fps": 8,
        "token": "MYSTYLE",
        "clips": 70,
        "buckets": {"1x480x720": 1, "49x480x720": 69},
        "videos": [Video("a panda", "validation/a.mp4", "validation/b.mp4")],
        "pictures": [],
        "base_license": {"license": "apache-2.0"},
        "made": MADE,
    }
    return Facts(**(usual | changes))


def front(text: str) -> dict[str, Any]:
    """Returns the front matter, and checks that PyYAML and huggingface_hub read it alike."""
    opening, matter, _ = re.split("^---\n", text, maxsplit=2, flags=re.MULTILINE)
    assert opening == ""
    data = yaml.safe_load(matter)
    assert ModelCard(text).data.to_dict() == data
    return data


def body(text: str) -> str:
    return ModelCard(text).text


def tokens(text: str) -> list[Token]:
    """Returns the Markdown tokens of the body, including those within lines."""
    found = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body(text))
    return [part for token in found for part in (token, *(token.children or []))]


def cells(text: str) -> list[str]:
    """Returns the texts of the cells of the only table."""
    found = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body(text))
    inside = [found[i + 1] for i, token in enumerate(found) if token.type in ("th_open", "td_open")]
    return ["".join(part.content for part in token.children or []) for token in inside]


def shown(text: str) -> str:
    """Returns a text as one line of a page can show it."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


# -- whatever prompts hold ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", HOSTILE)
@pytest.mark.fault("security: markup and code in the prompts of a model card")
def test_the_hub_reads_the_prompt_and_nothing_else(prompt: str) -> None:
    plain = front(card_text(facts()))
    video = Video(prompt, "validation/a.mp4", "validation/b.mp4")
    data = front(card_text(facts(videos=[video], token=prompt)))
    assert data["widget"] == [{"text": prompt, "output": {"url": "validation/b.mp4"}}]
    assert data["instance_prompt"] == prompt
    assert data | {"widget": 0, "instance_prompt": 0} == plain | {"widget": 0, "instance_prompt": 0}
    assert list(data) == list(plain)


@pytest.mark.parametrize("prompt", HOSTILE)
@pytest.mark.fault("security: markup and code in the prompts of a model card")
def test_the_page_shows_the_prompt_and_nothing_else(prompt: str) -> None:
    def kinds(text: str) -> list[tuple[str, str]]:
        return [(token.type, token.tag) for token in tokens(text) if token.type not in ("text", "text_special")]

    plain, hostile = card_text(facts()), card_text(facts(videos=[Video(prompt, "a.mp4", "b.mp4")]))
    assert cells(hostile) == ["prompt", "before", "after 3000 steps", shown(prompt), "video", "video"]
    assert kinds(hostile) == kinds(plain)
    names = {"name": prompt, "token": prompt, "base_license": {"license": prompt}, "model": ModelFlags(f"hub/{prompt}")}
    assert kinds(card_text(facts(**names))) == kinds(plain)
    assert [token.content for token in tokens(hostile) if token.type.startswith("html")] == ["<Gallery />\n"]


@pytest.mark.parametrize("prompt", HOSTILE)
@pytest.mark.fault("security: markup and code in the prompts of a model card")
def test_the_program_passes_the_prompt_and_nothing_else(prompt: str) -> None:
    text = card_text(facts(videos=[Video(prompt, None, "b.mp4")], negative=prompt))
    (code,) = [token.content for token in tokens(text) if token.info == "python"]
    tree = ast.parse(code)
    (call,) = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "pipe"]
    values = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    assert values == SAMPLING | {"prompt": prompt, "negative_prompt": prompt}
    plain = ast.parse(example(facts(negative="blurred")))
    assert [type(node) for node in ast.walk(tree)] == [type(node) for node in ast.walk(plain)]
    assert "negative_prompt" not in example(facts())


def test_within_a_word_nothing_is_escaped() -> None:
    assert escape_markdown("snake_case 1.5-5b, (it's)!") == "snake_case 1.5-5b, (it's)!"
    assert escape_markdown("_a_ <b>") == "&#95;a&#95; &#60;b&#62;"


@pytest.mark.parametrize("target", ["javascript:alert(1)", "data:text/html,x", "http://plain", "JavaScript:x"])
def test_only_files_and_https_are_linked(target: str) -> None:
    text = card_text(facts(base_license={"license": "other", "license_name": "mine", "license_link": target}))
    assert {token.attrs["href"] for token in tokens(text) if token.type == "link_open"} == {
        "https://huggingface.co/THUDM/CogVideoX-5b",
        "validation/a.mp4",
        "validation/b.mp4",
        "recipe.json",
    }
    assert "applies: mine." in text


def test_a_link_stays_one() -> None:
    target = "https://a.b/c d)(<e>|\"'\n#?q=1"
    text = card_text(facts(base_license={"license": "other", "license_name": "m](x", "license_link": target}))
    (found,) = [str(t.attrs["href"]) for t in tokens(text) if t.type == "link_open" and "a.b" in str(t.attrs["href"])]
    assert found.startswith("https://a.b/c%20d")
    assert "m&#93;(x" in text


def test_a_link_keeps_its_query_and_fragment() -> None:
    target = "https://a.b/c?d=1&e=2#terms"
    text = card_text(facts(base_license={"license": "other", "license_link": target}))
    assert target in [token.attrs["href"] for token in tokens(text) if token.type == "link_open"]


# -- contents ----------------------------------------------------------------------------------------------------------


def test_metadata_for_the_hub() -> None:
    data = front(card_text(facts()))
    assert data == {
        "base_model": "THUDM/CogVideoX-5b",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "license": "apache-2.0",
        "pipeline_tag": "text-to-video",
        "tags": ["cogvideox", "text-to-video", "lora", "template:sd-lora"],
        "instance_prompt": "MYSTYLE",
        "widget": [{"text": "a panda", "output": {"url": "validation/b.mp4"}}],
    }


def test_text_for_readers() -> None:
    text = card_text(facts(pictures=["contact_sheet.png", "curves.png"]))
    assert "# someone/my-lora" in text
    assert "trained on 70 clips for 3000 steps" in text
    assert "49x480x720 (69 clips)" in text
    assert "1x480x720 (1 clip)" in text
    assert "rank 128, alpha 64, on to_q, to_out.0" in text
    assert "learning rate 0.0001, constant, adamw" in text
    assert "bfloat16; seed 42" in text
    assert "largest difference 0.25, cosine 0.9999500" in text
    assert "torch 2.13.0+cpu" in text
    assert "Begin prompts with MYSTYLE" in text
    assert [token.attrs["src"] for token in tokens(text) if token.type == "image"] == [
        "contact_sheet.png",
        "curves.png",
    ]


def test_a_run_without_prompts_and_token() -> None:
    text = card_text(facts(videos=[], token=None))
    assert set(front(text)) & {"widget", "instance_prompt"} == set()
    assert "Gallery" not in text
    assert 'prompt="a video"' in text
    assert "Begin prompts" not in text
    assert "## What it makes" not in text


def test_all_weights() -> None:
    made = {name: value for name, value in MADE.items() if name not in ("rank", "lora_alpha", "target_modules")}
    parts = 'transformer=diffusers.T.from_pretrained(here / "transformer", dtype=torch.bfloat16),'
    text = card_text(facts(made=made | {"method": "FullFinetune"}, code=(parts, "")))
    assert front(text)["tags"] == ["cogvideox", "text-to-video"]
    assert front(text)["base_model_relation"] == "finetune"
    assert "LoRA" not in text
    assert "load_lora" not in text
    assert parts in text


def test_image_to_video() -> None:
    text = card_text(facts(made=MADE | {"task": "ImageToVideo"}, pipeline="CogVideoXImageToVideoPipeline"))
    assert front(text)["pipeline_tag"] == "image-to-video"
    assert "image-to-video" in front(text)["tags"]
    assert 'image=load_image("first_frame.png")' in text
    assert 'inference.py "a prompt" first_frame.png video.mp4' in text
    ast.parse(example(facts(made=MADE | {"task": "ImageToVideo"})))
    video = Video("a panda", "validation/a.mp4", "validation/b.mp4", "image-0.png")
    text = card_text(facts(made=MADE | {"task": "ImageToVideo"}, videos=[video]))
    assert 'image=load_image(str(here / "image-0.png")),' in text
    assert cells(text)[-3:] == ["a panda (image)", "video", "video"]
    assert "image-0.png" in [token.attrs["href"] for token in tokens(text) if token.type == "link_open"]


class TilingVae:
    """Records whether it encodes and decodes in tiles."""

    def __init__(self) -> None:
        self.use_tiling, self.use_slicing, self.encoded, self.decoded = False, False, [], []

    def enable_tiling(self) -> None:
        self.use_tiling = True

    def disable_tiling(self) -> None:
        self.use_tiling = False

    def enable_slicing(self) -> None:
        self.use_slicing = True

    def encode(self) -> None:
        self.encoded.append(self.use_tiling)

    def decode(self, latents: str) -> str:
        self.decoded.append(self.use_tiling)
        return f"decoded {latents}"


@pytest.mark.parametrize("task", ["TextToVideo", "ImageToVideo"])
def test_only_decoding_is_tiled(task: str) -> None:
    """So it is in the validation and in inference.py."""
    code = example(facts(made=MADE | {"task": task}, decoding=["enable_slicing", "enable_tiling"]))
    start = code.index("pipe.enable_model_cpu_offload()")
    vae: Any = TilingVae()
    pipe = SimpleNamespace(enable_model_cpu_offload=lambda: None, vae=vae)
    exec(code[start : code.index("video = pipe(")], {"pipe": pipe})
    for _ in range(2):
        if task == "ImageToVideo":
            vae.encode()
        assert vae.decode("latents") == "decoded latents"
    assert (vae.use_slicing, vae.decoded) == (True, [True, True])
    assert not any(vae.encoded)


@pytest.mark.parametrize("task", ["TextToVideo", "ImageToVideo"])
@pytest.mark.parametrize("decoding", [[], ["enable_slicing"], ["enable_slicing", "enable_tiling"]])
def test_the_program_is_formatted(tmp_path: Path, task: str, decoding: list[str]) -> None:
    path = tmp_path / "example.py"
    path.write_text(example(facts(made=MADE | {"task": task}, decoding=decoding)) + "\n")
    command = [sys.executable, "-m", "ruff", "format", "--diff", "--config", ROOT / "pyproject.toml", path]
    assert not subprocess.run(command, capture_output=True, text=True, check=False).stdout


def test_a_base_model_on_this_machine(tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    text = card_text(facts(model=ModelFlags(str(folder))))
    assert set(front(text)) & {"base_model", "base_model_relation"} == set()  # The hub only accepts ids of its models.
    assert "a folder named my model on the machine of the training" in text
    assert '"path/to/my model"' in text
    assert str(tmp_path) not in text


def test_revision_and_variant_are_those_of_the_training() -> None:
    code = example(facts(model=ModelFlags("a/b", revision="main", variant="fp16")))
    assert '"a/b",\n    revision="main",\n    variant="fp16",\n    dtype=torch.bfloat16,' in code


def test_a_local_result_is_loaded_from_its_folder() -> None:
    code = example(facts(name="my-lora", on_hub=False))
    assert 'here = Path("my-lora")' in code
    assert "huggingface_hub" not in code


# -- the license -------------------------------------------------------------------------------------------------------

ITS_OWN = "license: other\nlicense_name: its-own\nlicense_link: https://a.b/c\n"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (f"---\n{ITS_OWN}tags:\n- a\n---\n# x\n", yaml.safe_load(ITS_OWN)),
        ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
        ("---\nlicense: other\nlicense_link: LICENSE\n---\n", {"license": "other"}),
        ("---\nlicense_link: https://a.b/c\n---\n", {"license": "other"}),
        ("---\nlicense: [mit, other]\n---\n", {"license": "other"}),
        ("---\n- a\n---\n", {"license": "other"}),
        ("---\na: [\n---\n", {"license": "other"}),
        ("# no front matter\n", {"license": "other"}),
        (b"\xff\xfe\x00", {"license": "other"}),
        (None, {"license": "other"}),
    ],
)
def test_the_license_is_that_of_the_base_model(tmp_path: Path, content: Any, found: dict[str, str]) -> None:
    if content is not None:
        (tmp_path / "README.md").write_bytes(content.encode() if isinstance(content, str) else content)
    assert read_license(ModelFlags(str(tmp_path))) == found


def test_the_license_of_a_model_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE\n---\n")
    monkeypatch.setattr(card_module, "hub_file", lambda model, name: tmp_path / name)
    link = "https://huggingface.co/THUDM/CogVideoX-5b/blob/main/LICENSE"
    assert read_license(ModelFlags("THUDM/CogVideoX-5b")) == {"license": "other", "license_link": link}


def test_a_hub_that_cannot_be_reached_costs_only_the_license(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_license(ModelFlags("no/such-model")) == {"license": "other"}  # Tests have no network.

    def gone(model: ModelFlags, name: str) -> Path:
        raise UsageError("gone")

    monkeypatch.setattr(card_module, "hub_file", gone)
    assert read_license(ModelFlags("a/b")) == {"license": "other"}
    assert "The license of the base model applies; it could not be read" in card_text(
        facts(base_license={"license": "other"})
    )


# -- of a run ----------------------------------------------------------------------------------------------------------


def test_every_file_that_the_card_names_exists(reference: Path) -> None:
    text = (reference / "README.md").read_text()
    targets = [str(token.attrs["href"]) for token in tokens(text) if token.type == "link_open"]
    targets += [str(token.attrs["src"]) for token in tokens(text) if token.type == "image"]
    targets += [entry["output"]["url"] for entry in front(text)["widget"]]
    assert len(targets) >= 4
    assert [name for name in targets if not (reference / name).is_file()] == []
    assert front(text)["widget"][0]["text"] == PROMPT
    assert cells(text) == ["prompt", "before", "after 6 steps", PROMPT, "video", "video"]
    assert json.loads((reference / "recipe.json").read_text())["step"] == 6


def test_the_files_that_belong_to_a_card(tmp_path: Path) -> None:
    """For two prompts with two videos each, these are the pictures, images and videos that exist."""
    options = options_of(tmp_path, "--num_validation_videos", 2)
    path = partial(Validator.path, SimpleNamespace(run=run_alone(tmp_path), prompts=SimpleNamespace(texts=["a", "b"])))
    validator: Any = SimpleNamespace(
        prompts=SimpleNamespace(texts=["a", "b"]),
        flags=options.validation,
        path=path,
        sampling=SAMPLING,
        fps=8.0,
        whole_fps=8,
    )
    after = [path(7, place, number) for place in (0, 1) for number in (0, 1)]
    present = [*after, path(0, 1, 0), path(3, 0, 0), tmp_path / "image-1.png", tmp_path / "curves.png"]
    for file in present:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    task, method, index = (SimpleNamespace(pipeline="P"), SimpleNamespace(inference=lambda _: ("", "")), CLIPS)
    made = MADE | {"task": "ImageToVideo", "step": 7}
    files = write_card(run_alone(tmp_path), options, task, method, validator, index, made)
    assert len(files) == len(set(files))
    assert set(files) == {tmp_path / "README.md", *present} - {path(3, 0, 0)}
    assert cells((tmp_path / "README.md").read_text())[3:] == [
        *("a", "", "video", "a", "", "video"),
        *("b (image)", "video", "video", "b (image)", "", "video"),
    ]


def test_a_clip_is_counted_once(tmp_path: Path) -> None:
    """Clip a is listed twice, as by --repeats 2, and used in two buckets; b is listed once and used in one of them."""
    names = ["a@9x64x96", "a@1x64x96", "a (2)@9x64x96", "a (2)@1x64x96", "b"]
    samples = [
        CachedSample(name, "", Bucket(1 if "@1x" in name else 9, 64, 96), (f"{name[0]}{'@1x' in name}",), "")
        for name in names
    ]
    validator = SimpleNamespace(prompts=SimpleNamespace(texts=[]), sampling=SAMPLING, whole_fps=8)
    task, method = (SimpleNamespace(pipeline="P"), SimpleNamespace(inference=lambda _: ("", "")))
    run, options, index = run_alone(tmp_path), options_of(tmp_path), SimpleNamespace(samples=samples)
    write_card(run, options, task, method, validator, index, MADE)  # type: ignore[arg-type]
    card = (tmp_path / "README.md").read_text()
    assert "trained on 2 clips for 3000 steps" in card
    assert "1x64x96 (1 clip), 9x64x96 (2 clips)." in card


def test_the_program_runs_in_stock_diffusers(model: Path, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [t.content for t in tokens((reference / "README.md").read_text()) if t.info == "python"]
    written: list[Any] = []
    monkeypatch.setattr(
        "diffusers.utils.export_to_video", lambda frames, path, fps: written.append((frames, path, fps))
    )
    # Offloading needs a GPU.
    monkeypatch.setattr("diffusers.CogVideoXPipeline.enable_model_cpu_offload", lambda self: None)
    monkeypatch.chdir(reference.parent)
    exec(compile(code.replace(f"path/to/{model.name}", str(model)), "card", "exec"), {})
    ((frames, path, fps),) = written
    assert (len(frames), frames[0].size, path, fps) == (9, (96, 64), "output.mp4", 8)


def test_a_missing_video_is_omitted() -> None:
    video = replace(facts().videos[0], before=None)
    assert cells(card_text(facts(videos=[video])))[-3:] == ["a panda", "", "video"]
