"""Reads the packets of a video file without decoding more than one frame.

packets.py    a video's packets -> when each frame is shown, where decoding can start
picture.py    a picture of a packet
keyframes.py  headers of keyframes: size of the pictures, whether decoding can start there
mpeg4.py      MPEG-4 part 2: packed B-frames, empty pictures
fields.py     interlaced h264: fields in packets of their own
bits.py       units of packets of h264 and hevc, and numbers in the bits of headers
joined.py     files joined end to end: where the second one begins
"""
