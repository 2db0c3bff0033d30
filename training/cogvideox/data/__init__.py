"""From files to batches: clips that are planned, cached, sampled and put into batches.

cache.py          encoded clips and captions: content-addressed, checked, atomic
clips.py          a file and a recipe -> a plan -> frames
sampler.py        which samples make up each optimizer step
shared_memory.py  room for batches in /dev/shm: how many workers of the loader fit
dataset.py        cached tensors -> batches
"""
