"""Tests the README and docs: every command parses, every file exists, and every figure equals a measurement."""

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import bench
import guide_memory
import pytest
import record
import small_card
import yaml
from accelerate.commands.launch import launch_command_parser
from running import ROOT
from script_options import OPTIONS
from torch.distributed.run import get_args_parser

from cogvideox.config import args
from cogvideox.config.options import DoctorOptions, fields_of
from cogvideox.config.presets import PRESETS
from cogvideox.export.inference_code import NUMBERS

README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
GUIDE = (ROOT / "docs" / "guide.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


SET_UP = (
    "python3 -m venv .venv",
    "source .venv/bin/activate",
    "pre-commit install",
    "docker build --tag cogvideox .",
    "docker run --rm --gpus all cogvideox",
    """vllm serve Qwen/Qwen2.5-VL-7B-Instruct --max-model-len 16384 --limit-mm-per-prompt '{"image": 8}'""",
)
INFERENCE_FLAGS = {f"--{name}" for name, _ in NUMBERS.values()}  # of inference.py; all take a number
LORA_SCRIPTS = ("merge_lora", "extract_lora", "convert_lora")


PAGES = [*sorted(ROOT.glob("README*.md")), ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = "".join(page.read_text() for page in PAGES if page.exists())


def commands() -> list[str]:
    """Returns the command lines of all bash blocks, each once."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXTS, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return list(dict.fromkeys(line.split(" #")[0].strip() for line in lines if line.strip()))


def links() -> list[tuple[str, str]]:
    """Returns (file, target) of every link to a file or a heading of this repository."""
    pages = [page for page in PAGES if page.exists()]
    found = [
        (str(page.relative_to(ROOT)), to) for page in pages for to in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    ]
    return sorted({(page, to) for page, to in found if not re.match(r"[a-z]+:", to)})


def anchors_of(page: Path) -> set[str]:
    """Returns the names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "target"), links())
def test_link(page: str, target: str) -> None:
    name, _, anchor = target.partition("#")
    path = (ROOT / page).parent / name if name else ROOT / page
    assert path.exists()
    assert not anchor or anchor in anchors_of(path)


@pytest.mark.parametrize("command", commands())
def test_command(command: str) -> None:
    words = shlex.split(command)
    while "=" in words[0]:
        words.pop(0)
    if command not in SET_UP and words[:2] == ["docker", "run"]:
        words = words[words.index("cogvideox") + 1 :]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0].startswith("./"):
        assert (ROOT / words[0]).stat().st_mode & 0o111
    elif words[0] == "pip":
        flags = {"-r", "-c", "install", "pip", "pre-commit"}
        assert all((ROOT / word).is_file() for word in words if word not in flags)
    elif words[0] in ("python3", "source", "pre-commit", "vllm", "docker") or words[:2] == ["git", "clone"]:
        assert command in SET_UP
    elif words[1] == "-m":
        assert words[2] == "pytest"
        assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests"))
    elif words[0] == "sky":
        assert (ROOT / words[-1]).is_file()
    elif words[0] == "hf":
        assert " ".join(words) in (ROOT / "scripts" / "sweep.sh").read_text().replace(
            "$DATASET", "Wild-Heart/Disney-VideoGeneration-Dataset"
        )
    elif words[1].endswith("/inference.py"):
        positional = 3 if "i2v" in words[1] else 2
        assert len(words) >= 2 + positional
        flags = words[2 + positional :]
        assert set(flags[::2]) <= INFERENCE_FLAGS
        assert all(float(value) >= 0 for value in flags[1::2])
    elif words[1].startswith(("scripts/", "benchmarks/")) or (
        words[1].startswith("examples/") and words[0] == "python"
    ):
        parsed = importlib.import_module(Path(words[1]).stem).build_parser().parse_args(words[2:])
        if words[1] == "examples/ray_train.py":
            check_script(parsed.command)
    elif words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        assert (ROOT / launched.config_file).is_file()
        check_script([launched.training_script, *launched.training_script_args])
    elif words[0] == "torchrun":
        started = get_args_parser().parse_args(words[1:])
        check_script([started.training_script, *started.training_script_args])
    else:
        script = next(i for i, word in enumerate(words) if word.startswith("training/"))
        assert all((ROOT / word).is_file() for word in words[:script] if word.startswith("examples/"))
        assert words[0] in ("python", "sbatch")
        check_script(words[script:])


