"""Other engines that this one is compared with. Each runs in its own Python environment."""
