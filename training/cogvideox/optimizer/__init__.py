"""Master weights, the optimizer step, averages, and who runs backward and step.

master_weights.py  fp32 masters and what optimizers keep: on the device, or passing through it
optim.py           an optimizer step, learning rate
offload.py         masters, moments and the step in host memory
ema.py             a moving average of the masters, to be looked at and exported
engine.py          who runs backward and step: this process, or DeepSpeed
"""
