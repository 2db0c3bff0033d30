"""Opens, checks, decodes and converts media files. No other part of the library does that.

container/     the packets of a video file: what it holds, and where decoding can start
colors/        colors and transparency of decoded frames
pixels/        the pixels of chosen frames of a video or picture, and mp4 writing
faults.py      the error for files that cannot be used
frames.py      which frames: selection by time
transforms.py  resize, crop and flip, the same for all frames of a clip
workers.py     runs functions on media files in processes with limits, results in order
"""
