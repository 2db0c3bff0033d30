"""Prepares data sets as cached tensors, and reports on them.

proposals.py  proposes buckets that suit the clips of a folder and a model
factory.py    converts folders that the CogVideoX factory prepared
encoding.py   encodes captions and clips, under keys of the cache
prepare.py    prepares folders of clips and captions as cached tensors
unusable.py   checks how many clips cannot be used
captions.py   finds captions that T5 cuts off or cannot tell apart
misread.py    finds captions that were read in another encoding than written
causes.py     groups the reasons why clips cannot be used, with fixes
pictures.py   draws strips and contact sheets of the clips
data_page.py  writes report.html about the data set, and finds odd clips
report.py     reports what a preparation does: tables, notes, costs
verify.py     verifies and repairs a cache
tensors.py    opens a prepared folder, or prepares one before training
captioning/   writes the missing captions of a data set, with a vision-language model
scenes/       finds the cuts of long videos, and writes their scenes into a table
"""
