"""Turns chosen frames of videos and pictures into pixels.

decode.py         probe, exact frames, mp4 writing
decord_reader.py  decord 0.6 as an alternative reader
pictures.py       still images
stills.py         small frames of a clip, also as JPEG
"""
