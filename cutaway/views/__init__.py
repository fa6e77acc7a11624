"""Drawing: figures, HTML and terminal pictures of Results, chosen by axis names and never by method.

`spec` derives a Picture from a field and its axes, `kinds` says which kind of picture suits; the files in `draw` draw
Pictures in three media, and `page` binds several Results into one self-contained report.
"""
