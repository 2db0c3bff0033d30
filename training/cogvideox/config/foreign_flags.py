"""Lists the flags that a script accepts, and applies one rule to those that it does not use.

Other scripts of the suite and the scripts of the CogVideoX guides have flags for which a script has no use. It accepts
them, so that one command works for several scripts: such a flag is parsed like any other, and its ``report`` says once
that it has no effect. It is an error where ignoring it would do something else than was asked, such as train another
model. This module needs only the standard library.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cogvideox.config.flags import GuideFlags
from cogvideox.config.options import SCRIPTS, Options, TrainOptions, fields_of, names_of

# The defaults of the CogVideo guide's script that differ from those here and change what is learned.
GUIDE_DEFAULTS = {
    "learning_rate": "2e-5",
    "optimizer": "adamw",
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": "100",
    "train_batch_size": "1",
    "num_train_epochs": "10",
    "rank": "128",
    "caption_dropout": "0",
    "noised_image_dropout": "0",
}


@dataclass(frozen=True)
class AcceptedFlag:
    """A flag as one script accepts it.

    Attributes:
        group: The group of the options that stores its value; None if only other scripts have the flag.
        item: The field of the flag.
        annotation: The type of its value.
        names: Its names in this script.
        owners: The scripts that have the flag, as a message names them; empty if this script has it.
    """

    group: str | None
    item: "dataclasses.Field[Any]"
    annotation: Any
    names: tuple[str, ...]
    owners: str = ""

    @property
    def unused(self) -> str:
        """Why this script does not use the flag; empty if it does."""
        return self.item.metadata["idle"] or (self.owners and f"used only by {self.owners}")

    @property
    def refused(self) -> bool:
        """Whether giving the flag is an error."""
        return bool(self.owners and self.item.metadata["refused"])

    @property
    def report(self) -> str:
        """The line that is printed if a flag that is not used is given."""
        if self.refused:
            return f"--{self.item.name}: is for {self.owners}; {self.item.metadata['refused']}"
        return f"--{self.item.name}: has no effect here; {self.unused}"


def accepted_flags(options_type: type) -> list[AcceptedFlag]:
    """Returns the flags of a script, followed by those that only other scripts of the suite have."""
    own = [AcceptedFlag(*row, names_of(row[1])) for row in fields_of(options_type)]
    taken = {name for flag in own for name in flag.names}
    scripts: dict[str, list[str]] = {}
    found: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    for script, other in SCRIPTS.items():
        for _, item, annotation in fields_of(other):
            if item.name not in taken:
                scripts.setdefault(item.name, []).append(script)
                found[item.name] = item, annotation
    foreign = []
    for item, annotation in found.values():
        # Another name of one flag may be the name of another: --batch_size is also short for --train_batch_size.
        names = (item.name, *(name for name in item.metadata["aliases"] if name not in taken | found.keys()))
        foreign.append(AcceptedFlag(None, item, annotation, names, named(scripts[item.name])))
    return own + foreign


def named(scripts: list[str]) -> str:
    """Returns scripts as a message names them."""
    return "the training scripts" if len(scripts) == len(SCRIPTS) - 1 else ", ".join(scripts)


def request_problems(options_type: type[Options], values: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yields a problem for flags of other trainers that ask for another script or for a download.

    Args:
        options_type: The options of the script.
        values: The values of the given flags, by group and flag.
    """
    data = values.get("data", {})
    asked = {name: data[name] for name in ("dataset_name", "dataset_config_name") if name in data}
    if asked:
        flags = " ".join(f"--{name} {value}" for name, value in asked.items())
        download = f"hf download --repo-type dataset {asked.get('dataset_name', 'NAME')} --local-dir D"
        yield f"{flags}: data sets of the hub are not downloaded here; {download}, then give --data_root D"
    if issubclass(options_type, TrainOptions):
        yield from guide_problems(options_type, GuideFlags(**values["guide"]))


def guide_problems(options_type: type[TrainOptions], guide: GuideFlags) -> Iterator[str]:
    """Yields a problem if the flags of the CogVideo guide ask for what another script trains."""
    family = (guide.model_name or "").rpartition("-")[2]
    task, method = guide.model_type or family or options_type.task, guide.training_type or options_type.method
    if family and task != family:
        yield f"--model_name {guide.model_name}: contradicts --model_type {task}; give one of them"
    if (task, method) != (options_type.task, options_type.method):
        values = {"model_type": guide.model_type, "model_name": guide.model_name, "training_type": guide.training_type}
        asked = " ".join(f"--{name} {value}" for name, value in values.items() if value)
        right = f"cogvideox_{'image' if task == 'i2v' else 'text'}_to_video_{method}.py"
        yield f"{asked}: is not what this script trains; the right one is {right}"


def guide_defaults(sources: dict[str, str]) -> Iterator[str]:
    """Yields a remark about flags that a command of the CogVideo guide leaves out, and that have other defaults there.

    Args:
        sources: Where each value comes from, by flag.
    """
    defaults = {name for name, source in sources.items() if source == "default"}
    if {item.name for item in dataclasses.fields(GuideFlags)} <= defaults:
        return  # it is no command of that guide
    left_out = defaults - ({"num_train_epochs"} if sources["max_train_steps"].startswith("given") else set())
    values = [f"--{name} {value}" for name, value in GUIDE_DEFAULTS.items() if name in left_out]
    if values:
        rule = "flags that are not given have other defaults in the CogVideo guide"
        yield f"{rule}; to train as it does, add {' '.join(values)}"
