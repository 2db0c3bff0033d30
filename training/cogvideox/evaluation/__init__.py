"""Measuring and showing the model while it trains.

images.py        the images that validation videos begin with
validation.py    videos while training
parity.py        what training feeds the transformer against what the pipeline does
before_after.py  each prompt before and after training, beside a training clip
held_out.py      the loss on clips that are never trained on
"""
