"""Turns gradients into new weights: fp32 master weights, the optimizer step, averages of weights, and engines.

Which optimizer a run uses, and with which arguments, is decided by the flags in config/optimizers.py. This folder steps
whatever optimizer that file makes.

step.py             MasterWeights: sums gradients, clips, skips steps that are not finite, updates; the learning rate
adam.py             Adam and AdamW in one function, with masters and moments in few bytes
adam_weights.py     the weights that Adam trains, with their state on the device or in host memory
master_weights.py   fp32 master weights with any other optimizer, on the device
ema.py              a moving average of the master weights, for validation and export
sharded_weights.py  the same as step.py for weights of which each process has some rows (FSDP2)
shard_files.py      writes and reads safetensors files together with the other processes, each its shards
model_files.py      writes a sharded transformer as a folder that from_pretrained reads
zero_weights.py     the same as step.py for weights whose state DeepSpeed's ZeRO divides between the processes
engine.py           what runs backward and step, with the weights of one of these modules, and writes checkpoints
"""
