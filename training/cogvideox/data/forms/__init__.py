"""The forms that data sets have: folders, lists and tables are read into samples.

columns.py      one value for each row, its location, and all problems
paths.py        which files a data set may name
tables.py       CSV, TSV, JSON lines and JSON -> columns
folders.py      detects which form a folder has -> columns
samples.py      folders of clips -> samples
table_text.py   changes cells of tables and adds rows, and keeps all other bytes
scene_table.py  the table of scenes, to which rows are added
unused.py       files that are not used, although somebody may have meant them to be
uncaptioned.py  clips without a caption, and where their captions are written
"""
