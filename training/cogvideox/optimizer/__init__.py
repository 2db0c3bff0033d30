"""Turns gradients into new weights: fp32 master weights, the optimizer step, averages of weights, and engines.

Which optimizer a run uses, and with which arguments, is decided by the flags in config/optimizers.py. This folder steps
whatever optimizer that file makes.

step.py              what a step of any engine needs: its numbers, clipping, skipping, the scale of the loss
schedule.py          the learning rate of each step
master_weights.py    MasterWeights, if each process has all weights: sums gradients, clips, skips steps, updates masters
adam.py              Adam and AdamW in one function, with masters and moments in few bytes
adam_groups.py       the weights that Adam trains, in flat arrays beside their state, on the device or in host memory
adam_weights.py      AdamWeights, the MasterWeights that Adam updates, also while the next forward pass computes
resident_weights.py  ResidentWeights, the MasterWeights of any other optimizer, on the device
rule.py              which of both an optimizer of the flags gets, and how large its state is
state_tensors.py     the state of an optimizer as plain tensors by name, as checkpoints store it
ema.py               a moving average of the master weights, for validation and export
sharded_weights.py   ShardedWeights, the same for weights of which each process has some rows (FSDP2)
shard_files.py       writes and reads safetensors files together with the other processes, each its shards
model_files.py       writes a sharded transformer as a folder that from_pretrained reads
zero_weights.py      ZeroWeights, the same for weights whose state DeepSpeed's ZeRO divides between the processes
engine.py            what runs backward and step, with the weights of one of these modules, and writes checkpoints
"""
