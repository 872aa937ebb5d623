"""Captions of classes, and the model's own text encoder for them.

Letters: C captions, D width of a vector, T tokens of a caption.
"""

from collections.abc import Iterable
from pathlib import Path

import torch

from semanticfl_ref.diffusion.modules import load_text_encoder
from semanticfl_ref.errors import UserError


class TextEncoder:
    """Half a gigabyte for Stable Diffusion 1.5: drop the object before the U-Net is loaded."""

    BATCH = 64

    def __init__(self, folder: Path, device: str | torch.device = "cpu"):
        self.tokenizer, self.model = load_text_encoder(folder, device)
        self.device = device

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode captions.

        Returns:
            hidden: the last hidden states, to which the U-Net attends; float32 [C, T, D], on the
                device.
            pooled: one vector per caption, the text anchors; float32 [C, D], on the CPU.
        """
        length = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        batches = tokens.input_ids.to(self.device).split(self.BATCH)
        outputs = [self.model(batch) for batch in batches]
        hidden = torch.cat([output.last_hidden_state for output in outputs])
        return hidden, torch.cat([output.pooler_output for output in outputs]).cpu()


def captions(template: str, class_names: Iterable[str]) -> list[str]:
    """A caption per class: its name in the place of `{}` or `{class}`.

    Underscores, as in names of folders, become spaces.

    Raises:
        UserError: the template has no place for the name.
    """
    template = template.replace("{class}", "{}")
    if "{}" not in template:
        raise UserError(
            f"diffusion.prompt = {template!r} has no place for the class: write {{}} where its "
            f"name goes, for example 'a photo of a {{}}'"
        )
    return [template.replace("{}", name.replace("_", " ")) for name in class_names]
