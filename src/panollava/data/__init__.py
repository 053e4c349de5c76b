"""From rows and panoramas to packed batches."""