@pytest.mark.parametrize("name", OPTIONS)
def test_command_in_the_help(name: str) -> None:
    """The help of each script starts with commands that its readers can copy."""
    text = importlib.import_module(name.removesuffix(".py")).__doc__ or ""
    found = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.startswith("    python training/")]
    assert found
    for command in found:
        check_script(shlex.split(command)[1:])


def check_script(words: list[str]) -> None:
    """Checks that a script of this project exists and accepts the flags that follow its name."""
    args.read_flags(OPTIONS[Path(words[0]).name], words[1:], None)
    assert (ROOT / words[0]).is_file()


def test_the_template_of_a_bug_asks_for_the_page_of_the_doctor() -> None:
    fields = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())["body"]
    (field,) = (field for field in fields if field["id"] == "doctor")
    command = re.search(r"python training/doctor.py (.*?)\.\s", field["attributes"]["description"])
    assert command
    args.read_flags(DoctorOptions, shlex.split(command[1]), None)
    assert field["validations"]["required"]


def test_there_are_commands() -> None:
    assert len(commands()) >= 10


def test_listed_files_exist() -> None:
    listed = re.findall(r"`([\w./]+)`", ARCHITECTURE.split("## The files")[1].split("##")[0])
    missing = [name for name in listed if not (ROOT / name).exists() and name != "__init__.py"]
    assert len(listed) > 10
    assert missing == []


def test_where_to_find_it_names_what_exists() -> None:
    """Each folder's __init__.py names the module of the rule, so that a reader opens at most two files."""
    library = ROOT / "training" / "cogvideox"
    section = ARCHITECTURE.split("## Where to find it")[1].split("\n## ")[0]
    rows = re.findall(r"^\| [^|]+ \| `([\w.]+?)/?`[^|]* \| `([\w/]+\.py)` \| `([\w.]+)` \|$", section, re.MULTILINE)
    assert len(rows) >= 9
    for folder, module, name in rows:
        init = library / "__init__.py" if folder == module else library / folder / "__init__.py"
        assert module.removeprefix(f"{folder}/") in init.read_text(), (folder, module)
        value = importlib.import_module(f"cogvideox.{module.removesuffix('.py').replace('/', '.')}")
        for part in name.split("."):
            value = getattr(value, part)


def test_guides_of_the_architecture_name_what_exists() -> None:
    library = ROOT / "training" / "cogvideox"
    guides = [part for part in ARCHITECTURE.split("\n## ") if part.startswith("How to add")]
    assert len(guides) == 5
    for guide in guides:
        names = re.findall(r"`([\w/]+\.(?:py|txt|md))`", guide)
        paths = [library / name if (library / name).is_file() else ROOT / name for name in names]
        text = "".join(path.read_text() for path in paths)
        assert [word for word in re.findall(r"`(\w+)`", guide) if not re.search(rf"\b{word}\b", text)] == []


def test_docstrings_of_folders_list_every_module() -> None:
    library = ROOT / "training" / "cogvideox"
    for init in library.rglob("__init__.py"):
        listed = set(re.findall(r"^(\w+\.py) ", init.read_text(), re.MULTILINE))
        assert listed == {path.name for path in init.parent.glob("*.py")} - {"__init__.py"}, init
    folders = {f"{init.parent.relative_to(library)}/" for init in library.rglob("*/__init__.py")}
    assert set(re.findall(r"^([\w/]+/) ", (library / "__init__.py").read_text(), re.MULTILINE)) == folders


