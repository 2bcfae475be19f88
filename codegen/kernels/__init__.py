"""One file a kernel. `linear_<format>.py` bring a format into the common layout and name its schedules; `layout.py` is that layout;
`panel.py` (many rows of x) and `rows.py` (few) are the two loops that compute with it."""
