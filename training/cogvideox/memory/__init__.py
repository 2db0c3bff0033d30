"""Streams host memory through the device while the device computes.

graphs.py     lets compiled functions have many graphs, in every thread
streaming.py  streams weights, saved activations, gradients and optimizer state between host and device
"""
