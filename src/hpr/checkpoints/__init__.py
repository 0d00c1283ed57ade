"""EXPORT: open a model, save and load a compressed one, the hook in transformers."""
