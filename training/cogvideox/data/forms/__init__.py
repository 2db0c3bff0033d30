"""The forms of data sets: folders, lists and tables are read into samples.

columns.py  one value a row, its place, and all that is wrong
paths.py    which files a data set may name
tables.py   CSV, TSV, JSON lines, JSON -> columns
folders.py  which form a folder has -> columns
samples.py  folders of clips -> samples
"""
