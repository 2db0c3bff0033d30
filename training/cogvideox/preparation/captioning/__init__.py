"""Writes the missing captions of a data set, with a vision-language model on a server or in this process.

vision_server.py     asks a vision-language model on a server for a caption
vision_local.py      runs a vision-language model in this process
missing_captions.py  writes the missing captions of a data set
"""
