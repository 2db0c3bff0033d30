"""Streams host memory through the device while the device computes.

buffers.py    allocates and pins host memory, and says where tensors are in a flat buffer
graphs.py     lets compiled functions have many graphs, in every thread
shared.py     allocates host memory that the processes of one machine share
streaming.py  streams weights, saved activations, gradients and optimizer state between host and device
"""
