"""The feed-forward parts, which follow a mixer in a block: SwiGLU, and the continuum memory system."""
