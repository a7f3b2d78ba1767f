"""Self-supervised methods: one paper, one file."""
