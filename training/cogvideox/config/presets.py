"""Sets flags of the LoRA scripts from --preset: starting points for a style, a subject or a motion.

``fill_in`` adds the values of a preset to a parsed command line, as the strings that a user would type, so that they
are read and checked like any other flag. A flag that is given keeps its value. --num_train_epochs makes the number of
steps follow from the number of clips. This module needs only the standard library.

The CogVideoX factory trains a style on about 70 clips with rank and alpha 128, a learning rate of 1e-4 and 3000 steps
of one sample, which is about 40 passes. The CogVideo guide advises a rank of at least 64, and an alpha of the rank or
half of it; its scripts use rank 128, alpha 64 and 100 steps of warm-up. The passes for a subject and a motion are
starting points of this project: such data sets have fewer clips, so each is seen more often.
"""

from argparse import Namespace
from contextlib import suppress

PRESETS: dict[str, dict[str, str]] = {
    "style": {"rank": "128", "lora_alpha": "128", "lr_scheduler": "cosine_with_restarts", "num_train_epochs": "40"},
    "subject": {"rank": "64", "lora_alpha": "64", "lr_scheduler": "constant_with_warmup", "num_train_epochs": "100"},
    "motion": {"rank": "128", "lora_alpha": "64", "lr_scheduler": "cosine_with_restarts", "num_train_epochs": "60"},
}
SHARED = {"train_batch_size": "1", "optimizer": "adamw", "learning_rate": "1e-4", "lr_warmup_steps": "100"}


def fill_in(namespace: Namespace) -> set[str]:
    """Adds the values of the preset that a command line names, where it does not give the flags itself.

    If only the rank is given, alpha keeps its ratio to it, so that the LoRA is scaled as the preset means.

    Args:
        namespace: The parsed command line, which has a list of strings for each flag that is given.

    Returns:
        The names of the added flags; empty without a preset, or if there is no preset of that name.
    """
    name = " ".join(namespace.preset).lower() if hasattr(namespace, "preset") else ""
    values = SHARED | PRESETS[name] if name in PRESETS else {}
    if values and hasattr(namespace, "rank"):
        with suppress(ValueError):  # a rank that is not a number is reported with all other problems
            ratio = float(values["lora_alpha"]) / float(values["rank"])
            values["lora_alpha"] = str(ratio * float(" ".join(namespace.rank)))
    added = {flag for flag in values if not hasattr(namespace, flag)}
    for flag in added:
        setattr(namespace, flag, [values[flag]])
    return added
