"""Readers of checkpoints that the papers' own code has written: their names into ours and back, strictly."""
