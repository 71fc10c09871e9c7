"""What experiments do alike while they run: progress lines, compiled programs that are kept."""

import sys
from pathlib import Path

import jax


def progress_interval() -> float:
    """Seconds between progress lines: seldom in a log file."""
    return 0.5 if sys.stderr.isatty() else 20.0


def keep_programs(folder: Path) -> None:
    """Compile once for all seeds and processes, unless the environment says where compiled programs are kept."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute() / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs add up
