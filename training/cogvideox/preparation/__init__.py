"""From a data set to cached tensors, and the reports about it.

proposals.py  buckets that suit a folder's clips and a model
factory.py    folders that the CogVideoX factory prepared -> the cache
prepare.py    folders of clips -> the cache
captions.py   what T5 does not read of captions, or cannot tell apart
causes.py     why clips cannot be used, grouped, with what helps
report.py     what a preparation makes of a data set: table, pictures, costs
verify.py     a cache against its data: what is wrong, and mending it
tensors.py    a prepared folder, or one prepared now
"""
