"""Tests deepspeed.py: a configuration of DeepSpeed that contradicts the flags is refused by name."""

import json
from pathlib import Path

import pytest
from running import lora_flags, sft_flags

from cogvideox.config import args
from cogvideox.config.conflicts import check_launcher
from cogvideox.config.options import LoraOptions, SftOptions

PREFIX = "accelerate launch (DeepSpeed): "


def problems(*flags: object, lora: bool = False) -> list[str]:
    """Returns what is wrong with the launcher's configuration and the flags of a small run."""
    kind, make = (LoraOptions, lora_flags) if lora else (SftOptions, sft_flags)
    options = args.parse(kind, None, make(Path("model"), Path("data"), Path("out"), *flags))
    found = list(check_launcher(options))
    assert all(problem.startswith(PREFIX) for problem in found)
    return [problem.removeprefix(PREFIX) for problem in found]


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("LOCAL_RANK", "0")


@pytest.mark.parametrize(
    ("environment", "start", "fix"),
    [
        ({"GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps 4: contradicts", "leave it out"),
        ({"GRADIENT_CLIPPING": "0.5"}, "gradient_clipping 0.5: contradicts --max_grad_norm 1", "leave it out"),
        ({"DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "offload_param_device cpu: needs zero_stage 3", "none"),
        ({"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "offload_optimizer_device nvme: only cpu", "cpu or none"),
        ({"DEEPSPEED_CONFIG_FILE": "no.json"}, "deepspeed_config_file no.json: is not a JSON file", "give another"),
    ],
)
def test_settings_of_accelerate_that_contradict(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], start: str, fix: str
) -> None:
    assert not problems()
    for name, value in environment.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    (found,) = problems()
    assert found.startswith(start)
    assert fix in found


def test_settings_that_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "1.0")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu")
    assert not problems()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    (found,) = problems()
    assert found.startswith("dynamo_backend inductor: ")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    (found,) = problems(lora=True)
    assert found.startswith("zero_stage 3: ")
    assert "accelerate_configs/uncompiled_2.yaml" in found


def test_a_file_of_the_user_is_compared_with_the_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    agreeing = {"zero_optimization": zero, "train_batch_size": 4, "train_micro_batch_size_per_gpu": 1}
    agreeing |= {"gradient_accumulation_steps": "auto", "gradient_clipping": 1, "bf16": {"enabled": True}}
    path.write_text(json.dumps(agreeing | {"fp16": {"enabled": "auto"}}))
    assert not problems("--mixed_precision", "bf16")
    wrong = agreeing | {"train_batch_size": 8, "gradient_accumulation_steps": 4, "optimizer": {"type": "AdamW"}}
    path.write_text(json.dumps(wrong | {"zero_optimization": zero | {"memory_efficient_linear": True}}))
    assert [problem.partition(":")[0] for problem in problems("--mixed_precision", "no")] == [
        "memory_efficient_linear true",
        "gradient_accumulation_steps 4",
        "train_batch_size 8",
        "bf16.enabled true",
        "optimizer",
    ]


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "zero_optimization.round_robin_gradients"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "zero_optimization.offload_optimizer.ratio",
        ),
        ({"bf16": {"enabled": "auto", "check_grad_overflow": False}}, "bf16.check_grad_overflow"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types"),
        ({"fp16": {"enabled": "auto", "loss_scale": 128}}, "fp16.loss_scale 128"),
        ({"zero_optimization": {"stage": 1}}, "zero_stage 1"),
    ],
)
def test_settings_that_may_change_the_result_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: dict[str, object], name: str
) -> None:
    path = tmp_path / "ds.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    agreeing: dict[str, object] = {"zero_optimization": {"stage": 3, "sub_group_size": 1e9}, "steps_per_print": 10}
    path.write_text(json.dumps(agreeing | {"fp16": {"enabled": "auto", "loss_scale": 0, "hysteresis": 2}}))
    assert not problems()
    path.write_text(json.dumps(agreeing | more))
    (found,) = problems()
    assert found.startswith(f"{name}: ")


def test_flags_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-2 follows what is saved for backward, but not where weights and state are; ZeRO-3 follows nothing."""
    assert not problems("--keep", "attention", "--kept_on", "device")
    assert [text.partition(":")[0] for text in problems("--plan", "lean")] == ["--plan lean"]
    (found,) = problems("--optimizer_state_on", "host")
    assert "set offload_optimizer_device: cpu" in found
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    (found,) = problems("--optimizer_state_on", "device")
    assert found.startswith("--optimizer_state_on device: contradicts offload_optimizer_device cpu")
    (found,) = problems("--base_precision", "int8", lora=True)
    assert found.startswith("--base_precision int8: is not supported under DeepSpeed")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    (found,) = problems("--keep", "attention")
    assert found.startswith("--keep attention: zero_stage 3 runs diffusers' own blocks")
