"""The network: its parts, its blocks as functions, what is trained of it, and the loss.

diffusion.py    noise schedule and loss
rope.py         rotary tables
lora.py         parts of a LoRA: layers, PiSSA's start, dropout that repeats
encode.py       clips, first frames and captions -> tensors
t5_stream.py    T5 with its blocks in host memory
vae_encoder.py  the VAE's encoder, faster on a GPU
vae_decoder.py  decoding what fits: whole frames, or tiles
models.py       parts of a pipeline: found, identified, loaded
tasks.py        what the transformer gets: text to video, image to video
methods.py      what is trained: a LoRA, or all weights
attention.py    attention by the kernels of the device
quant.py        frozen matrices in int8, fp8, nf4
blocks.py       one block, forward and backward, as functions of tensors
"""
