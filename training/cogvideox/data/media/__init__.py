"""Media files: videos and images are opened, checked, decoded and converted here, and nowhere else.

workers.py        processes for media files: limits, kills, results in order
transforms.py     resize, crop, flip of a whole clip
faults.py         what a file that cannot be used says
frames.py         which frames: selection by time
joined.py         files joined end to end: where the second begins
keyframes.py      a keyframe's bytes: the size of the pictures, whether decoding can start there
mpeg4.py          MPEG-4 part 2: packed B-frames, pictures that repeat the one before
packets.py        a video's packets -> when each frame is shown, where decoding can start
icc.py            color profiles of pictures -> sRGB
pictures.py       still images
planes.py         planes of decoded frames as arrays
alpha.py          transparency of videos: composited on black before scaling
colors.py         HDR and wide-gamut video -> SDR
decord_reader.py  decord 0.6 as another reader
decode.py         probe, exact frames, mp4 writing
"""
