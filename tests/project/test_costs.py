"""Tests that docs/costs.md follows from what was measured: its inputs are read again, and its formulas are computed."""

import json
import math
import re

import pytest
import random_models
import torch
from diffusers import CogVideoXTransformer3DModel
from running import ROOT

from cogvideox.config import args
from cogvideox.config.buckets import Bucket
from cogvideox.config.flags import TrainFlags
from cogvideox.config.geometry import geometry_of
from cogvideox.config.options import SftOptions
from cogvideox.model.models import DTYPES
from cogvideox.planning.dry_run import STORED
from cogvideox.runtime.disk_room import checkpoint_bytes

PAGE = (ROOT / "docs" / "costs.md").read_text()
GUIDE = (ROOT / "docs" / "guide.md").read_text()
UNITS = {
    "": 1,
    "thousand": 1000,
    "%": 0.01,
    "s": 1,
    "minutes": 60,
    "hours": 3600,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "GB/s": 1e9,
}
INPUTS = re.findall(r"^\| `(\w+)` \| ([^`|]+) \| [^|]+ \| ([^|]+) \|$", PAGE, re.MULTILINE)
RESULTS = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| ([^|]+) \| [^|]+ \|$", PAGE, re.MULTILINE)
GEOMETRY = geometry_of(random_models.TRANSFORMERS["5b"], random_models.VAE, {})


def result(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def known() -> dict[str, float]:
    """Returns the inputs that are measured or follow from shapes, by name, without rounding."""
    arms = {arm["arm"]: arm for arm in result("prepare")["arms"]}
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(**random_models.TRANSFORMERS["5b"])
    shards = result("scale_5b_sft_4_fsdp2")
    (first,) = (re.search(r"first step finished after ([\d.]+) s", line) for line in shards["said"] if "first" in line)
    return {
        "latents": math.prod(GEOMETRY.moments_shape(Bucket(49, 480, 720))),
        "text": GEOMETRY.max_text_seq_length * GEOMETRY.text_embed_dim,
        "weights": sum(parameter.numel() for parameter in transformer.parameters()),
        "encode": arms["store"]["seconds_a_clip"],
        "caption": arms["t5 resident, 8 at once"]["seconds_a_caption"],
        "step": shards["seconds_per_step"],
        "start": float(first[1]),
    }


def quantity(text: str) -> tuple[float, float, int]:
    """Returns a quantity, the size of its unit, and its decimal places."""
    found = re.fullmatch(r"\$?([\d.]+) ?(\S*)", text)
    assert found, text
    return float(found[1]) * UNITS[found[2]], UNITS[found[2]], len(found[1].partition(".")[2])


def shows(text: str, value: float) -> bool:
    """Returns whether a text is a value, rounded to the decimal places of the text."""
    _, unit, places = quantity(text)
    return quantity(text)[0] == quantity(f"{value / unit:.{places}f}")[0] * unit


def test_inputs_are_what_was_measured() -> None:
    shown, sources = ({name: row[i] for name, *row in INPUTS} for i in (0, 1))
    values = known()
    assert {name for name, source in sources.items() if source.split(",")[0] not in ("chosen", "assumed")} == set(
        values
    )
    assert [name for name, value in values.items() if not shows(shown[name], value)] == []
    files = re.findall(r"`(\w+\.json)`", PAGE)
    assert len(files) == 5
    cold, warm = (result("startup_5b")[state]["first_step"] for state in ("cold", "warm"))
    assert f"a first start took {cold} s and a second one {warm} s" in PAGE
    assert [file for file in files if not (ROOT / "benchmarks" / "results" / file).exists()] == []
    assert shown["price"] in GUIDE


@pytest.mark.parametrize("price", [0, 1])
def test_results_follow_from_the_inputs(price: int) -> None:
    values = {name: quantity(text.split(" to ")[price if " to " in text else 0])[0] for name, text, _ in INPUTS}
    values |= known()
    assert len(RESULTS) > 12
    for name, formula, text in RESULTS:
        values[name] = eval(formula, {"__builtins__": {}}, values)
        assert shows(text.split(" to ")[price if " to " in text else 0], values[name]), (name, values[name])


def test_formulas_count_the_bytes_of_the_code() -> None:
    formulas = {name: formula for name, formula, _ in RESULTS}
    assert formulas["clip"].startswith(f"{DTYPES[STORED].itemsize} *")
    flags = ["--pretrained_model_name_or_path", "m", "--data_root", "d", "--output_dir", "o", "--optimizer", "adamw"]
    options, _ = args.read_flags(SftOptions, flags, None)
    one = checkpoint_bytes(options, 1, torch.bfloat16, torch.device("cpu"), refers=False)
    assert eval(formulas["checkpoint"], {"weights": 1}) == one
    assert f"`--nccl_timeout` ({TrainFlags.nccl_timeout} s)" in PAGE
