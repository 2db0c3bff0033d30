"""Prepares data sets as cached tensors, and reports on them.

proposals.py      proposes buckets that suit the clips of a folder and a model
factory.py        converts folders that the CogVideoX factory prepared
encoding.py       encodes captions and clips, under keys of the cache
prepare.py        prepares folders of clips and captions as cached tensors
unusable.py       checks how many clips cannot be used
captions.py       finds captions that T5 cuts off or cannot tell apart
causes.py         groups the reasons why clips cannot be used, with fixes
cut_sheet.py      draws the cuts of a table of scenes
scenes.py         finds the cuts of videos, and writes their scenes into a table
vision_local.py   runs a vision-language model in this process
vision_server.py  asks a vision-language model on a server for a caption
captioning.py     writes the missing captions of a data set
pictures.py       draws strips and contact sheets of the clips
data_page.py      writes report.html about the data set, and finds odd clips
report.py         reports what a preparation does: tables, notes, costs
verify.py         verifies and repairs a cache
tensors.py        opens a prepared folder, or prepares one before training
"""
