"""Converts the colors of decoded frames and pictures.

sdr.py     HDR and wide-gamut video -> SDR
alpha.py   composites transparent videos on black before scaling
icc.py     color profiles of pictures -> sRGB
planes.py  planes of decoded frames as arrays
"""
