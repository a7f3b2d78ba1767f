"""One file per verb of `xscale`; each has `main(argv) -> int | None` with the verb in `argv[0]`."""
