"""Speed of the kernels: against each other, against other people's code, and against the machine's limits."""
