"""Opens, checks, decodes and converts media files. No other part of the library does that.

workers.py        runs functions on media files in processes with limits, results in order
transforms.py     resize, crop and flip, the same for all frames of a clip
faults.py         the error for files that cannot be used
frames.py         which frames: selection by time
joined.py         files joined end to end: where the second one begins
keyframes.py      headers of keyframes: size of the pictures, whether decoding can start there
mpeg4.py          MPEG-4 part 2: packed B-frames, empty pictures
packets.py        a video's packets -> when each frame is shown, where decoding can start
icc.py            color profiles of pictures -> sRGB
pictures.py       still images
planes.py         planes of decoded frames as arrays
alpha.py          composites transparent videos on black before scaling
colors.py         HDR and wide-gamut video -> SDR
decord_reader.py  decord 0.6 as an alternative reader
decode.py         probe, exact frames, mp4 writing
stills.py         small frames of a clip, also as JPEG
"""
