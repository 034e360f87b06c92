"""The experiment side of lowbit: data, plain models, the training loop and reports."""
