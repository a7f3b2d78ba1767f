"""`xscale predict`: the embeddings of a data set as one safetensors file."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from xscale_lightning.callbacks.probe import run_folder
from xscale_lightning.files import save_tensors, told


class EmbeddingWriter(BasePredictionWriter):
    """Writes `embeddings.safetensors` into the run folder: `embedding [N, D]` float32 and, with labels, `label`.

    Rows are in the order of the data; with several processes each writes its own file, `embeddings_<rank>.safetensors`,
    with the rows' numbers as `index`.

    Args:
        filename: name inside the run folder.
    """

    def __init__(self, filename: str = "embeddings.safetensors") -> None:
        super().__init__(write_interval="epoch")
        self.filename = filename

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        """Concatenate all batches and write the file whole or not at all."""
        batches = [b for b in predictions if isinstance(b, dict)] if predictions else []
        if not batches:
            return
        tensors = {key: torch.cat([b[key] for b in batches]).cpu().contiguous() for key in batches[0]}
        folder = run_folder(trainer)
        if folder is None:
            rank_zero_info("embeddings are not written: without a logger there is no run folder.")
            return
        path = Path(trainer.log_dir or folder) / self.filename  # `log_dir` is the same on all processes
        if trainer.world_size > 1:
            path = path.with_stem(f"{path.stem}_{trainer.global_rank}")
            tensors["index"] = torch.tensor([i for group in batch_indices for batch in group for i in batch])
        with told(path, remedy="give another --output"):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(tensors, path)
        rank_zero_info(f"embeddings {list(tensors['embedding'].shape)} written to {path}")
