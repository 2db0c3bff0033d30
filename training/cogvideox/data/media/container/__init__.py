"""Reads the packets of a video file without decoding more than one frame.

packets.py    a video's packets -> when each frame is shown, where decoding can start
keyframes.py  headers of keyframes: size of the pictures, whether decoding can start there
mpeg4.py      MPEG-4 part 2: packed B-frames, empty pictures
joined.py     files joined end to end: where the second one begins
"""
