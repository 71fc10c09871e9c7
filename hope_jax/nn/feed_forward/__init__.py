"""What follows a mixer in a block: SwiGLU, and the continuum memory system with its levels."""
