"""Generated tasks: an example is a function of (seed, index), so nothing is stored and any step can be repeated.

One file per task: a function ``task(seed, index, batch, ...) -> (inputs[B,T], targets[B,T])``. Targets are IGNORE at
positions that are not scored. Read recall.py next, then needle.py.
"""
