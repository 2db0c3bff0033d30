"""Evaluates the model while it trains.

images.py        fetches the images that validation videos begin with
validation.py    renders validation videos
parity.py        checks that training and the diffusers pipeline give the transformer the same inputs
before_after.py  draws each prompt before and after training, next to a similar training clip
health.py        measures brightness, saturation and motion of validation videos against training clips
held_out.py      measures the loss on clips that are never trained on
"""
