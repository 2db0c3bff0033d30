"""Checks this machine, and optionally the files of a model, and prints one page that can be pasted into an issue.

    python training/doctor.py --model_id CogVideoX-5b --output_dir runs

The page has versions, devices, the attention kernels that pass, a comparison of a block with diffusers' own, rates of
copies and of the disk of --output_dir, free memory, and limits. It contains no paths and no tokens. A check that fails
takes one line, and the others still run; the exit status is then 1. Of a model folder, the configs, the headers of all
weight files and the tokenizer are read, but no weights are loaded. With --try_training, the training script also trains
a LoRA of the model for two steps, with a generated clip; without a model, that of the tiny model in examples/model.
"""

from cogvideox.config import args
from cogvideox.config.options import DoctorOptions


def main(options: DoctorOptions) -> int:
    """Prints the page, and returns the exit status: 1 if something is unusable."""
    from cogvideox.planning.doctor import checks_of, examine

    failed = 0
    for line, usable in examine(options, checks_of(options)):
        print(line, flush=True)
        failed += not usable
    print(f"{failed} of these checks failed" if failed else "everything that was checked is usable")
    return 1 if failed else 0


if __name__ == "__main__":
    args.run_script(main, DoctorOptions, __doc__, ())
