"""`xscale doctor --replay FILE --ckpt_path CKPT`: a step that the finite guard skipped, once more."""

from xscale_lightning.errors import UserError


def replay_file(path: str, checkpoint: str | None) -> int:
    """Print what the saved batch gives with the weights of a checkpoint; 1 where it is not finite.

    Raises:
        UserError: a file that cannot be used, or no checkpoint.
    """
    from xscale_lightning.callbacks.replay import lines, read_record, replay
    from xscale_lightning.checkpoints import load_method

    if checkpoint is None:
        raise UserError("--replay needs the weights: give --ckpt_path, a checkpoint of the run from before that step.")
    record = read_record(path)
    result = replay(load_method(checkpoint), record)
    print("\n".join(lines(record, result)))
    return int(result.loss != result.loss or abs(result.loss) == float("inf") or bool(result.parameters))
