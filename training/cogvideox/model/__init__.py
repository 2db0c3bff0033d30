"""Contains the network, its blocks as functions of tensors, the training methods, and the loss.

diffusion.py    the noise schedule, the loss and its weights
tasks.py        what the transformer gets as input: text-to-video, image-to-video
methods.py      what is trained, and how it is saved and loaded: a LoRA, or all weights
lora.py         additions to PEFT's LoRA: choice of layers, PiSSA, repeatable dropout, folded scale
blocks.py       one transformer block, forward and backward, with a choice of the activations to keep
attention.py    attention with the fastest kernels of the device
sequence.py     attention of several processes, each with a part of the tokens of a sample
quant.py        frozen weights in int8, fp8 or nf4
rope.py         tables of the rotary position embedding
transformer_files.py  how the weights of a transformer are divided into files
models.py       the parts of a pipeline: finding, identifying and loading them
encode.py       clips, first frames and captions -> tensors
t5_stream.py    T5 with its blocks in host memory
vae_encoder.py  a faster encoder for the VAE on a GPU
vae_decoder.py  decoding in the largest tiles that fit
"""
