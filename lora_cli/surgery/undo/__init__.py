"""Undoing a merge bit for bit: recorded while it is made, written beside it, planned, checked and restored from there.

`recording` watches a merge and `writing` makes the undo file of it; `undoing` plans the way back, `checking` compares
every byte with its digest, `restoring` finishes the output, and `roundtrip` does all of it in memory.
"""
