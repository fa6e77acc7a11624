"""Drawing: figures, HTML and terminal pictures of Results, chosen by axis names and never by method.

`spec` derives a Picture from a field and its axes; `figure`, `terminal` and `html` draw Pictures in three media;
`page` binds several Results into one self-contained report.
"""
