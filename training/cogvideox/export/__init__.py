"""Writes the result of a run: weights, model card and pipeline folder.

The weights themselves, a LoRA or a transformer, are written by ``export`` of the run's method in model/methods.py.

card.py             writes the model card
inference_code.py   generates inference.py and the example of the model card
pipeline_folder.py  writes a complete pipeline around fully trained weights, with links and copies
publish.py          writes the result, reloads it and compares it with the trained model
"""
