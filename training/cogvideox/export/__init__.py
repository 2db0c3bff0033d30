"""What a run hands over: weights, model card, pipeline folder.

card.py             the model card
pipeline_folder.py  a whole pipeline beside all trained weights, of links and copies
publish.py          the result, reloaded and compared
"""