def test_messages_of_the_troubleshooting_page_exist() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    messages = [message.removesuffix("cogvideox_...") for row in rows for message in re.findall(r"`([^`]+)`", row)]
    source = " ".join(path.read_text() for path in (ROOT / "training").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)  # joins texts that continue on the next line
    assert len(messages) > 10
    assert [message for message in messages if message not in joined] == []


def test_flags_in_the_text_exist() -> None:
    items = [item for options in OPTIONS.values() for _, item, _ in fields_of(options)]
    known = {f"--{name}" for item in items for name in (item.name, *item.metadata["aliases"])}
    for name in LORA_SCRIPTS:
        known |= set(importlib.import_module(name).build_parser()._option_string_actions)
    benchmarks = bench.build_parser(), guide_memory.build_parser(), small_card.build_parser()
    for parser in (*benchmarks, launch_command_parser(), get_args_parser()):
        known |= set(parser._option_string_actions)
    known |= INFERENCE_FLAGS
    known |= set(re.findall(r"^# (--\w+)", (ROOT / "quickstart.sh").read_text(), re.MULTILINE))
    # Flags of other benchmarks, of examples, of tests/tools/odd_files.py and of every script. The last are of sips,
    # Docker, TensorBoard, trackio and SLURM.
    outside = {
        "--base",
        "--work_dir",
        "--results",
        "--clips",
        "--steps",
        "--batch",
        "--compare",
        "--help",
        "--help_all",
        "--write",
        "--out",
        *("--shm", "--user", "--ulimit", "--privileged", "--memory", "--env", "--network", "--build"),
        *("--logdir", "--samples_per_plugin", "--project"),
        *("--signal", "--kill", "--export"),
    }
    text = re.sub(r"```.*?```", "", TEXTS, flags=re.DOTALL).replace("\\_", "_")
    named = set(re.findall(r"--[a-z0-9_]+", text)) - outside
    assert named <= known


