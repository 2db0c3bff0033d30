"""Finds the scenes of long videos, so that each can be a clip.

cut_sheet.py  draws the cuts of a table of scenes
splitting.py  finds the cuts of videos, and writes their scenes into a table
"""
