"""Turns gradients into new weights: fp32 master weights, the optimizer step, averages of weights, and engines.

Which optimizer a run uses, and with which arguments, is decided by the flags in config/optimizers.py. This folder steps
whatever optimizer that file makes.

step.py             MasterWeights: sums gradients, clips, skips steps that are not finite, updates; the learning rate
master_weights.py   where fp32 master weights and moments are stored: on the device, or in host memory between steps
offload.py          the same as step.py with torchao's CPUOffloadOptimizer, which steps on the CPU
ema.py              a moving average of the master weights, for validation and export
sharded_weights.py  the same as step.py for weights of which each process has some rows (FSDP2)
shard_files.py      writes and reads safetensors files together with the other processes, each its shards
model_files.py      writes a sharded transformer as a folder that from_pretrained reads
zero_weights.py     the same as step.py for weights whose state DeepSpeed's ZeRO divides between the processes
engine.py           what runs backward and step, with the weights of one of these modules, and writes checkpoints
"""
