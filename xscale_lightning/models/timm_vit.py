"""`timm:NAME`: any Vision Transformer of timm as a backbone, with `attend` in place of its attention."""

import timm
from timm.layers import Attention as TimmAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from xscale_lightning.errors import UserError
from xscale_lightning.models.attention import Attention
from xscale_lightning.models.tokens import Tokens
from xscale_lightning.models.vit import Encoder, Pool


class TimmViT(Encoder):
    """A timm `VisionTransformer`, its parameters under timm's own names, tokens selected after positions are added.

    Args:
        name: timm's model name, for example `vit_small_patch16_224`.
        in_chans: number of bands; timm adapts pretrained RGB filters to it.
        pretrained: load timm's weights (downloads them, or takes a `local-dir:` name).
        drop_path: stochastic depth.
        pool: `mean` of the patch tokens or the `cls` token.

    Raises:
        UserError: unknown name, or a model that is no plain Vision Transformer (masked methods select tokens).
    """

    def __init__(
        self, name: str, in_chans: int, pretrained: bool = False, drop_path: float = 0.0, pool: Pool = "mean"
    ) -> None:
        super().__init__()
        options = {"in_chans": in_chans, "num_classes": 0, "drop_path_rate": drop_path, "dynamic_img_size": True}
        try:
            model = timm.create_model(name, pretrained=pretrained, **options)
        except (RuntimeError, TypeError, ValueError) as error:
            hits = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
            reason = str(error).splitlines()[0]
            raise UserError(f"backbone 'timm:{name}' cannot be built: {reason} (similar names: {hits})") from error
        if not isinstance(model, VisionTransformer):
            raise UserError(
                f"backbone 'timm:{name}' is a {type(model).__name__}, not a plain Vision Transformer: "
                "choose one of timm.list_models('vit_*')."
            )
        blocks = list(model.blocks.children())
        for block in blocks:
            attention = getattr(block, "attn", None)
            if type(attention) is TimmAttention and attention.gate is None:
                block.attn = Attention.adopt(attention)
        if pool == "cls" and not model.has_class_token:
            raise UserError(f"backbone 'timm:{name}' has no class token: set pool to 'mean'.")
        self.model = model
        self.in_chans = in_chans
        self.patch_size = model.patch_embed.patch_size[0]
        self.num_features, self.depth = model.embed_dim, len(blocks)
        self.num_prefix = model.num_prefix_tokens
        self.pool_mode: Pool = pool

    def embed(self, images: Tensor, gsd: Tensor | None = None, keep: Tensor | None = None) -> Tokens:
        """Patch embedding, positions and prefix tokens; `gsd` is ignored."""
        if images.shape[1] != self.in_chans:
            raise UserError(f"the backbone was built for {self.in_chans} bands and got images of {images.shape[1]}.")
        grid = self.grid(images)
        x = self.model.norm_pre(self.model._pos_embed(self.model.patch_embed(images)))
        tokens = Tokens(x, grid, None, self.num_prefix)
        return tokens if keep is None else tokens.keep(keep)

    def encode(self, tokens: Tokens) -> Tokens:
        """Blocks and final norm."""
        x = self.model.norm(self.model.blocks(tokens.x))
        return Tokens(x, tokens.grid, tokens.kept, tokens.num_prefix)
