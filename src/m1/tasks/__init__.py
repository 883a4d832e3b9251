"""Problems to solve: benchmarks, generated chain problems, and prompt templates. It needs no torch."""
