"""M1 models in other engines."""
