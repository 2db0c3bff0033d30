"""Checks this machine, and optionally the files of a model, and prints one page that can be pasted into an issue.

    python training/doctor.py
    python training/doctor.py --model_id THUDM/CogVideoX-5b --output_dir my-lora

The page lists versions, GPUs, the attention kernels that work here, a comparison of a block with diffusers' own block,
the rates of copies between host and GPU and of the disk of --output_dir, free memory, and limits. It contains no paths
and no tokens. If a check fails, one line says so, the others still run, and the exit status is 1.

--model_id also checks the files of a model. If it is a folder, the configs, the tokenizer and the headers of all weight
files are read, but no weights are loaded. --try_training trains a LoRA of the model for two steps, on a generated clip,
or a LoRA of the tiny model in examples/model if no model is given.
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
