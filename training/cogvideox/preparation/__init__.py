"""Prepares data sets as cached tensors, and reports on them.

proposals.py  proposes buckets that suit the clips of a folder and a model
factory.py    converts folders that the CogVideoX factory prepared
prepare.py    encodes folders of clips and captions into the cache
captions.py   finds captions that T5 cuts off or cannot tell apart
causes.py     groups the reasons why clips cannot be used, with fixes
report.py     reports what a preparation does: tables, contact sheets, costs
verify.py     verifies and repairs a cache
tensors.py    opens a prepared folder, or prepares one before training
"""
