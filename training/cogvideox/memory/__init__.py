"""Host memory that passes through the device while it computes.

graphs.py     compiled functions that may have many graphs
streaming.py  tensors that pass through the device: weights, what forward keeps, gradients, masters
"""
