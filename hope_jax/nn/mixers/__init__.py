"""What mixes tokens: one file for each mixer, ``(x[B,T,D], state) -> (y[B,T,D], state)``."""
