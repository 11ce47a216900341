"""Several devices: how attention may be shared out. Importing it loads nothing of torch's."""
