"""Captions of classes and what the model's own text encoder makes of them; loaded, used once,
freed.

Letters: C captions, D width of a vector, T tokens of a caption.
"""

from pathlib import Path

import torch

from semanticfl_ref.diffusion.modules import load_text_parts
from semanticfl_ref.errors import UserError


class TextEncoder:
    """Half a gigabyte in fp32 for Stable Diffusion 1.5: drop the object before the U-Net is loaded."""

    BATCH = 64

    def __init__(self, folder: Path, device="cpu"):
        self.tokenizer, self.model = load_text_parts(folder, device)
        self.device = device

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode captions.

        Returns:
            hidden: what the U-Net attends to, the last hidden states, float32 [C, T, D], on the
                device.
            pooled: one vector a caption, float32 [C, D], on the CPU: the text anchors.
        """
        longest = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        hidden, pooled = [], []
        for start in range(0, len(texts), self.BATCH):
            part = texts[start : start + self.BATCH]
            tokens = self.tokenizer(
                part, padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
            ).input_ids
            output = self.model(tokens.to(self.device))
            hidden.append(output.last_hidden_state), pooled.append(output.pooler_output.cpu())
        return torch.cat(hidden), torch.cat(pooled)


def captions(template: str, class_names) -> list[str]:
    """The template's `{}` (or `{class}`) replaced by each class's name; underscores of file names
    become spaces.

    Raises:
        UserError: the template has no place for the name.
    """
    if "{}" not in template and "{class}" not in template:
        raise UserError(
            f"prompt {template!r} has no place for the class: write {{}} where its name goes, as in 'a photo of a {{}}'"
        )
    return [
        template.replace("{class}", "{}").replace("{}", name.replace("_", " "))
        for name in class_names
    ]