def complete_run(name: str) -> tuple[dict[str, Any], float, float, float]:
    """Returns a result of small_card.py, and its seconds a step, peak GiB and reserved GiB. The run has succeeded."""
    row: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    assert row["status"] == 0
    assert row["verification"]["max_difference"] == 0
    seconds = sorted(step["seconds"] for step in row["steps"])[len(row["steps"]) // 2]
    peak, reserved = (max(step[name] for step in row["steps"]) for name in ("peak_gib", "reserved_gib"))
    return row, seconds, peak, reserved


def test_the_small_card_is_what_was_measured() -> None:
    row, seconds, peak, reserved = complete_run("small_card_5b")
    line = BENCHMARKS.partition("`benchmarks/small_card.py`")[2].splitlines()[1]
    assert all(text in line for text in (f"{row['gib']:.0f} GiB", f"{seconds:.2f} s", f"{peak:.1f}", f"{reserved:.1f}"))


def test_the_run_within_64_gib_is_what_was_measured() -> None:
    row, seconds, peak, _ = complete_run("small_card_5b_sft_host_64_killed")
    text = " ".join(BENCHMARKS.partition("Training all weights of 5b within")[2].partition("\n\n")[0].split())
    waited = [line.partition("training waited ")[2].split()[0] for line in row["said"] if "training waited" in line]
    claims = (
        f"{row['gib']:.0f} GiB and {row['host_gib']:.0f} GiB of host memory",
        f"{seconds:.2f} s a step and {peak:.1f} GiB",
        f"at least {row['group_left_gib'] // 0.1 / 10:.1f} GiB of host memory",
        f"killed after step {row['killed_after']}, resumed from step {row['resumed_from']}",
        *(f"training waited {number} s" for number in waited),
    )
    assert len(waited) == 2
    assert [claim for claim in claims if claim not in text] == []


def test_preparation_over_two_gpus_is_what_was_measured() -> None:
    one, two = json.loads((RESULTS / "prepare_ranks.json").read_text())["arms"]
    text = " ".join(BENCHMARKS.partition("## Preparation")[2].partition("\n## ")[0].split())
    assert (one["gpus"], two["gpus"]) == (1, 2)
    claims = (
        f"prepared {two['clips_a_second']:.2f} clips",
        f"{two['times_as_fast']:.2f} times as many as one of them ({one['clips_a_second']:.2f})",
    )
    assert [claim for claim in claims if claim not in text] == []


def bench_row(name: str) -> tuple[float, float, float | None]:
    """Returns seconds a step, peak GiB and the ratio to the stock arm of a measured row."""
    row = json.loads((RESULTS / f"bench_{name}.json").read_text())
    return row["seconds_per_step"], row["peak_gib"]["allocated"], row["ratio"]


def test_claims_of_the_readme_are_what_was_measured() -> None:
    text = " ".join(README.split())
    lean, stock, without = (bench_row(f"5b-r128-{arm}") for arm in ("lean", "stock", "lean-cudnn"))
    every, every_stock, fast = (bench_row(f"5b-sft-{arm}") for arm in ("lean", "stock", "80gb"))
    injected = re.search(r"^(\d+) faults were injected", (ROOT / "docs" / "faults.md").read_text(), re.MULTILINE)
    fewest = re.search(r"more than (\d+) kinds of faults", text)
    assert injected is not None
    assert fewest is not None
    assert int(fewest[1]) < int(injected[1])
    claims = (
        f"trains in {lean[1]:.1f} GiB of GPU memory",
        f"needs {stock[1]:.1f} GiB",
        f"Training all weights takes {every[1]:.1f} GiB instead of {every_stock[1]:.1f} GiB",
        f"takes {lean[0]:.2f} s a step and is {lean[2]:.1f} times as fast",
        f"With 24 GB of GPU memory, it takes {bench_row('5b-r128-24gb')[0]:.2f} s a step",
        f"Training all weights with 80 GB takes {fast[0]:.2f} s a step, against {every_stock[0]:.2f} s",
        f"training the LoRA is {without[2]:.1f} times as fast",
    )
    assert [claim for claim in claims if claim not in text] == []


def test_losses_of_smaller_state_are_what_was_measured() -> None:
    found = json.loads((RESULTS / "seeds_moments_bf16.json").read_text())["held_out"]
    text = " ".join((ROOT / "docs" / "optimizers.md").read_text().split())
    largest = {name: f"{found[f'largest_difference_{name}']:.4f}" for name in ("8bit", "bf16", "stochastic")}
    both = f"{found['largest_difference_stochastic-8bit']:.4f}"
    claims = (
        f"held-out loss of {found['mean']:.4f} with exact moments. "
        f"`--use_8bit` changes it by at most {largest['8bit']}",
        f"seeds differ by {found['deviation_over_seeds']:.4f}",
        f"`--use_bf16_moments` changes the held-out loss by at most {largest['bf16']}, `--use_stochastic_rounding` by "
        f"{largest['stochastic']}, and with `--use_8bit` by {both}",
    )
    assert [claim for claim in claims if claim not in text] == []
    assert max(map(float, (*largest.values(), both))) < found["deviation_over_seeds"]  # the gate: seed noise


def test_clips_of_the_guide_give_the_steps_of_the_presets() -> None:
    rows = re.findall(r"`(\w+)` \| (\d+) \| (\d+) clips: (\d+) steps \|$", GUIDE, re.MULTILINE)
    assert [name for name, *_ in rows] == list(PRESETS)
    for name, passes, clips, steps in rows:
        assert passes == PRESETS[name]["num_train_epochs"]
        assert int(steps) == int(passes) * int(clips)


def test_hours_of_the_guide_follow_from_its_steps() -> None:
    rows = re.findall(r"^\| .* \| ([\d.]+) s \| ([\d.]+) hours \| ([\d.]+) hours \| .* (\w+) \|$", GUIDE, re.MULTILINE)
    for seconds, thousand, style in [[float(text) for text in row[:3]] for row in rows]:
        assert (thousand, style) == (round(seconds / 3.6, 1), round(2.8 * seconds / 3.6, 1))
    measured = [seconds for seconds, *_, source in rows if source == "measured"]
    assert measured == [f"{bench_row(f'5b-r128-{plan}')[0]:.2f}" for plan in ("fast", "fast-cudnn")]
    assert len(rows) == 4


def test_costs_of_the_guide_follow_from_its_hours() -> None:
    seconds = dict(re.findall(r"^\| ([^|]*) \| ([\d.]+) s \| [\d.]+ hours", GUIDE, re.MULTILINE))
    money = r"\$([\d.]+) to \$([\d.]+)"
    rows = re.findall(rf"^\| ([^|]*) \| {money} \| {money} \| {money} \|$", GUIDE, re.MULTILINE)
    assert len(rows) == 3
    for card, *figures in rows:
        hours = float(seconds[card]) / 3.6
        prices = [float(text) for text in figures[:2]]
        assert figures[2:] == [f"{steps * hours * price:.2f}" for steps in (1, 2.8) for price in prices]
    assert f"about {0.170 * float(seconds['RTX 3060, 12 GB']) / 3.6:.1f} kWh" in GUIDE


def test_claims_of_the_guide_about_several_gpus_are_what_was_measured() -> None:
    names = ("lora_1_uncompiled_1", "lora_4_uncompiled_2")
    one, four = (json.loads((RESULTS / f"scale_5b_{name}_plan_lean_cudnn.json").read_text()) for name in names)
    fsdp2, zero2 = (
        json.loads((RESULTS / f"scale_5b_sft_4_{name}_cudnn.json").read_text()) for name in ("fsdp2", "zero2")
    )
    claims = (
        f"Four H100 train {4 * one['seconds_per_step'] / four['seconds_per_step']:.1f} times as many",
        f"FSDP2 takes {fsdp2['seconds_per_step']:.2f} s a step for 5b, and DeepSpeed ZeRO-2 takes "
        f"{zero2['seconds_per_step']:.2f} s",
    )
    text = " ".join(GUIDE.split())
    assert [claim for claim in claims if claim not in text] == []


def test_plans_of_the_readme_are_what_was_measured() -> None:
    section = README.split("## Which plan for which card")[1].split("\n## ")[0]
    shown = re.findall(r"\| ([\d.]+) s \| ([\d.]+) GiB \|$", section, re.MULTILINE)
    rows = [f"5b-r128-{plan}" for plan in ("fast", "24gb", "12gb", "8gb", "lean")]
    rows += [f"5b-sft-{plan}" for plan in ("80gb", "24gb-8bit", "lean-8bit")]
    assert shown == [(f"{seconds:.2f}", f"{gib:.1f}") for seconds, gib, _ in map(bench_row, rows)]
    results = [json.loads(bench.path_of(RESULTS, row).read_text()) for row in rows]
    assert "The rows were measured on one H200." in section
    assert {result["device"] for result in results} == {"NVIDIA H200"}


def test_table_of_bench_is_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--table"]) == 0
    assert record.between(BENCHMARKS, "bench.py")[1] == capsys.readouterr().out


def test_names_that_other_trainers_give_are_listed() -> None:
    text = (ROOT / "docs" / "other_trainers.md").read_text()
    items = [item for options in OPTIONS.values() for _, item, _ in fields_of(options)]
    names = {name for item in items for name in item.metadata["aliases"]} - {"validation_prompt_seperator"}
    names |= {item.name for item in items if item.metadata["idle"]}
    assert {name for name in names if f"--{name}" not in text} == set()
