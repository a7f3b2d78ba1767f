"""Downstream tasks: an encoder with a head, trained on labels. One file per task."""
