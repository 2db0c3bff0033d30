"""From files to batches: clips are planned, cached, sampled and put into batches.

forms/folders.py decides which form a data set has. media/frames.py decides which frames are taken from a clip.

forms/            reads folders, lists and tables into samples
media/            opens, checks, decodes and converts videos and pictures
cache.py          stores encoded clips and captions: content-addressed, with checksums
claims.py         divides work among all processes that share a folder
records.py        what the ledger records about each file
recipe.py         turns flags into the settings of a clip
health.py         brightness, saturation and motion of frames
clips.py          a file and a recipe -> a plan -> frames
used.py           says what each clip contributes to the buckets
strips.py         frames of a clip side by side in a small picture
sampler.py        which samples make up each optimizer step
shared_memory.py  how many workers of the loader fit into /dev/shm
dataset.py        cached tensors -> batches
"""
