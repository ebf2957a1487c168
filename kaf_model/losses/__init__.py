"""The training losses, one file a loss."""
