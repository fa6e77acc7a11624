"""Loading: ids, folders and live models, wrappers, and how a model was obtained."""
